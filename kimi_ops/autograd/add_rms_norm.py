"""Gradient of `add_rms_norm`: through the norm that of `rms_norm` at ``h = x + residual``, then
``dx = dresidual = dh + (gradient through the norm)``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kimi_ops.autograd.rms_norm import through_norm

GRADIENTS = ("x", "residual", "weight")


def save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(outputs[1], weight)


def backward(ctx: Any, dy: Tensor, dh: Tensor) -> dict[str, Tensor]:
    h, weight = ctx.saved_tensors
    through, dweight = through_norm(dy, h, weight, ctx.eps)
    total = (through + dh).to(h.dtype)
    return {"x": total, "residual": total, "weight": dweight}
