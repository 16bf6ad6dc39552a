"""Backward of softmax attention within segments: long ones tile by tile, short ones together.

With the scores ``S = scale q k^T``, ``P = exp(S - lse)`` and the output ``out = P v``::

    dv = P^T dout
    dS = P * (dout v^T - delta),   delta = sum(dout * out) - dlse
    dq = scale dS k,   dk = scale dS^T q

P is computed again from ``lse``, a tile of queries and keys at a time: memory grows with the
number of queries plus that of keys, not with their product. Segments that fit into a tile are
padded to the longest of several and share one product.

Source: FlashAttention-2, arXiv 2307.08691, algorithm 2.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from kimi_ops.reference import widen

_Segment: TypeAlias = tuple[slice, slice]  # rows of the queries and of the keys
_QUERIES, _KEYS = 256, 1024  # of a tile: 64 heads are 64 MiB in float32
_SCORES = 2**18  # of short segments that are taken together, over all heads: 1 MiB in float32


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


def segment_gradients(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    cu_seqlens_q: Sequence[int],
    cu_seqlens_k: Sequence[int],
    scale: float,
    causal: bool,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """`attention_gradients` of packed segments, written into ``gradients``; other rows become 0.

    Tensors as in `attention_gradients`, all segments one after the other; segment b has the rows
    ``cu_seqlens_q[b] .. cu_seqlens_q[b + 1]`` and attends to the same of the keys. ``causal`` is
    bottom-right aligned: the last query sees the last key. Without ``lse`` it is computed first.
    """
    for gradient in gradients:
        gradient.zero_()
    spans = zip(pairwise(cu_seqlens_q), pairwise(cu_seqlens_k), strict=True)
    segments = [(slice(*n), slice(*m)) for n, m in spans]
    for n, m in itertools.filterfalse(_fits_a_tile, segments):
        offset = _rows(m) - _rows(n) if causal else None
        row = None if dlse is None else dlse[n]
        top = log_sum_exp(q[n], k[m], scale, offset) if lse is None else lse[n]
        found = attention_gradients(dout[n], row, q[n], k[m], v[m], out[n], top, scale, offset)
        for gradient, rows, value in zip(gradients, (n, m, m), found, strict=True):
            gradient[rows] = value
    for group in _groups([*filter(_fits_a_tile, segments)], q.shape[1]):
        _together(dout, dlse, q, k, v, out, lse, group, scale, causal, gradients)


def _rows(span: slice) -> int:
    return int(span.stop - span.start)


def _fits_a_tile(segment: _Segment) -> bool:
    return _rows(segment[0]) <= _QUERIES and _rows(segment[1]) <= _KEYS


def _groups(segments: list[_Segment], heads: int) -> Iterator[list[_Segment]]:
    """Segments of similar length, as many as have `_SCORES` scores with their padding."""
    group: list[_Segment] = []
    widest = 0
    for segment in sorted(segments, key=lambda s: (_rows(s[0]), _rows(s[1]))):
        if not (_rows(segment[0]) and _rows(segment[1])):
            continue
        wider = max(widest, _rows(segment[1]))
        if group and (len(group) + 1) * heads * _rows(segment[0]) * wider > _SCORES:
            yield group
            group, wider = [], _rows(segment[1])
        group.append(segment)
        widest = wider
    if group:
        yield group


def _together(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    group: list[_Segment],
    scale: float,
    causal: bool,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """`attention_gradients` of a group of segments, each padded to the longest."""
    rows, lacking_q = _padded([n for n, _ in group], q.device)
    keys, lacking_k = _padded([m for _, m in group], q.device)

    def batch(x: Tensor, index: Tensor) -> Tensor:
        """``[B*H, n, W]`` of the segments' rows."""
        return widen(x[index]).transpose(1, 2).flatten(0, 1)

    def rows_of(x: Tensor, lacking: Tensor) -> Tensor:
        """Back to the segments' rows, without the padding."""
        rows: Tensor = x.unflatten(0, (len(group), -1)).transpose(1, 2)[~lacking]
        return rows

    queries, dy = batch(q, rows), batch(dout, rows)
    k_, v_ = batch(k, keys), batch(v, keys)
    delta = (dy * batch(out, rows)).sum(-1, keepdim=True)
    if dlse is not None:
        delta -= batch(dlse[..., None], rows)
    hidden = lacking_q[:, :, None] | lacking_k[:, None]
    if causal:
        i = torch.arange(rows.shape[1], device=q.device)[:, None]
        j = torch.arange(keys.shape[1], device=q.device)
        offset = torch.tensor([_rows(m) - _rows(n) for n, m in group], device=q.device)
        hidden = hidden | (j > i + offset[:, None, None])
    score = torch.bmm(queries, k_.mT).mul_(scale)

    def mask(x: Tensor, value: float) -> None:
        """One mask for all heads."""
        x.unflatten(0, (len(group), -1)).masked_fill_(hidden[:, None], value)

    if lse is None:
        mask(score, -torch.inf)
        top = score.logsumexp(-1, keepdim=True)
    else:
        top = batch(lse[..., None], rows)
    p = score.sub_(top.masked_fill(top == -torch.inf, torch.inf)).exp_()
    mask(p, 0)  # only here: e^-inf takes ten times as long on a CPU as another exponential
    ds = torch.bmm(dy, v_.mT).sub_(delta).mul_(p).mul_(scale)
    flat = torch.cat([torch.arange(n.start, n.stop) for n, _ in group]).to(q.device)
    flat_k = torch.cat([torch.arange(m.start, m.stop) for _, m in group]).to(q.device)
    dq, dk, dv = gradients
    dq[flat] = rows_of(torch.bmm(ds, k_), lacking_q).to(dq.dtype)
    dk[flat_k] = rows_of(torch.bmm(ds.mT, queries), lacking_k).to(dk.dtype)
    dv[flat_k] = rows_of(torch.bmm(p.mT, dy), lacking_k).to(dv.dtype)


def _padded(spans: list[slice], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of each segment ``[B, longest]``, the last one repeated, and which are such padding."""
    first = torch.tensor([span.start for span in spans])[:, None]
    count = torch.tensor([_rows(span) for span in spans])[:, None]
    place = torch.arange(int(count.max()))
    index = first + torch.minimum(place, count - 1)
    return index.to(device), (place >= count).to(device)
