"""Launches `csrc/cpu/silu_mul.cpp`."""

from __future__ import annotations

from torch import Tensor

from kimi_ops import _native
from kimi_ops.cpu._support import dense_rows, refusal

BATCH_INVARIANT = True  # an element depends on its own gate and up alone


def unsupported(gate_up: Tensor) -> str | None:
    return refusal("silu_mul", gate_up)


def launch(y: Tensor, gate_up: Tensor) -> None:
    if y.numel() == 0:
        return
    gate_up, rows = dense_rows(gate_up)
    _native.call(
        "silu_mul",
        dtype=gate_up.dtype,
        y=y,
        gate_up=gate_up,
        rows_gate_up=rows,
        rows=rows.total,
        width=y.shape[-1],
    )
