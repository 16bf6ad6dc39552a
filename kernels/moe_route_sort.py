"""Triton kernels of `kimi_ops.moe_route_sort`: those of `moe_route`, and tables of what it chose.

    T <= 64    one launch: the program that selects last sorts (`_moe_route_sort`)
    T > 64     the launches of `moe_route`, then that of `moe_sort`; so in batch-invariant mode

Bytes: those of `moe_route`, and 8 T K + 4 E_local for the ids once more and the tables.

Source: as `moe_route` and `moe_sort`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kimi_ops import _target
from kimi_ops.kernels import moe_route, moe_sort

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
    if torch.float64 in (x.dtype, gate_weight.dtype):
        return "moe_route_sort in Triton computes in float32; x or gate_weight is float64"
    return None


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
    sort = order, offsets, first, end - first
    if not moe_route.route(
        (weights, ids), x, gate_weight, bias, n_group, topk_group, scale, normalize, sort
    ):
        moe_sort.launch((order, offsets), ids, experts, expert_range)


def static_cases() -> Iterable[Any]:
    """Kimi K2.5 in each of the two kernels that sort: 1 and 64 tokens."""
    from kimi_ops.testing.devices import ARCHES
    from kimi_ops.testing.static import StaticCase

    cuda = tuple(arch for arch in ARCHES if arch.startswith("sm"))
    for tokens in (1, 64):
        for gpu, arches in (
            (_target.Target("cuda", 90, 132, 232448), cuda),
            (_target.Target("hip", 942, 304, 65536), ("gfx942",)),
        ):
            x = torch.empty(tokens, 7168, dtype=torch.bfloat16, device="meta")
            gate = torch.empty(384, 7168, dtype=torch.bfloat16, device="meta")
            weights, bias = torch.empty(tokens, 8, device="meta"), torch.empty(384, device="meta")
            ids = torch.empty(tokens, 8, dtype=torch.int32, device="meta")
            sort = ids.flatten(), torch.empty(385, dtype=torch.int32, device="meta"), 0, 384
            with _target.targeting(gpu):
                call = moe_route.plan((weights, ids), x, gate, bias, 1, 1, 2.827, True, sort)
            name = f"{tokens}_tokens_{gpu.vendor}"
            yield StaticCase.of_call(
                name, call.kernel, call.arguments, arches=arches, **call.options
            )
