"""Torch's own int4 product on a CPU, ``_weight_int4pack_mm_for_cpu``: bfloat16 activations.

Experts are run one after the other. Torch has its own layout, so each expert that the calls choose
is repacked once; the others are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kimi_ops.bench.case import Args
from kimi_ops.bench.peers import Declined, Prepare, Prepared
from kimi_ops.bench.peers._experts import (
    check_copy,
    chosen_experts,
    expert_loop,
    made_once,
    silu_mul,
)

NAME = "torch int4pack"
WRITTEN_AGAINST = "torch 2.13.0"
DEVICES = ("cpu",)
_GROUP = 32
_ROWS = 16  # of a weight, at least, and a multiple of it
_aten: Any = torch.ops.aten


def missing(device: str) -> str | None:
    """Only torch's CPU build has the product."""
    if hasattr(_aten, "_weight_int4pack_mm_for_cpu"):
        return None
    return "this torch has no _weight_int4pack_mm_for_cpu: install torch 2.6 or later"


def _repacked(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if len(packed) % _ROWS:
        raise Declined(f"torch's int4 layout wants rows in sixteens, this weight has {len(packed)}")
    octets = packed.contiguous().view(torch.uint8)
    codes = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2).int()
    zeros = torch.zeros_like(scale)  # torch subtracts 8 itself
    pairs = torch.stack((scale, zeros), dim=-1).transpose(0, 1).contiguous().to(dtype)
    return _aten._convert_weight_to_int4pack_for_cpu(codes, 1), pairs


def _product(x: Tensor, weight: tuple[Tensor, Tensor]) -> Tensor:
    y: Tensor = _aten._weight_int4pack_mm_for_cpu(x, weight[0], _GROUP, weight[1])
    return y


def _moe_experts_int4(calls: Sequence[Args]) -> Prepared:
    x, gate_up, gate_up_scale, down, down_scale = calls[0][:5]
    chosen = chosen_experts(calls)
    words = gate_up[0].numel() + down[0].numel()
    check_copy(
        f"repacked weights of {len(chosen)} experts",
        len(chosen),
        words * (4 + x.element_size() / 2),
    )

    def expert(e: int) -> Callable[[Tensor], Tensor]:
        first = _repacked(gate_up[e], gate_up_scale[e], x.dtype)
        second = _repacked(down[e], down_scale[e], x.dtype)
        return lambda rows: _product(silu_mul(_product(rows, first)), second)

    return expert_loop(calls, {e: expert(e) for e in chosen})


def _int4_linear(calls: Sequence[Args]) -> Prepared:
    weights = made_once(calls, 1, lambda call: _repacked(call[1], call[2], call[0].dtype))

    def run(i: int) -> Tensor:
        x: Tensor = calls[i][0]
        return _product(x.flatten(0, -2), weights[i]).view(*x.shape[:-1], -1)

    return run


OPS: dict[str, Prepare] = {"moe_experts_int4": _moe_experts_int4, "int4_linear": _int4_linear}
