"""Backward of softmax attention within one segment, tile by tile.

With the scores ``S = scale q k^T``, ``P = exp(S - lse)`` and the output ``out = P v``::

    dv = P^T dout
    dS = P * (dout v^T - delta),   delta = sum(dout * out) - dlse
    dq = scale dS k,   dk = scale dS^T q

P is computed again from ``lse``, a tile of queries and keys at a time: memory grows with the
number of queries plus that of keys, not with their product.

Source: FlashAttention-2, arXiv 2307.08691, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kimi_ops.reference import widen

_QUERIES, _KEYS = 256, 1024  # of a tile: 64 heads are 64 MiB in float32


def _scores(
    q: Tensor, k: Tensor, scale: float, offset: int | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Tiles ``[H, queries, keys]`` of the scores and where they lie; those all masked are left out.

    Query i sees key j where ``j <= i + offset``; all keys if ``offset`` is None.
    """
    for start in range(0, len(q), _QUERIES):
        queries = slice(start, min(start + _QUERIES, len(q)))
        seen = len(k) if offset is None else min(len(k), queries.stop + offset)
        for first in range(0, seen, _KEYS):
            keys = slice(first, min(first + _KEYS, seen))
            score = torch.einsum("nhw,mhw->hnm", q[queries], k[keys]) * scale
            if offset is not None:
                i = torch.arange(queries.start, queries.stop, device=q.device)[:, None]
                j = torch.arange(keys.start, keys.stop, device=q.device)
                score = score.masked_fill(j > i + offset, -torch.inf)
            yield queries, keys, score


def log_sum_exp(q: Tensor, k: Tensor, scale: float, offset: int | None = None) -> Tensor:
    """``lse [n, H]`` of ``q [n, H, W]`` over ``k [m, H, W]``, float32 or float64."""
    q, k = widen(q), widen(k)
    lse = q.new_full(q.shape[:2], -torch.inf)
    for queries, _, score in _scores(q, k, scale, offset):
        lse[queries] = torch.logaddexp(lse[queries], score.logsumexp(-1).T)
    return lse


def attention_gradients(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    offset: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq [n, H, W]``, ``dk [m, H, W]`` and ``dv [m, H, V]``, float32 or float64.

    ``dout`` and ``out [n, H, V]``, ``dlse`` (None for zeros) and ``lse [n, H]``. A query without
    keys, whose lse is -inf, has no gradient and gives none.
    """
    q, k, v, dout = widen(q), widen(k), widen(v), widen(dout)
    delta = (dout * out).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    delta, lse = delta.T[..., None], lse.T[..., None]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for queries, keys, score in _scores(q, k, scale, offset):
        row = lse[:, queries]
        p = (score - row).exp().masked_fill(row == -torch.inf, 0)
        dv[keys] += torch.einsum("hnm,nhv->mhv", p, dout[queries])
        dp = torch.einsum("nhv,mhv->hnm", dout[queries], v[keys])
        ds = p * (dp - delta[:, queries]) * scale
        dq[queries] += torch.einsum("hnm,mhw->nhw", ds, k[keys])
        dk[keys] += torch.einsum("hnm,nhw->mhw", ds, q[queries])
    return dq, dk, dv
