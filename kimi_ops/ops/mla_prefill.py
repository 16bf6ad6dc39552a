"""Un-absorbed attention of packed sequences, with the log-sum-exp for later merging."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops._dispatch import define_op


def outputs(
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
    tokens, heads, _ = q.shape
    out = torch.empty((tokens, heads, v.shape[2]), dtype=q.dtype, device=q.device)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, torch.empty((tokens, heads), dtype=lse_dtype, device=q.device)


_op = define_op(
    "mla_prefill(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
    " SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, bool causal=True)"
    " -> (Tensor, Tensor)",
    checks={
        "q": "[T, H, N+R] float",
        "k": "[L, H, N+R] like q",
        "v": "[L, H, V] like q",
        "cu_seqlens_q": "[B+1] int32",
        "cu_seqlens_k": "[B+1] int32",
        "max_seqlen_q": "max_seqlen_q >= 0",
        "max_seqlen_k": "max_seqlen_k >= 0",
    },
    outputs=outputs,
)


def mla_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    *,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention within each of B packed sequences; keys may be longer than queries.

    Sequence b has queries ``cu_seqlens_q[b] : cu_seqlens_q[b+1]`` and keys
    ``cu_seqlens_k[b] : cu_seqlens_k[b+1]``, n and m of them. With ``causal`` query i sees the keys
    ``j <= i + m - n`` (bottom-right aligned, as FlashAttention 2.1 and later).

    Args:
        q: ``[T, H, N+R]`` bfloat16, float16, float32 or float64; 192 wide in Kimi K2.5.
        k: ``[L, H, N+R]``, dtype of ``q``.
        v: ``[L, H, V]``, dtype of ``q``; 128 wide in Kimi K2.5. A NaN or infinity in a key or
            value may reach every query of its sequence, also those that must not see it.
        cu_seqlens_q: ``[B+1]`` int32, ascending offsets, first 0, last at most T; empty sequences
            allowed. Other offsets give undefined numbers.
        cu_seqlens_k: ``[B+1]`` int32, likewise, last at most L.
        max_seqlen_q: at least the longest n, a host integer.
        max_seqlen_k: at least the longest m, a host integer.
        scale: of the scores.
        causal: False lets every query see all keys of its sequence.

    Returns:
        ``out [T, H, V]``, dtype of ``q``, and ``lse [T, H]`` float32 (float64 for float64 input),
        natural logarithm. A query without keys, and a row of ``q`` past the last sequence, has
        out 0 and lse -inf.

    Raises:
        ValueError, TypeError: a shape, dtype or device other than stated.

    Gradients: to ``q``, ``k`` and ``v``, from both results; memory linear in the tokens.

    Source: DeepSeek-V2, arXiv 2405.04434 section 2.1; FlashAttention-2, arXiv 2307.08691.
    """
    out, lse = _op(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal)
    return out, lse
