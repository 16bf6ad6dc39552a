"""Full attention within each of several packed pictures or clips."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops._dispatch import define_op


def outputs(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


_op = define_op(
    "vision_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen,"
    " float scale) -> Tensor",
    checks={
        "q": "[L, H, head_dim] float",
        "k": "[L, H, head_dim] like q",
        "v": "[L, H, head_dim] like q",
        "cu_seqlens": "[n+1] int32",
        "max_seqlen": "max_seqlen >= 0",
    },
    outputs=outputs,
)


def vision_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> Tensor:
    """``softmax(scale * q k^T) v`` within each of n segments, not causal.

    Args:
        q: ``[L, H, head_dim]`` bfloat16, float16, float32 or float64, any strides; 16 heads of 72
            in Kimi K2.5.
        k: ``[L, H, head_dim]``, dtype of ``q``.
        v: ``[L, H, head_dim]``, dtype of ``q``.
        cu_seqlens: ``[n+1]`` int32, ascending offsets of the segments, first 0, last at most L;
            empty ones allowed. Other offsets give undefined numbers.
        max_seqlen: at least the longest segment, a host integer.
        scale: of the scores, ``head_dim**-0.5`` in Kimi K2.5.

    Returns:
        ``[L, H, head_dim]`` contiguous, dtype of ``q``; rows past the last segment are 0.

    Raises:
        ValueError, TypeError: a shape, dtype or device other than stated.

    Gradients: to ``q``, ``k`` and ``v``; memory linear in the tokens.

    Source: FlashAttention-2, arXiv 2307.08691; MoonViT-3D in arXiv 2602.02276.
    """
    out: Tensor = _op(q, k, v, cu_seqlens, max_seqlen, scale)
    return out
