"""Launches `csrc/cpu/rms_norm.cpp`."""

from __future__ import annotations

from torch import Tensor

from kimi_ops import _native
from kimi_ops.cpu._support import dense_rows, refusal

BATCH_INVARIANT = True  # a row is summed alike in every batch


def unsupported(x: Tensor, weight: Tensor, eps: float) -> str | None:
    return refusal("rms_norm", x)


def launch(y: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    if y.numel() == 0:
        return
    x, rows = dense_rows(x)
    _native.call(
        "rms_norm",
        dtype=x.dtype,
        y=y,
        x=x,
        rows_x=rows,
        weight=weight.contiguous(),
        rows=rows.total,
        width=x.shape[-1],
        eps=eps,
    )
