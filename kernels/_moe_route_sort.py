"""The tables of `moe_sort` for few tokens, by the program of `moe_route` that selects last.

    pairs    t K + k                 3 0 3 1        keys: bucket * BLOCK_S + pair, all different,
    sorted   keys % BLOCK_S          1 3 0 2        so that any sort of them is a stable one
    offsets  sums of a histogram     0 1 2 2 4

A pair's bucket is the number of its local expert, or the one behind the last.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

GROUPS = tl.constexpr(8)  # of tokens that a launch counts at most; the next counter counts them


@triton.jit
def is_last(counter_ptr, programs):
    """Whether all other programs have stored what they had to; leaves the counter at 0."""
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.atomic_xchg(counter_ptr, 0, sem="relaxed", scope="gpu")
    return last


@triton.jit
def sort_pairs(
    ids_ptr,  # [T, K], contiguous
    order_ptr,  # [T K]
    offsets_ptr,  # [local + 1]
    pairs,  # T K
    first,  # expert of the model that is local expert 0
    local,
    BLOCK_S: tl.constexpr,  # at least the pairs
    BLOCK_L: tl.constexpr,  # at least local + 2
):
    """Sorts what this program can see of the ids: behind a barrier, all that it waited for."""
    offs_s = tl.arange(0, BLOCK_S)
    mask_s = offs_s < pairs
    expert = tl.load(ids_ptr + offs_s, mask=mask_s, other=0) - first
    bucket = tl.where((expert >= 0) & (expert < local), expert, local)
    bucket = tl.where(mask_s, bucket, local + 1)
    keys = tl.sort(bucket * BLOCK_S + offs_s)
    tl.store(order_ptr + offs_s, keys % BLOCK_S, mask=mask_s)
    count = tl.histogram(bucket, BLOCK_L)
    offs_l = tl.arange(0, BLOCK_L)
    tl.store(offsets_ptr + offs_l, tl.cumsum(count, 0) - count, mask=offs_l <= local)


def arguments(
    order: Tensor | None, offsets: Tensor | None, first: int, local: int
) -> dict[str, Any]:
    """Arguments of a kernel that can sort; without tables, of one that does not."""
    pairs = 0 if order is None else order.numel()
    return {
        "order_ptr": order,
        "offsets_ptr": offsets,
        "first": first,
        "local": local,
        "BLOCK_S": max(triton.next_power_of_2(pairs), 32) if pairs else 0,
        "BLOCK_L": triton.next_power_of_2(local + 2),
    }
