"""Gradient of `vision_attention`: per segment that of `kimi_ops.autograd._attention`; the op
returns no log-sum-exp, which is therefore computed again first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kimi_ops.autograd._attention import segment_gradients
from kimi_ops.autograd._opaque import define_opaque

GRADIENTS = ("q", "k", "v")


def _compute(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    gradients, cu = _outputs(dout, q, k, v), cu_seqlens.tolist()
    segment_gradients(dout, None, q, k, v, out, None, cu, cu, scale, False, gradients)
    return gradients


def _outputs(dout: Tensor, *qkv_and_rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv_and_rest[:3]
    new = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    return new[0], new[1], new[2]


_backward = define_opaque(
    "vision_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out,"
    " Tensor cu_seqlens, float scale) -> (Tensor, Tensor, Tensor)",
    _compute,
    _outputs,
)


def save(ctx: Any, inputs: tuple[Any, ...], outputs: Tensor) -> None:
    q, k, v, cu_seqlens, _, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, outputs, cu_seqlens)


def backward(ctx: Any, dout: Tensor) -> dict[str, Tensor]:
    dq, dk, dv = _backward(dout, *ctx.saved_tensors, ctx.scale)
    return {"q": dq, "k": dk, "v": dv}
