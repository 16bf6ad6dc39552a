"""Gradient of `int4_linear` to its input, through frozen weights: ``dx = dy W``.

The packed integers have none; train weights in int4 with `kimi_ops.quant.int4.fake_quantize`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kimi_ops.reference._int4 import dequantize

GRADIENTS = ("x",)


def save(ctx: Any, inputs: tuple[Any, ...], outputs: Tensor) -> None:
    _, packed, scale = inputs
    ctx.save_for_backward(packed, scale)


def backward(ctx: Any, dy: Tensor) -> dict[str, Tensor]:
    packed, scale = ctx.saved_tensors
    return {"x": dy @ dequantize(packed, scale, dy.dtype)}
