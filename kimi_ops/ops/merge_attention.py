"""Merges two attentions of the same queries over disjoint keys."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops._dispatch import define_op


def outputs(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    return out, torch.empty(lse_a.shape, dtype=lse_a.dtype, device=lse_a.device)


_op = define_op(
    "merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",
    checks={
        "out_a": "[..., V] float",
        "lse_a": "[...] float32|float64",
        "out_b": "[..., V] like out_a",
        "lse_b": "[...] like lse_a",
    },
    outputs=outputs,
)


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """``lse = log(e^lse_a + e^lse_b)``, ``out = e^(lse_a - lse) out_a + e^(lse_b - lse) out_b``.

    Args:
        out_a: ``[..., V]`` bfloat16, float16, float32 or float64.
        lse_a: ``[...]`` float32 or float64, natural logarithm.
        out_b: ``[..., V]``, dtype of ``out_a``.
        lse_b: ``[...]``, dtype of ``lse_a``.

    Returns:
        ``out [..., V]``, dtype of ``out_a``, and ``lse [...]``, dtype of ``lse_a``. A side whose
        lse is -inf contributes nothing, whatever its ``out`` holds; with both sides so, out is 0
        and lse -inf.

    Raises:
        ValueError, TypeError: a shape, dtype or device other than stated.

    Gradients: to all four arguments, from both results.

    Source: FlashAttention-2, arXiv 2307.08691; used for chunked prefill over a cached prefix.
    """
    out, lse = _op(out_a, lse_a, out_b, lse_b)
    return out, lse
