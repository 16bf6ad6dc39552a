"""Reference of `vision_pos_embed`."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops.reference import runs_anything as unsupported
from kimi_ops.reference import widen
from kimi_ops.reference._grid import locate

__all__ = ["launch", "taps", "unsupported", "vision_pos_embed"]

_A = -0.75  # of the cubic convolution; torch's and the model's choice


def taps(index: Tensor, size: Tensor, table_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Table indices and weights, both ``[L, 4]``, that resample ``table_size`` to ``size``."""
    source = (index.to(dtype) + 0.5) * (table_size / size.to(dtype)) - 0.5
    base = source.floor()
    tap = base[:, None] + torch.arange(-1, 3, device=index.device)
    d = (source[:, None] - tap).abs()
    near = ((_A + 2) * d - (_A + 3)) * d * d + 1  # |d| <= 1
    far = ((_A * d - 5 * _A) * d + 8 * _A) * d - 4 * _A  # 1 < |d| < 2
    return tap.long().clamp(0, table_size - 1), torch.where(d <= 1, near, far)


def vision_pos_embed(x: Tensor, table: Tensor, grid_thws: Tensor) -> Tensor:
    place = locate(grid_thws, len(x))
    wide = widen(table)
    rows, row_weights = taps(place.row, place.h, table.shape[0], wide.dtype)
    columns, column_weights = taps(place.column, place.w, table.shape[1], wide.dtype)
    position = torch.zeros_like(x, dtype=wide.dtype)
    for i in range(4):
        for j in range(4):
            weight = row_weights[:, i] * column_weights[:, j]
            position += weight[:, None] * wide[rows[:, i], columns[:, j]]

    half = x.shape[1] // 2
    omega = 10000.0 ** (torch.arange(half, device=x.device, dtype=wide.dtype) / -half)
    angle = place.frame[:, None] * omega
    time = torch.cat((angle.sin(), angle.cos()), dim=1)
    position += time.masked_fill((place.t == 1)[:, None], 0)
    return torch.where(place.inside[:, None], widen(x) + position, widen(x)).to(x.dtype)


def launch(y: Tensor, x: Tensor, table: Tensor, grid_thws: Tensor) -> None:
    y.copy_(vision_pos_embed(x, table, grid_thws))
