"""Launches `csrc/cpu/mla_absorb_query.cpp`."""

from __future__ import annotations

from torch import Tensor

from kimi_ops import _native
from kimi_ops._batch_invariant import is_batch_invariant
from kimi_ops.cpu._support import dense_last, refusal

BATCH_INVARIANT = True  # then few tokens take the path of many


def unsupported(q: Tensor, w_uk: Tensor, positions: Tensor, inv_freq: Tensor) -> str | None:
    return refusal("mla_absorb_query", q)


def launch(q_latent: Tensor, q: Tensor, w_uk: Tensor, positions: Tensor, inv_freq: Tensor) -> None:
    if q_latent.numel() == 0:
        return
    q, w_uk = dense_last(q), dense_last(w_uk)
    tokens, heads, width = q.shape
    _, nope, rank = w_uk.shape
    _native.call(
        "mla_absorb_query",
        dtype=q.dtype,
        q_latent=q_latent,
        q=q,
        stride_q_t=q.stride(0),
        stride_q_h=q.stride(1),
        w_uk=w_uk,
        stride_w_h=w_uk.stride(0),
        stride_w_n=w_uk.stride(1),
        positions=positions.long().contiguous(),
        inv_freq=inv_freq.contiguous(),
        tokens=tokens,
        heads=heads,
        nope=nope,
        rope=width - nope,
        rank=rank,
        one_path=is_batch_invariant(),
    )
