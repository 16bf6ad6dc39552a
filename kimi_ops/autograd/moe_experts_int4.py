"""Gradient of `moe_experts_int4` to its input, the routing weights and the shared expert, through
frozen int4 experts.

With ``h = gate_up x[t]``, ``a = silu_mul(h)`` and ``e = down a`` of an expert that token t chose as
its k-th, ``y[t] += weights[t, k] e``::

    dweights[t, k] = dy[t] . e
    da = down^T (weights[t, k] dy[t]),   dh by `silu_mul`,   dx[t] += gate_up^T dh

h and e are computed again. One expert's weights are unpacked at a time, and only those of experts
that a token chose. The packed integers and their scales have no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kimi_ops.autograd._opaque import define_opaque
from kimi_ops.autograd.silu_mul import through_silu_mul
from kimi_ops.reference import widen
from kimi_ops.reference._int4 import dequantize
from kimi_ops.reference.silu_mul import silu_mul

GRADIENTS = ("x", "weights", "shared_gate_up", "shared_down")


def _compute(
    dy: Tensor,
    x: Tensor,
    gate_up_packed: Tensor,
    gate_up_scale: Tensor,
    down_packed: Tensor,
    down_scale: Tensor,
    weights: Tensor,
    ids: Tensor,
    expert_range: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    dx, dweights = _outputs(dy, x, *(None,) * 4, weights)
    dx.zero_()
    dweights.zero_()
    local = ids - (expert_range[0] if expert_range else 0)
    local = local.masked_fill((local < 0) | (local >= len(gate_up_packed)), -1)
    for expert in local.unique().tolist():
        if expert < 0:
            continue
        chosen = local == expert
        tokens = chosen.any(1).nonzero()[:, 0]
        chosen = chosen[tokens]
        gate_up = dequantize(gate_up_packed[expert], gate_up_scale[expert], x.dtype)
        down = dequantize(down_packed[expert], down_scale[expert], x.dtype)
        h, grad = x[tokens] @ gate_up.T, dy[tokens]
        e = silu_mul(h) @ down.T
        dweight = (widen(grad) * e).sum(-1, keepdim=True).to(weights.dtype)
        dweights[tokens] += dweight * chosen
        # Summed over k: a token that chose an expert twice counts it twice.
        weight = weights[tokens].to(dx.dtype).masked_fill(~chosen, 0).sum(1, keepdim=True)
        dh = through_silu_mul(weight * (grad @ down), h)
        dx[tokens] += dh @ gate_up
    return dx, dweights


def _outputs(dy: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    weights = others[4]
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        torch.empty(x.shape, dtype=wide, device=x.device),
        torch.empty(weights.shape, dtype=weights.dtype, device=x.device),
    )


_backward = define_opaque(
    "moe_experts_int4_backward(Tensor dy, Tensor x, Tensor gate_up_packed, Tensor gate_up_scale,"
    " Tensor down_packed, Tensor down_scale, Tensor weights, Tensor ids, int[]? expert_range)"
    " -> (Tensor, Tensor)",
    _compute,
    _outputs,
)


def save(ctx: Any, inputs: tuple[Any, ...], outputs: Tensor) -> None:
    *tensors, ctx.expert_range = inputs
    ctx.save_for_backward(*tensors)


def backward(ctx: Any, dy: Tensor) -> dict[str, Tensor]:
    *routed, shared_gate_up, shared_down = ctx.saved_tensors
    x = routed[0]
    dx, dweights = _backward(dy, *routed, ctx.expert_range)
    found = {"weights": dweights}
    if shared_gate_up is not None:
        h = x @ shared_gate_up.T
        dh = through_silu_mul(dy @ shared_down, h)
        dx = dx + dh @ shared_gate_up
        found["shared_gate_up"], found["shared_down"] = dh.T @ x, dy.T @ silu_mul(h)
    return {"x": dx.to(x.dtype), **found}
