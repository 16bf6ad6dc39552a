"""Gradient of `mla_prefill`: per packed sequence that of `kimi_ops.autograd._attention`, from the
saved ``lse``. Both results have one, so that `merge_attention` can follow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kimi_ops.autograd._attention import segment_gradients
from kimi_ops.autograd._opaque import define_opaque

GRADIENTS = ("q", "k", "v")


def _compute(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _outputs(dout, dlse, q, k, v)
    cu_q, cu_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    segment_gradients(dout, dlse, q, k, v, out, lse, cu_q, cu_k, scale, causal, gradients)
    return gradients


def _outputs(dout: Tensor, dlse: Tensor, *qkv_and_rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv_and_rest[:3]
    new = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    return new[0], new[1], new[2]


_backward = define_opaque(
    "mla_prefill_backward(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out,"
    " Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float scale, bool causal)"
    " -> (Tensor, Tensor, Tensor)",
    _compute,
    _outputs,
)


def save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, _, _, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, *outputs, cu_seqlens_q, cu_seqlens_k)


def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> dict[str, Tensor]:
    dq, dk, dv = _backward(dout, dlse, *ctx.saved_tensors, ctx.scale, ctx.causal)
    return {"q": dq, "k": dk, "v": dv}
