"""Reference of `vision_rope`."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops.reference import runs_anything as unsupported
from kimi_ops.reference import widen
from kimi_ops.reference._grid import locate
from kimi_ops.reference._rotate import rotate_pairs

__all__ = ["angles", "launch", "unsupported", "vision_rope"]


def angles(qkv: Tensor, grid_thws: Tensor) -> Tensor:
    """By how much each pair of ``qkv [L, 3, H, head_dim]`` turns: ``[L, 1, 1, head_dim / 2]``.

    In float32 (float64 for float64 ``qkv``); 0 for patches past the last entry.
    """
    head_dim = qkv.shape[-1]
    place = locate(grid_thws, len(qkv))
    dtype = widen(qkv[:0]).dtype
    frequency = 10000.0 ** (
        torch.arange(0, head_dim, 4, device=qkv.device, dtype=dtype) / -head_dim
    )
    # Column first: pair 2i turns with x, pair 2i + 1 with y.
    position = torch.stack((place.column, place.row), dim=1).to(dtype)
    angle = (frequency[:, None] * position[:, None]).flatten(1)
    return angle.masked_fill(~place.inside[:, None], 0)[:, None, None]


def vision_rope(qkv: Tensor, grid_thws: Tensor) -> Tensor:
    rotated = rotate_pairs(qkv[:, :2], angles(qkv, grid_thws))
    inside = locate(grid_thws, len(qkv)).inside
    rotated = torch.where(inside.view(-1, 1, 1, 1), rotated, qkv[:, :2])
    return torch.cat((rotated, qkv[:, 2:]), dim=1)


def launch(outputs: None, qkv: Tensor, grid_thws: Tensor) -> None:
    qkv.copy_(vision_rope(qkv, grid_thws))
