"""The blocks of an expert layer: which tokens meet which expert's weights, without asking the host.

The (token, choice) pairs, numbered t * K + k and called slots, are sorted by expert; each expert's
are cut into blocks of at most TOKENS. As the host cannot know how many blocks that gives, the grid
has as many as there can be, and the unused ones are marked empty::

    slots    0 . . . . | 1 . | 3 . . | ...        sorted by expert, stable; foreign ids are left out
    blocks   [0: 4][0: 1][1: 2][3: 3][    ][    ]  TOKENS = 4; expert, start in slots, count

An expert's first block follows from the slots before it alone, so that one program per expert
writes the tables with no help from the others: as the slot itself where that takes no more blocks
(few slots), else as expert + slot / TOKENS, which leaves every expert enough room.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_ops.kernels import _int4

TABLES = tl.constexpr(3)  # of blocks: expert, start, count; [TABLES, blocks]


def tables(slots: int, blocks: int, device: torch.device) -> Tensor:
    """Room for the slots, the tables of blocks and the factor of `_int4.planes`, all int32."""
    return torch.empty(slots + TABLES.value * blocks + 1, dtype=torch.int32, device=device)


@triton.jit
def write_blocks(
    expert,  # program's
    experts,
    ids_ptr,  # [T, K]
    stride_ids_t,
    stride_ids_k,
    slot_count,
    K,
    first,  # expert of the model that is expert 0 here
    tables_ptr,
    blocks,
    TOKENS: tl.constexpr,
    BY_SLOT: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Sorts in the slots of one expert and writes its blocks."""
    BLOCK_B: tl.constexpr = 128
    mine = tl.cast(first, tl.int64) + expert
    offs_s = tl.arange(0, BLOCK_S)
    before = tl.zeros([BLOCK_S], tl.int32)
    count = tl.zeros([BLOCK_S], tl.int32)
    for s0 in range(0, slot_count, BLOCK_S):
        s = (s0 + offs_s).to(tl.int64)
        mask_s = s < slot_count
        ids = tl.load(ids_ptr + s // K * stride_ids_t + s % K * stride_ids_k, mask=mask_s, other=0)
        ids = ids.to(tl.int64)
        before += (mask_s & (ids >= first) & (ids < mine)).to(tl.int32)
        count += (mask_s & (ids == mine)).to(tl.int32)
    start = tl.sum(before, 0)
    total = tl.sum(count, 0)
    if total > 0:
        at = start
        for s0 in range(0, slot_count, BLOCK_S):
            s = (s0 + offs_s).to(tl.int64)
            mask_s = s < slot_count
            ids = tl.load(
                ids_ptr + s // K * stride_ids_t + s % K * stride_ids_k, mask=mask_s, other=0
            )
            hit = (mask_s & (ids.to(tl.int64) == mine)).to(tl.int32)
            tl.store(tables_ptr + at + tl.cumsum(hit, 0) - 1, s.to(tl.int32), mask=hit > 0)
            at += tl.sum(hit, 0)
    if BY_SLOT:
        block = start
        end = start + total
    else:
        block = expert + start // TOKENS
        end = expert + 1 + (start + total) // TOKENS
    if expert == experts - 1:
        end = blocks
    for b0 in range(block, end, BLOCK_B):
        offs_b = b0 + tl.arange(0, BLOCK_B)  # [BLOCK_B]
        mask_b = offs_b < end
        done = (offs_b - block) * TOKENS
        b_ptrs = tables_ptr + slot_count + offs_b
        tl.store(b_ptrs, tl.zeros([BLOCK_B], tl.int32) + expert, mask=mask_b)
        tl.store(b_ptrs + blocks, start + done, mask=mask_b)
        size = tl.minimum(tl.maximum(total - done, 0), TOKENS)
        tl.store(b_ptrs + 2 * blocks, size, mask=mask_b)
    if expert == 0:
        tl.store(tables_ptr + slot_count + TABLES * blocks, _int4.SHIFT)


@triton.jit
def read_block(tables_ptr, slot_count, blocks, block):
    """A block's expert (int64), first slot and number of slots; 0 slots: nothing to do."""
    b_ptr = tables_ptr + slot_count + block
    expert = tl.load(b_ptr).to(tl.int64)
    return expert, tl.load(b_ptr + blocks), tl.load(b_ptr + 2 * blocks)


@triton.jit
def read_shift(tables_ptr, slot_count, blocks):
    """`_int4.SHIFT` as `_int4.planes` wants it."""
    return tl.load(tables_ptr + slot_count + TABLES * blocks + tl.zeros([1, 1], tl.int32))
