"""Launches `csrc/cuda/moe_route.cu` so that it sorts too, or `moe_sort.cu` after it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kimi_ops.cuda import moe_route, moe_sort

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
    experts = gate_weight.shape[0]
    first, end = (0, experts) if expert_range is None else expert_range
    sorted_too = moe_route.route(
        (weights, ids),
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
    if not sorted_too:
        moe_sort.launch((order, offsets), ids, experts, expert_range)
