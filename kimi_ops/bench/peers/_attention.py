"""What torch's ways to do attention share: segments, masks and the pages of a latent cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kimi_ops.bench.case import Args
from kimi_ops.bench.peers import Declined, Prepare, Prepared
from kimi_ops.bench.peers._experts import made_once
from kimi_ops.quant import latent_fp8

SCORE_BYTES = 2 << 30  # of one segment, in float32
Span = tuple[int, int]  # where a segment starts and ends in a packed tensor


def cached_keys(
    kv_cache: Tensor, page_table: Tensor, lengths: Sequence[int], dtype: torch.dtype, rank: int
) -> list[tuple[slice, Callable[[], Tensor]]]:
    """Sequences of equal length side by side, and what gives their keys ``[n, length, C+R]``.

    Keys are gathered from their pages in each call, or seen in place where the pages are in order;
    a cache in fp8 is unpacked in each call.
    """
    page = kv_cache.shape[1]

    def keys(rows: slice, length: int) -> Callable[[], Tensor]:
        table = page_table[rows, : -(-length // page)]
        first = int(table[0, 0]) if table.numel() else 0
        ids = torch.arange(first, first + table.numel(), device=table.device)
        in_order = torch.equal(table.flatten(), ids.to(table.dtype))

        def gather() -> Tensor:
            pages = kv_cache[first : first + table.numel()] if in_order else kv_cache[table.long()]
            kv = pages.view(len(table), table.shape[1] * page, kv_cache.shape[2])[:, :length]
            return latent_fp8.unpack(kv, rank, dtype) if kv.dtype == torch.uint8 else kv

        return gather

    found, start = [], 0
    for length, group in itertools.groupby(max(n, 0) for n in lengths):
        rows = slice(start, start + len(list(group)))
        found.append((rows, keys(rows, length)))
        start = rows.stop
    return found


def hidden_keys(queries: int, keys: int, device: torch.device) -> Tensor:
    """``[queries, keys]`` bool: what a query must not see, bottom-right aligned."""
    every = torch.ones((queries, keys), dtype=torch.bool, device=device)
    return every.triu(keys - queries + 1)


def latent_attention(
    calls: Sequence[Args], attend: Callable[[Tensor, Tensor, float, int], Tensor]
) -> Prepared:
    """``run`` of decode attention, ``attend(q [n, S, H, C+R], kv [n, T, C+R], scale, C)`` given."""
    ranks = [call[5] if len(call) > 5 else 512 for call in calls]
    keys = [
        cached_keys(call[1], call[2], call[3].tolist(), call[0].dtype, rank)
        for call, rank in zip(calls, ranks, strict=True)
    ]

    def run(i: int) -> Tensor:
        q, scale = calls[i][0], calls[i][4]
        outs = [attend(q[rows], gather(), scale, ranks[i]) for rows, gather in keys[i]]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    return run


def projection(calls: Sequence[Args], place: int) -> Callable[[int, Tensor], Tensor]:
    """``project(i, out [T, H, C])`` by the weights ``[H, V, C]`` at a place of the arguments, which
    are laid out for a batched product once, as engines do at load."""
    weights = made_once(calls, place, lambda call: call[place].mT.contiguous())
    return lambda i, out: torch.bmm(out.transpose(0, 1), weights[i]).transpose(0, 1)


def with_value(decode: Prepare) -> Prepare:
    """`mla_decode_value` from a way to do `mla_decode`."""

    def prepare(calls: Sequence[Args]) -> Prepared:
        attend = decode([(*call[:4], *call[5:]) for call in calls])
        project = projection(calls, 4)

        def run(i: int) -> Tensor:
            out = attend(i)
            value = project(i, out.flatten(0, 1))
            return value.view(*out.shape[:2], *value.shape[1:])

        return run

    return prepare


def spans(offsets_q: Tensor, offsets_k: Tensor) -> list[tuple[Span, Span]]:
    """Per segment, its queries and its keys; those without either are left out."""
    pairs = zip(*(itertools.pairwise(at.tolist()) for at in (offsets_q, offsets_k)), strict=True)
    return [(q, k) for q, k in pairs if q[1] > q[0] and k[1] > k[0]]


def sizes(segments: Sequence[list[tuple[Span, Span]]]) -> set[Span]:
    """The pairs (queries, keys) that occur."""
    return {(q1 - q0, k1 - k0) for call in segments for (q0, q1), (k0, k1) in call}


def check_scores(heads: int, occurring: set[Span]) -> None:
    """Raises `Declined` where a matrix of scores would be too large."""
    n, m = max(occurring, key=lambda size: size[0] * size[1], default=(0, 0))
    if (wanted := 4 * heads * n * m) > SCORE_BYTES:
        text = f"the scores of {heads} heads, {n:,} x {m:,}, would take {wanted / 2**30:.1f} GiB"
        raise Declined(f"{text}, the limit is {SCORE_BYTES >> 30} GiB")
