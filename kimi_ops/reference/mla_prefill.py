"""Reference of `mla_prefill`."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from kimi_ops.reference import runs_anything as unsupported
from kimi_ops.reference import widen
from kimi_ops.reference._attention import attend

__all__ = ["launch", "mla_prefill", "unsupported"]


def mla_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    out = q.new_zeros((*q.shape[:2], v.shape[2]))
    lse = widen(q.new_full(q.shape[:2], -torch.inf))
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    spans = zip(itertools.pairwise(starts_q), itertools.pairwise(starts_k), strict=True)
    for (q0, q1), (k0, k1) in spans:
        if q1 > q0:
            # Bottom-right aligned: the last query sees the last key.
            offset = (k1 - k0) - (q1 - q0) if causal else None
            out[q0:q1], lse[q0:q1] = attend(q[q0:q1], k[k0:k1], v[k0:k1], scale, offset)
    return out, lse


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
    out, lse = mla_prefill(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal
    )
    outputs[0].copy_(out)
    outputs[1].copy_(lse)
