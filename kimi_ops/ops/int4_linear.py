"""A linear layer on int4 weights in groups of 32."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops._dispatch import define_op


def outputs(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    shape = (*x.shape[:-1], packed.shape[0])
    return torch.empty(shape, dtype=x.dtype, device=x.device)


_op = define_op(
    "int4_linear(Tensor x, Tensor packed, Tensor scale) -> Tensor",
    checks={
        "x": "[..., K] float",
        "packed": "[N, K/8] int32",
        "scale": "[N, K/32] bfloat16|float16|float32",
        "K": "K % 32 == 0",
    },
    outputs=outputs,
)


def int4_linear(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """``y = x @ W^T`` with ``W[n, k] = (nibble[n, k] - 8) * scale[n, k // 32]`` (W4A16).

    Args:
        x: ``[..., K]`` bfloat16, float16, float32 or float64. An infinity in a row gives
            infinities or NaN in that row of the result.
        packed: ``[N, K/8]`` int32 in the layout of `kimi_ops.quant.int4`.
        scale: ``[N, K/32]`` bfloat16, float16 or float32.

    Returns:
        ``[..., N]`` contiguous, dtype of ``x``, accumulated in at least float32.

    Raises:
        ValueError, TypeError: a shape, dtype or device other than stated, or K that is not a
            multiple of 32.

    Gradients: to ``x``; the int4 weights are frozen.

    Source: compressed-tensors ``pack-quantized``, as in the Kimi K2.5 checkpoint.
    """
    y: Tensor = _op(x, packed, scale)
    return y
