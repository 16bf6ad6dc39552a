"""Residual addition fused with the RMSNorm that follows it."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops._dispatch import define_op


def outputs(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, torch.empty_like(y)


_op = define_op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    checks={
        "x": "[..., D] float",
        "residual": "[..., D] like x",
        "weight": "[D] like x",
        "eps": "eps >= 0",
    },
    outputs=outputs,
)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``h = x + residual`` and ``y = rms_norm(h, weight, eps)`` in one pass.

    The sum is rounded to the dtype of ``x`` once, and the norm is that of the rounded sum, so the
    result equals the two separate steps.

    Args:
        x: ``[..., D]`` bfloat16, float16, float32 or float64; the output of a sub-layer.
        residual: ``[..., D]``, dtype of ``x``; the residual stream.
        weight: ``[D]``, dtype of ``x``.
        eps: added to the mean square.

    Returns:
        ``(y, h)``, both ``[..., D]`` contiguous, dtype of ``x``; neither aliases an input.

    Raises:
        ValueError, TypeError: a shape, dtype, device or ``eps`` other than stated.

    Gradients: to ``x``, ``residual`` and ``weight``, from both results.

    Source: the pre-norm block of Kimi K2.5 (DeepSeek-V3 family).
    """
    y, h = _op(x, residual, weight, eps)
    return y, h
