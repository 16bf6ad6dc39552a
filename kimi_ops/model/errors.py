"""Errors a user of the model can cause; the command line prints them and exits with code 2."""

from __future__ import annotations


class KimiError(ValueError):
    """Base of every error that the model raises about its input."""


class ConfigError(KimiError):
    """A `config.json` (or a request made of one) that is unknown, unsupported or contradictory."""


class CheckpointError(KimiError):
    """A checkpoint that is missing tensors, truncated, mis-shaped or otherwise not as announced."""


class MediaError(KimiError):
    """A picture or clip that cannot be read, or media that do not match their placeholders."""


class ChatError(KimiError):
    """A conversation, tool declaration or chat template that cannot be rendered."""
