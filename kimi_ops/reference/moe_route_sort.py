"""Reference of `moe_route_sort`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kimi_ops.reference import runs_anything as unsupported
from kimi_ops.reference.moe_route import moe_route
from kimi_ops.reference.moe_sort import moe_sort

__all__ = ["launch", "moe_route_sort", "unsupported"]


def moe_route_sort(
    x: Tensor,
    gate_weight: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    scale: float = 1.0,
    normalize: bool = True,
    expert_range: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    routed = moe_route(x, gate_weight, bias, top_k, n_group, topk_group, scale, normalize)
    return *routed, *moe_sort(routed[1], len(gate_weight), expert_range)


def launch(outputs: tuple[Tensor, ...], *args: Any) -> None:
    for output, found in zip(outputs, moe_route_sort(*args), strict=True):
        output.copy_(found)
