"""Root-mean-square normalisation of the last dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops._dispatch import define_op


def outputs(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_op = define_op(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    checks={"x": "[..., D] float", "weight": "[D] like x", "eps": "eps >= 0"},
    outputs=outputs,
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm: ``y = weight * x / sqrt(mean(x^2) + eps)``, statistics in float32.

    Args:
        x: ``[..., D]`` bfloat16, float16, float32 or float64; any strides, zero rows allowed.
        weight: ``[D]``, dtype of ``x``.
        eps: added to the mean square; Kimi K2.5 uses 1e-5.

    Returns:
        ``[..., D]`` contiguous, dtype of ``x``. A row with a NaN is NaN, no other row is.

    Raises:
        ValueError, TypeError: a shape, dtype, device or ``eps`` other than stated.

    Gradients: to ``x`` and ``weight``.

    Source: Zhang and Sennrich, arXiv 1910.07467; `input_layernorm` and its like in Kimi K2.5.
    """
    y: Tensor = _op(x, weight, eps)
    return y
