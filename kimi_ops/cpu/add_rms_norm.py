"""Launches `csrc/cpu/add_rms_norm.cpp`."""

from __future__ import annotations

from torch import Tensor

from kimi_ops import _native
from kimi_ops.cpu._support import dense_rows, refusal

BATCH_INVARIANT = True  # a row is summed alike in every batch


def unsupported(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> str | None:
    return refusal("add_rms_norm", x)


def launch(
    outputs: tuple[Tensor, Tensor], x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> None:
    y, h = outputs
    if y.numel() == 0:
        return
    x, rows = dense_rows(x)
    residual, rows_residual = dense_rows(residual)
    _native.call(
        "add_rms_norm",
        dtype=x.dtype,
        y=y,
        h=h,
        x=x,
        rows_x=rows,
        residual=residual,
        rows_residual=rows_residual,
        weight=weight.contiguous(),
        rows=rows.total,
        width=x.shape[-1],
        eps=eps,
    )
