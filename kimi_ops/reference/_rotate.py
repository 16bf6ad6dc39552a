"""Rotation of adjacent pairs, which every RoPE of the model uses."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops.reference import widen


def rotate_pairs(x: Tensor, angle: Tensor) -> Tensor:
    """Turns each pair ``(x[..., 2i], x[..., 2i+1])`` by ``angle[..., i]`` radians, in place order.

    ``x [..., R]``, ``angle [..., R/2]`` in float32 or float64; computed in the wider of the two
    and rounded to the dtype of ``x`` once.
    """
    a, c = widen(x)[..., 0::2], widen(x)[..., 1::2]
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((a * cos - c * sin, c * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)


def rope(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Text RoPE of ``x [T, ..., R]`` at ``positions [T]`` with ``inv_freq [R/2]``.

    The angle is a product in float32 (float64 for float64 ``x``): at position 262,143 a bfloat16
    angle would be wrong by whole turns.
    """
    wide = widen(x).dtype
    angle = positions.to(wide).view(-1, *(1,) * (x.dim() - 1)) * inv_freq.to(wide)
    return rotate_pairs(x, angle)
