"""Launches `csrc/cpu/vision_attention.cpp`."""

from __future__ import annotations

from torch import Tensor

from kimi_ops import _native
from kimi_ops.cpu._support import dense_last, refusal

BATCH_INVARIANT = True  # blocks of queries and of keys begin where their segment does


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> str | None:
    return refusal("vision_attention", q)


def launch(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> None:
    q, k, v = dense_last(q), dense_last(k), dense_last(v)
    _native.call(
        "vision_attention",
        dtype=q.dtype,
        out=out,
        q=q,
        stride_q_t=q.stride(0),
        stride_q_h=q.stride(1),
        k=k,
        stride_k_t=k.stride(0),
        stride_k_h=k.stride(1),
        v=v,
        stride_v_t=v.stride(0),
        stride_v_h=v.stride(1),
        cu_seqlens=cu_seqlens.contiguous(),
        segments=len(cu_seqlens) - 1,
        tokens=q.shape[0],
        heads=q.shape[1],
        head_dim=q.shape[2],
        scale=scale,
    )
