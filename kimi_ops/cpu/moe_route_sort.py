"""Launches `csrc/cpu/moe_route.cpp` so that it sorts too."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kimi_ops.cpu import moe_route

BATCH_INVARIANT = True  # as the router; the tables are of the batch, whatever made them


def unsupported(
    x: Tensor,
    gate_weight: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    scale: float,
    normalize: bool,
    expert_range: Sequence[int] | None,
) -> str | None:
    if x.shape[0] * top_k > 2**31 - 1:
        return f"moe_route_sort on the CPU numbers its pairs in int32, got {x.shape[0] * top_k}"
    reason = moe_route.unsupported(
        x, gate_weight, bias, top_k, n_group, topk_group, scale, normalize
    )
    return None if reason is None else reason.replace("moe_route", "moe_route_sort", 1)


def launch(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    x: Tensor,
    gate_weight: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    scale: float,
    normalize: bool,
    expert_range: Sequence[int] | None,
) -> None:
    weights, ids, order, offsets = outputs
    first, end = (0, gate_weight.shape[0]) if expert_range is None else expert_range
    moe_route.route(
        weights,
        ids,
        x,
        gate_weight,
        bias,
        top_k,
        n_group,
        topk_group,
        scale,
        normalize,
        moe_route.Tables(order, offsets, first, end - first),
    )
