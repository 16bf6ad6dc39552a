"""The complete Kimi K2.5 model, assembled from the ops of this package."""

from __future__ import annotations
