"""Tables that group the chosen (token, expert) pairs by expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kimi_ops._dispatch import define_op

EXPERT_RANGE_RULE = (
    "expert_range is None or (len(expert_range) == 2 and 0 <= expert_range[0] <= expert_range[1])"
)


def outputs(
    ids: Tensor, num_experts: int, expert_range: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    local = num_experts if expert_range is None else expert_range[1] - expert_range[0]
    order = torch.empty((ids.shape[0] * ids.shape[1],), dtype=torch.int32, device=ids.device)
    return order, torch.empty((local + 1,), dtype=torch.int32, device=ids.device)


_op = define_op(
    "moe_sort(Tensor ids, int num_experts, int[]? expert_range=None) -> (Tensor, Tensor)",
    checks={
        "ids": "[T, K] int32",
        "num_experts": "num_experts >= 1",
        "expert_range": EXPERT_RANGE_RULE,
        "expert_range and num_experts": "expert_range is None or expert_range[1] <= num_experts",
    },
    outputs=outputs,
)


def moe_sort(
    ids: Tensor, num_experts: int, *, expert_range: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Stable order of the flat pairs ``t * K + k`` by expert, and where each expert starts.

    Args:
        ids: ``[T, K]`` int32, the chosen experts; an id that is not local is allowed.
        num_experts: E.
        expert_range: ``(first, last + 1)`` of the local experts (expert parallelism); all if None.

    Returns:
        ``order [T*K]`` int32, a permutation: the pairs of the first local expert in ascending
        order, then the next one's; pairs of no local expert last. ``offsets [E_local + 1]`` int32:
        expert e (local number) has ``order[offsets[e] : offsets[e + 1]]``.

    Raises:
        ValueError, TypeError: a shape, dtype or range other than stated.

    Gradients: none.

    Source: the grouped-GEMM bookkeeping of every MoE engine; no published definition.
    """
    order, offsets = _op(ids, num_experts, expert_range)
    return order, offsets
