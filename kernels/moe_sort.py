"""Triton kernel of `kimi_ops.moe_sort`: pairs by expert, stable, one launch at every size.

    order = pairs t K + k of expert 0, ascending | of expert 1 | .. | of no local expert
    offsets[e] = where expert e starts

Grid: ``(E_local + 1,)``, a program per expert and one for the pairs of no local expert. Nothing is
exchanged between programs: each reads all ids, counts those that come before its own, and that is
where it writes::

    ids      3 0 1 3 | 0 9 1 0        program 1:  before: 0 0 0 = 3,  mine: 2 and 6
    order    1 4 7 | 2 6 | 0 3 | 5    program 1:  order[3:5] = 2 6,  offsets[1] = 3

Bytes: 4 T K from memory once, the rest, 4 T K times twice the programs, from L2; 4 T K out. Work
grows with E T K: nothing at decode, and at 8,192 tokens x 8 choices x 384 experts 25 million
comparisons twice, where a histogram with a scan and a scatter would take three launches. Ids that
are not contiguous are addressed by their strides, at a division for each.

Numerics: integers; no atomics, so the order is the same from run to run.

Source: the grouped-GEMM bookkeeping of every MoE engine; no published definition.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BATCH_INVARIANT = True  # integers, and nothing else that they could be


class Tile(NamedTuple):
    """Pairs of a step, and warps."""

    S: int
    warps: int


# Pairs up to -> tile. A step is one 16-byte load for each thread; few pairs fit one warp, whose
# sums need no shared memory.
_TILES = {128: Tile(128, 1), 512: Tile(512, 4)}
_LARGEST = Tile(2048, 4)


def tile_for(pairs: int) -> Tile:
    """The tile for a number of pairs."""
    return next((tile for most, tile in _TILES.items() if pairs <= most), _LARGEST)


@triton.jit
def _load_ids(
    ids_ptr, s0, slots, stride_ids_t, stride_ids_k,
    K: tl.constexpr, PACKED: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Pairs from s0 on, which of them there are, and their ids."""
    offs_s = s0 + tl.arange(0, BLOCK_S)  # [BLOCK_S]
    mask_s = offs_s < slots
    if PACKED:
        offs = offs_s.to(tl.int64)
    else:
        offs = (offs_s // K).to(tl.int64) * stride_ids_t + (offs_s % K).to(tl.int64) * stride_ids_k
    return offs_s, mask_s, tl.load(ids_ptr + offs, mask=mask_s, other=-1)


@triton.jit
def moe_sort_kernel(
    ids_ptr,  # [T, K]
    order_ptr,  # [T K]
    offsets_ptr,  # [E_local + 1]
    slots,  # T K
    first,  # expert of the model that is expert 0 here
    end,  # behind the last one
    stride_ids_t,
    stride_ids_k,
    K: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    mine = first + tl.program_id(0)  # end: those of no local expert
    before = tl.zeros([BLOCK_S], tl.int32)
    for s0 in range(0, slots, BLOCK_S):
        _, mask_s, ids = _load_ids(
            ids_ptr, s0, slots, stride_ids_t, stride_ids_k, K, PACKED, BLOCK_S
        )
        before += (mask_s & (ids >= first) & (ids < mine)).to(tl.int32)
    start = tl.sum(before, 0)
    tl.store(offsets_ptr + tl.program_id(0), start)

    for s0 in range(0, slots, BLOCK_S):
        offs_s, mask_s, ids = _load_ids(
            ids_ptr, s0, slots, stride_ids_t, stride_ids_k, K, PACKED, BLOCK_S
        )
        foreign = (ids < first) | (ids >= end)
        hit = mask_s & tl.where(mine == end, foreign, ids == mine)
        rank = tl.cumsum(hit.to(tl.int32), 0)
        tl.store(order_ptr + (start + rank - 1).to(tl.int64), offs_s, mask=hit)
        start += tl.sum(hit.to(tl.int32), 0)


def _arguments(
    order: Tensor,
    offsets: Tensor,
    ids: Tensor,
    num_experts: int,
    expert_range: Sequence[int] | None,
) -> tuple[dict[str, Any], Tile]:
    first, end = (0, num_experts) if expert_range is None else expert_range
    tile = tile_for(ids.numel())
    arguments = {
        "ids_ptr": ids,
        "order_ptr": order,
        "offsets_ptr": offsets,
        "slots": ids.numel(),
        "first": first,
        "end": end,
        "stride_ids_t": ids.stride(0),
        "stride_ids_k": ids.stride(1),
        "K": ids.shape[1],
        "PACKED": ids.is_contiguous(),
        "BLOCK_S": tile.S,
    }
    return arguments, tile


def unsupported(ids: Tensor, num_experts: int, expert_range: Sequence[int] | None) -> str | None:
    if ids.numel() > 2**31 - 1 - _LARGEST.S:
        return f"moe_sort in Triton numbers its pairs in int32, got {ids.numel()} of them"
    if num_experts >= 2**31 - 1:
        return f"moe_sort in Triton numbers experts in int32, got {num_experts} of them"
    return None


def launch(
    outputs: tuple[Tensor, Tensor],
    ids: Tensor,
    num_experts: int,
    expert_range: Sequence[int] | None,
) -> None:
    arguments, tile = _arguments(*outputs, ids, num_experts, expert_range)
    moe_sort_kernel[(outputs[1].numel(),)](**arguments, num_warps=tile.warps)


def static_cases() -> Iterable[Any]:
    """Every tile for ids in one piece, and one for ids with strides."""
    from kimi_ops.testing.static import StaticCase

    for tokens, packed in ((1, True), (64, True), (4096, True), (4096, False)):
        ids = torch.empty(tokens, 8 if packed else 16, dtype=torch.int32, device="meta")[:, :8]
        order = torch.empty(tokens * 8, dtype=torch.int32, device="meta")
        offsets = torch.empty(385, dtype=torch.int32, device="meta")
        arguments, tile = _arguments(order, offsets, ids, 384, None)
        name = f"{tokens}_tokens" + ("" if packed else "_strided")
        yield StaticCase.of_call(name, moe_sort_kernel, arguments, num_warps=tile.warps)
