"""Launches `csrc/cpu/vision_pos_embed.cpp`."""

from __future__ import annotations

from torch import Tensor

from kimi_ops import _native
from kimi_ops.cpu._support import dense_rows, refusal

BATCH_INVARIANT = True  # a patch's values depend on nothing but itself and its place


def unsupported(x: Tensor, table: Tensor, grid_thws: Tensor) -> str | None:
    return refusal("vision_pos_embed", x)


def launch(y: Tensor, x: Tensor, table: Tensor, grid_thws: Tensor) -> None:
    if y.numel() == 0:
        return
    x = dense_rows(x)[0]
    if table.stride(2) != 1:
        table = table.contiguous()
    _native.call(
        "vision_pos_embed",
        dtype=x.dtype,
        y=y,
        x=x,
        stride_x=x.stride(0),
        table=table,
        stride_row=table.stride(0),
        stride_column=table.stride(1),
        grid_thws=grid_thws.contiguous(),
        grid_bytes=grid_thws.element_size(),
        entries=len(grid_thws),
        length=x.shape[0],
        rows=table.shape[0],
        columns=table.shape[1],
        width=x.shape[1],
    )
