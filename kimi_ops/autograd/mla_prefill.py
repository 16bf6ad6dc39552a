"""Gradient of `mla_prefill`: per packed sequence that of `kimi_ops.autograd._attention`, from the
saved ``lse``. Both results have one, so that `merge_attention` can follow.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from kimi_ops.autograd._attention import attention_gradients
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
    dq, dk, dv = _outputs(dout, dlse, q, k, v)
    for gradient in (dq, dk, dv):
        gradient.zero_()  # rows past the last sequence
    spans_q, spans_k = (itertools.pairwise(cu.tolist()) for cu in (cu_seqlens_q, cu_seqlens_k))
    for (q0, q1), (k0, k1) in zip(spans_q, spans_k, strict=True):
        n, m = slice(q0, q1), slice(k0, k1)
        # Bottom-right aligned: the last query sees the last key.
        offset = (k1 - k0) - (q1 - q0) if causal else None
        dq[n], dk[m], dv[m] = attention_gradients(
            dout[n], dlse[n], q[n], k[m], v[m], out[n], lse[n], scale, offset
        )
    return dq, dk, dv


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
