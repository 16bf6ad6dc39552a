"""SwiGLU of a packed gate/up tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops._dispatch import define_op


def outputs(gate_up: Tensor) -> Tensor:
    shape = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    return torch.empty(shape, dtype=gate_up.dtype, device=gate_up.device)


_op = define_op(
    "silu_mul(Tensor gate_up) -> Tensor",
    checks={"gate_up": "[..., 2*F] float"},
    outputs=outputs,
)


def silu_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` with ``silu(z) = z / (1 + exp(-z))``.

    Args:
        gate_up: ``[..., 2F]`` bfloat16, float16, float32 or float64; the F gate values first.

    Returns:
        ``[..., F]`` contiguous, dtype of ``gate_up``.

    Raises:
        ValueError, TypeError: an odd last dimension, no dimension at all, or another dtype.

    Gradients: to ``gate_up``.

    Source: Shazeer, arXiv 2002.05202; the MLP and the experts of Kimi K2.5.
    """
    y: Tensor = _op(gate_up)
    return y
