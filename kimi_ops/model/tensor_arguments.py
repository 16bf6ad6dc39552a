"""Tensors that a caller hands to the model: what they must be, before anything is computed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kimi_ops.model.errors import KimiError, MediaError
from kimi_ops.model.vision import merged_lengths


def check_tensor(name: str, value: Any, expected: str, error: type[KimiError] = KimiError) -> None:
    """Raises ``error`` unless ``value`` is what ``expected`` says.

    Args:
        name: of the argument, for the message.
        expected: ``"[T, 3] integers"`` or ``"[M, D] floats"``: a letter stands for any size.
    """
    if not isinstance(value, Tensor):
        raise error(f"{name} must be a tensor, got {type(value).__name__}")
    dims = re.findall(r"\w+", expected.partition("]")[0])
    sizes = len(dims) == value.dim() and all(
        not dim.isdigit() or int(dim) == size for dim, size in zip(dims, value.shape, strict=True)
    )
    if expected.endswith("floats"):
        kind = value.is_floating_point()
    else:
        kind = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if not (sizes and kind):
        raise error(f"{name} must be {expected}, got {list(value.shape)} {value.dtype}")


def check_media_tensors(pixel_values: Any, grid_thws: Any) -> None:
    """Patches and the sizes that say whose they are. Raises `MediaError`."""
    if not isinstance(pixel_values, Tensor):
        raise MediaError(f"pixel_values must be a tensor, got {type(pixel_values).__name__}")
    check_tensor("grid_thws", grid_thws, "[n, 3] integers", MediaError)


def check_placeholders(
    placeholder: int,
    prompts: Sequence[Sequence[int]],
    pixel_values: Tensor | None,
    grid_thws: Tensor | None,
) -> None:
    """Each prompt's placeholders must be those of whole pictures and chunks.

    The total number is checked where they are filled in. Raises `MediaError`.
    """
    if (pixel_values is None) != (grid_thws is None):
        raise MediaError("pixel_values and grid_thws must be given together")
    if grid_thws is None:
        return
    check_media_tensors(pixel_values, grid_thws)
    ends = {0, *merged_lengths(grid_thws.to("cpu", torch.int64)).cumsum(0).tolist()}
    count = 0
    for number, prompt in enumerate(prompts):
        own = sum(token == placeholder for token in prompt)
        count += own
        if count not in ends and count <= max(ends):
            raise MediaError(
                f"prompt {number} has {own} media placeholders, which ends amid a picture or "
                "chunk of a clip; its media must have as many tokens"
            )
