"""Reference of `vision_rope`."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops.reference import runs_anything as unsupported
from kimi_ops.reference import widen
from kimi_ops.reference._grid import locate
from kimi_ops.reference._rotate import rotate_pairs

__all__ = ["launch", "unsupported", "vision_rope"]


def vision_rope(qkv: Tensor, grid_thws: Tensor) -> Tensor:
    head_dim = qkv.shape[-1]
    place = locate(grid_thws, len(qkv))
    dtype = widen(qkv).dtype
    frequency = 10000.0 ** (
        torch.arange(0, head_dim, 4, device=qkv.device, dtype=dtype) / -head_dim
    )
    # Column first: pair 2i turns with x, pair 2i + 1 with y.
    position = torch.stack((place.column, place.row), dim=1).to(dtype)
    angle = (frequency[:, None] * position[:, None]).flatten(1)
    rotated = rotate_pairs(qkv[:, :2], angle[:, None, None])
    rotated = torch.where(place.inside.view(-1, 1, 1, 1), rotated, qkv[:, :2])
    return torch.cat((rotated, qkv[:, 2:]), dim=1)


def launch(outputs: None, qkv: Tensor, grid_thws: Tensor) -> None:
    qkv.copy_(vision_rope(qkv, grid_thws))
