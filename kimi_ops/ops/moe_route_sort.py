"""The router and, of what it chose, the tables that group the pairs by expert, in one op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kimi_ops._dispatch import define_op
from kimi_ops.ops.moe_select import ROUTER_RULES
from kimi_ops.ops.moe_sort import EXPERT_RANGE_RULE


def outputs(
    x: Tensor,
    gate_weight: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    scale: float,
    normalize: bool,
    expert_range: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, device = x.shape[0], x.device
    first, end = (0, gate_weight.shape[0]) if expert_range is None else expert_range
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weights = torch.empty((tokens, top_k), dtype=dtype, device=device)
    ids = torch.empty((tokens, top_k), dtype=torch.int32, device=device)
    order = torch.empty((tokens * top_k,), dtype=torch.int32, device=device)
    return weights, ids, order, torch.empty((end - first + 1,), dtype=torch.int32, device=device)


_op = define_op(
    "moe_route_sort(Tensor x, Tensor gate_weight, Tensor bias, int top_k, int n_group=1,"
    " int topk_group=1, float scale=1.0, bool normalize=True, int[]? expert_range=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    checks={
        "x": "[T, D] float",
        "gate_weight": "[E, D] float",
        "bias": "[E] float32|float64",
        **ROUTER_RULES,
        "expert_range": EXPERT_RANGE_RULE,
        "expert_range and E": "expert_range is None or expert_range[1] <= E",
    },
    outputs=outputs,
)


def moe_route_sort(
    x: Tensor,
    gate_weight: Tensor,
    bias: Tensor,
    top_k: int,
    *,
    n_group: int = 1,
    topk_group: int = 1,
    scale: float = 1.0,
    normalize: bool = True,
    expert_range: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `moe_route` gives, and what `moe_sort` makes of the ids::

        weights, ids = moe_route(x, gate_weight, bias, top_k, ...)
        order, offsets = moe_sort(ids, E, expert_range=expert_range)

    For grouped GEMMs that want the tables: at decode both are one launch. `moe_experts_int4` takes
    ids and makes its own tables.

    Args:
        x: ``[T, D]`` bfloat16, float16, float32 or float64.
        gate_weight: ``[E, D]``, same choice of dtypes, E at most 1024.
        bias: ``[E]`` float32 or float64.
        top_k, n_group, topk_group, scale, normalize: as `moe_route`.
        expert_range: ``(first, last + 1)`` of the local experts (expert parallelism); all if None.

    Returns:
        ``weights [T, K]`` float32 (float64 for float64 ``x``) and ``ids [T, K]`` int32 as
        `moe_route` gives them; ``order [T*K]`` and ``offsets [E_local + 1]`` int32 as `moe_sort`
        gives them.

    Raises:
        ValueError, TypeError: a shape, dtype, device, number or range other than stated.

    Gradients: none; an argument that requires grad is an error.

    Source: DeepSeek-V3, arXiv 2412.19437 section 2.1.2; the grouped-GEMM bookkeeping of every MoE
    engine.
    """
    weights, ids, order, offsets = _op(
        x, gate_weight, bias, top_k, n_group, topk_group, scale, normalize, expert_range
    )
    return weights, ids, order, offsets
