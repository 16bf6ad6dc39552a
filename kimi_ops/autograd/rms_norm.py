"""Gradient of `rms_norm`.

With ``r = 1 / sqrt(mean(x^2) + eps)``, ``n = r x`` and ``g = weight * dy``::

    dx      = r * (g - n * mean(g * n))
    dweight = sum over rows of dy * n
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kimi_ops.reference import widen

GRADIENTS = ("x", "weight")


def through_norm(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``dx [..., D]`` in float32 or float64 and ``dweight [D]`` in the dtype of ``weight``."""
    dy, x = widen(dy), widen(x)
    r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    n, g = r * x, dy * weight
    dx = r * (g - n * (g * n).mean(-1, keepdim=True))
    return dx, (dy * n).sum_to_size(weight.shape).to(weight.dtype)


def save(ctx: Any, inputs: tuple[Any, ...], outputs: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def backward(ctx: Any, dy: Tensor) -> dict[str, Tensor]:
    x, weight = ctx.saved_tensors
    dx, dweight = through_norm(dy, x, weight, ctx.eps)
    return {"x": dx.to(x.dtype), "weight": dweight}
