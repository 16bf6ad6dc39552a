"""Errors a user of the model can cause; the command line prints them and exits with code 2."""

from __future__ import annotations

import os
from pathlib import Path


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


def check_count(name: str, value: object, minimum: int = 1) -> None:
    """Raises `KimiError` unless ``value``, given by a caller as ``name``, counts something."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise KimiError(f"{name} must be an integer of at least {minimum}, got {value!r:.80}")
    if value >= 2**40:  # more than any memory holds; torch's own error would name no argument
        raise KimiError(f"{name} must be below 2^40, got {value!r:.80}")


def checked_path(value: object, error: type[KimiError] = KimiError) -> Path:
    """A path that a caller gave, there or not. Raises ``error`` for what no path can be."""
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise error(f"a path must be text or a Path, got {value!r:.80}")
    path = Path(value)
    try:
        path.is_dir()
        os.fsencode(path).index(0)
    except OSError as fault:
        raise error(f"{value!s:.80}: not a usable path: {fault.strerror}") from None
    except ValueError:
        return path
    raise error(f"{value!r:.80}: not a usable path: it contains a null character")
