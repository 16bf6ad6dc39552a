"""Softmax attention of one segment, with its log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops.reference import widen

_QUERIES_AT_ONCE = 1024  # bounds the score matrix: 16 heads x 1024 x 16,384 keys is 1 GiB


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, offset: int | None
) -> tuple[Tensor, Tensor]:
    """Attention of ``q [n, H, W]`` over ``k [m, H, W]`` and ``v [m, H, V]``.

    Query i sees key j where ``j <= i + offset``; all keys if ``offset`` is None. Returns
    ``out [n, H, V]`` and ``lse [n, H]`` (float32 or float64); a query without keys has out 0 and
    lse -inf.
    """
    outs, lses, wide_k = [], [], widen(k)
    for start in range(0, len(q), _QUERIES_AT_ONCE):
        block = q[start : start + _QUERIES_AT_ONCE]
        score = torch.einsum("nhw,mhw->hnm", widen(block), wide_k) * scale
        if offset is not None:
            i = torch.arange(start, start + len(block), device=q.device)[:, None]
            j = torch.arange(len(k), device=q.device)
            score = score.masked_fill(j > i + offset, -torch.inf)
        lse = score.logsumexp(-1)
        weight = (score - lse[..., None]).exp().masked_fill((lse == -torch.inf)[..., None], 0)
        outs.append(torch.einsum("hnm,mhv->nhv", weight.to(v.dtype), v))
        lses.append(lse.T)
    return torch.cat(outs), torch.cat(lses)
