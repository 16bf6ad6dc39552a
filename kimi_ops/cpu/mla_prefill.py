"""Launches `csrc/cpu/mla_prefill.cpp`."""

from __future__ import annotations

from torch import Tensor

from kimi_ops import _native
from kimi_ops.cpu._support import dense_last, refusal

BATCH_INVARIANT = True  # blocks of queries and of keys begin where their sequence does


def unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
) -> str | None:
    return refusal("mla_prefill", q)


def launch(
    outputs: tuple[Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
) -> None:
    out, lse = outputs
    q, k, v = dense_last(q), dense_last(k), dense_last(v)
    _native.call(
        "mla_prefill",
        dtype=q.dtype,
        out=out,
        lse=lse,
        q=q,
        stride_q_t=q.stride(0),
        stride_q_h=q.stride(1),
        k=k,
        stride_k_t=k.stride(0),
        stride_k_h=k.stride(1),
        v=v,
        stride_v_t=v.stride(0),
        stride_v_h=v.stride(1),
        cu_seqlens_q=cu_seqlens_q.contiguous(),
        cu_seqlens_k=cu_seqlens_k.contiguous(),
        sequences=len(cu_seqlens_q) - 1,
        tokens=q.shape[0],
        keys=k.shape[0],
        heads=q.shape[1],
        width=q.shape[2],
        value_width=v.shape[2],
        scale=scale,
        causal=causal,
    )
