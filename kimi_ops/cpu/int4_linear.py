"""Launches `csrc/cpu/int4_linear.cpp`."""

from __future__ import annotations

from torch import Tensor

from kimi_ops import _native
from kimi_ops._batch_invariant import is_batch_invariant
from kimi_ops.cpu._support import dense_last, dense_refusal, refusal

BATCH_INVARIANT = True  # then there is one path, however many tokens there are


def unsupported(x: Tensor, packed: Tensor, scale: Tensor) -> str | None:
    return refusal("int4_linear", x) or dense_refusal("int4_linear", packed=packed, scale=scale)


def launch(y: Tensor, x: Tensor, packed: Tensor, scale: Tensor) -> None:
    if y.numel() == 0:
        return
    if x.shape[-1] == 0:
        y.zero_()
        return
    rows = dense_last(x).reshape(y.numel() // packed.shape[0], x.shape[-1])
    _native.call(
        "int4_linear",
        dtype=x.dtype,
        y=y,
        x=rows,
        packed=packed,
        scale=scale,
        tokens=rows.shape[0],
        rows=packed.shape[0],
        columns=rows.shape[1],
        stride_x=rows.stride(0),
        stride_packed=packed.stride(0),
        stride_scale=scale.stride(0),
        scale_dtype=scale.dtype,
        one_path=is_batch_invariant(),
    )
