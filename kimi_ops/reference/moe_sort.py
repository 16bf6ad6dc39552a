"""Reference of `moe_sort`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kimi_ops.reference import runs_anything as unsupported

__all__ = ["launch", "moe_sort", "unsupported"]


def moe_sort(
    ids: Tensor, num_experts: int, expert_range: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    first, last = expert_range or (0, num_experts)
    local = ids.flatten() - first
    local = torch.where((local >= 0) & (local < last - first), local, last - first)
    by_expert, order = local.sort(stable=True)
    experts = torch.arange(last - first + 1, device=ids.device, dtype=by_expert.dtype)
    return order.int(), torch.searchsorted(by_expert, experts).int()


def launch(
    outputs: tuple[Tensor, Tensor],
    ids: Tensor,
    num_experts: int,
    expert_range: Sequence[int] | None,
) -> None:
    order, offsets = moe_sort(ids, num_experts, expert_range)
    outputs[0].copy_(order)
    outputs[1].copy_(offsets)
