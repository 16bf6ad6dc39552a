"""Reference of `vision_attention`."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from kimi_ops.reference import runs_anything as unsupported
from kimi_ops.reference._attention import attend

__all__ = ["launch", "unsupported", "vision_attention"]


def vision_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> Tensor:
    out = torch.zeros_like(q)
    starts = cu_seqlens.tolist()
    for start, end in itertools.pairwise(starts):
        if end > start:
            part = slice(start, end)
            out[part], _ = attend(q[part], k[part], v[part], scale, offset=None)
    return out


def launch(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> None:
    out.copy_(vision_attention(q, k, v, cu_seqlens, max_seqlen, scale))
