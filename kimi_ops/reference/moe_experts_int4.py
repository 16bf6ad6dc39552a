"""Reference of `moe_experts_int4`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kimi_ops.reference import runs_anything as unsupported
from kimi_ops.reference import widen
from kimi_ops.reference._int4 import dequantize
from kimi_ops.reference.silu_mul import silu_mul

__all__ = ["launch", "moe_experts_int4", "unsupported"]


def moe_experts_int4(
    x: Tensor,
    gate_up_packed: Tensor,
    gate_up_scale: Tensor,
    down_packed: Tensor,
    down_scale: Tensor,
    weights: Tensor,
    ids: Tensor,
    shared_gate_up: Tensor | None = None,
    shared_down: Tensor | None = None,
    expert_range: Sequence[int] | None = None,
) -> Tensor:
    total = torch.zeros_like(widen(x))
    local = ids - (expert_range[0] if expert_range else 0)
    local = local.masked_fill((local < 0) | (local >= len(gate_up_packed)), -1)
    for expert in local.unique().tolist():
        if expert < 0:
            continue
        chosen = local == expert
        tokens = chosen.any(1).nonzero()[:, 0]
        gate_up = dequantize(gate_up_packed[expert], gate_up_scale[expert], x.dtype)
        down = dequantize(down_packed[expert], down_scale[expert], x.dtype)
        y = silu_mul(x[tokens] @ gate_up.T) @ down.T
        # Summed over k: a token that chose an expert twice counts it twice.
        weight = weights.to(total.dtype).masked_fill(~chosen, 0).sum(1)
        total[tokens] += weight[tokens, None] * y
    if shared_gate_up is not None and shared_down is not None:
        total += silu_mul(x @ shared_gate_up.T) @ shared_down.T
    return total.to(x.dtype)


def launch(y: Tensor, *args: Any) -> None:
    y.copy_(moe_experts_int4(*args))
