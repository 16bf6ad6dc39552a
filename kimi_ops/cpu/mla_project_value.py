"""Launches `csrc/cpu/mla_project_value.cpp`."""

from __future__ import annotations

from torch import Tensor

from kimi_ops import _native
from kimi_ops._batch_invariant import is_batch_invariant
from kimi_ops.cpu._support import dense_last, refusal

BATCH_INVARIANT = True  # then few tokens take the path of many


def unsupported(out: Tensor, w_uv: Tensor) -> str | None:
    return refusal("mla_project_value", out)


def launch(value: Tensor, out: Tensor, w_uv: Tensor) -> None:
    if value.numel() == 0:
        return
    out, w_uv = dense_last(out), dense_last(w_uv)
    tokens, heads, rank = out.shape
    _native.call(
        "mla_project_value",
        dtype=out.dtype,
        value=value,
        out=out,
        stride_out_t=out.stride(0),
        stride_out_h=out.stride(1),
        w_uv=w_uv,
        stride_w_h=w_uv.stride(0),
        stride_w_v=w_uv.stride(1),
        tokens=tokens,
        heads=heads,
        width=w_uv.shape[1],
        rank=rank,
        one_path=is_batch_invariant(),
    )
