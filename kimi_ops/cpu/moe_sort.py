"""Launches `csrc/cpu/moe_sort.cpp`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kimi_ops import _native
from kimi_ops.cpu._support import dense_rows

BATCH_INVARIANT = True  # integers, and nothing else that they could be


def unsupported(ids: Tensor, num_experts: int, expert_range: Sequence[int] | None) -> str | None:
    if ids.numel() > 2**31 - 1:
        return f"moe_sort on the CPU numbers its pairs in int32, got {ids.numel()} of them"
    return None


def launch(
    outputs: tuple[Tensor, Tensor],
    ids: Tensor,
    num_experts: int,
    expert_range: Sequence[int] | None,
) -> None:
    order, offsets = outputs
    first, end = (0, num_experts) if expert_range is None else expert_range
    top_k = ids.shape[1]
    ids, rows = dense_rows(ids)
    _native.call(
        "moe_sort",
        order=order,
        offsets=offsets,
        ids=ids,
        rows_ids=rows,
        tokens=rows.total,
        top_k=top_k,
        first=first,
        local=end - first,
    )
