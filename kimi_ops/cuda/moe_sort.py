"""Launches `csrc/cuda/moe_sort.cu`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kimi_ops.cuda._launcher import launch_kernel
from kimi_ops.cuda._support import refusal

BATCH_INVARIANT = True  # integers, and nothing else that they could be
_MOST_WARPS = 16
_PAIRS_OF_WARP = 128  # a step; with more a block takes more warps
_ROOM = _MOST_WARPS * 128  # pairs past the last one that a block counts to


def unsupported(ids: Tensor, num_experts: int, expert_range: Sequence[int] | None) -> str | None:
    if ids.numel() > 2**31 - 1 - _ROOM:
        return f"moe_sort in CUDA C++ numbers its pairs in int32, got {ids.numel()} of them"
    if num_experts >= 2**31 - 1:
        return f"moe_sort in CUDA C++ numbers experts in int32, got {num_experts} of them"
    return refusal("moe_sort", ids, (torch.int32,))


def launch(
    outputs: tuple[Tensor, Tensor],
    ids: Tensor,
    num_experts: int,
    expert_range: Sequence[int] | None,
) -> None:
    order, offsets = outputs
    first, end = (0, num_experts) if expert_range is None else expert_range
    warps = 1
    while warps < _MOST_WARPS and warps * _PAIRS_OF_WARP < ids.numel():
        warps *= 2
    launch_kernel(
        "moe_sort",
        "moe_sort_kernel",
        grid=(end - first + 1,),
        block=(32 * warps,),
        args=[
            ids, order, offsets, ids.numel(), first, end - first, ids.shape[1], *ids.stride(),
            int(ids.is_contiguous()),
        ],
    )  # fmt: skip
