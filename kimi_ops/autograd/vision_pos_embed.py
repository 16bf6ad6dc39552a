"""Gradient of `vision_pos_embed`.

``dx = dy``. The resampling is linear in the table, ``y[l] += sum of the 16 taps of weight(l, tap)
table[tap]``, so its gradient is the transposed resampling: ``dtable[tap] += weight(l, tap) dy[l]``
over all patches and frames.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kimi_ops.autograd._rows import add_rows
from kimi_ops.reference import widen
from kimi_ops.reference._grid import locate
from kimi_ops.reference.vision_pos_embed import taps

GRADIENTS = ("x", "table")


def save(ctx: Any, inputs: tuple[Any, ...], outputs: Tensor) -> None:
    _, table, grid_thws = inputs
    ctx.table_shape = table.shape
    ctx.save_for_backward(grid_thws)


def backward(ctx: Any, dy: Tensor) -> dict[str, Tensor]:
    if "table" not in ctx.wanted:
        return {"x": dy}
    (grid_thws,) = ctx.saved_tensors
    n_rows, n_columns, width = ctx.table_shape
    place, wide = locate(grid_thws, len(dy)), widen(dy)
    rows, row_weights = taps(place.row, place.h, n_rows, wide.dtype)
    columns, column_weights = taps(place.column, place.w, n_columns, wide.dtype)
    wide = wide.masked_fill(~place.inside[:, None], 0)
    dtable = torch.zeros((n_rows * n_columns, width), dtype=wide.dtype, device=dy.device)
    for i in range(4):
        for j in range(4):
            weight = row_weights[:, i] * column_weights[:, j]
            add_rows(dtable, rows[:, i] * n_columns + columns[:, j], weight[:, None] * wide)
    return {"x": dy, "table": dtable.view(ctx.table_shape).to(dy.dtype)}
