"""Gradient of `moe_route` through the returned weights.

The selection is a constant (straight through): which experts were chosen has no gradient, nor has
the bias that steered it. With the chosen scores ``s = sigmoid(l)`` of logits ``l = x gate^T``::

    w_k = scale s_k / z,  z = sum_j s_j + 1e-20:   ds_k = scale (dw_k - sum_j dw_j s_j / z) / z
    without normalisation, w_k = scale s_k:        ds_k = scale dw_k
    dl_k = ds_k s_k (1 - s_k), 0 for the experts not chosen
    dx = dl gate,   dgate = dl^T x
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kimi_ops.reference import widen

GRADIENTS = ("x", "gate_weight")
CONSTANTS = ("bias",)


def save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    x, gate_weight, *_, ctx.scale, ctx.normalize = inputs
    ctx.mark_non_differentiable(outputs[1])
    ctx.save_for_backward(x, gate_weight, outputs[1])


def backward(ctx: Any, dweights: Tensor, dids: None) -> dict[str, Tensor]:
    x, gate_weight, ids = ctx.saved_tensors
    wide = widen(x)
    gate, chosen = gate_weight.to(wide.dtype), ids.long()
    s = (wide @ gate.T).gather(1, chosen).sigmoid()
    if ctx.normalize:
        z = s.sum(-1, keepdim=True) + 1e-20
        dweights = (dweights - (dweights * s).sum(-1, keepdim=True) / z) / z
    dl = torch.zeros((len(x), len(gate)), dtype=wide.dtype, device=x.device)
    dl = dl.scatter(1, chosen, ctx.scale * dweights * s * (1 - s))
    found = {}
    if "x" in ctx.wanted:
        found["x"] = (dl @ gate).to(x.dtype)
    if "gate_weight" in ctx.wanted:
        found["gate_weight"] = (dl.T @ wide).to(gate_weight.dtype)
    return found
