"""From encoder output to projector input: norm, mean over frames, 2x2 regrouping, norm."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops._dispatch import define_op


def outputs(
    x: Tensor,
    grid_thws: Tensor,
    merged_length: int,
    final_weight: Tensor,
    final_bias: Tensor,
    pre_weight: Tensor,
    pre_bias: Tensor,
    eps: float,
) -> Tensor:
    return torch.empty((merged_length, 4 * x.shape[1]), dtype=x.dtype, device=x.device)


_op = define_op(
    "patch_merge(Tensor x, Tensor grid_thws, SymInt merged_length, Tensor final_weight,"
    " Tensor final_bias, Tensor pre_weight, Tensor pre_bias, float eps) -> Tensor",
    checks={
        "x": "[L, D] float",
        "grid_thws": "[n, 3] int",
        "final_weight": "[D] like x",
        "final_bias": "[D] like x",
        "pre_weight": "[D] like x",
        "pre_bias": "[D] like x",
        "merged_length": "merged_length >= 0",
        "eps": "eps >= 0",
    },
    outputs=outputs,
)


def patch_merge(
    x: Tensor,
    grid_thws: Tensor,
    merged_length: int,
    final_weight: Tensor,
    final_bias: Tensor,
    pre_weight: Tensor,
    pre_bias: Tensor,
    eps: float,
) -> Tensor:
    """Final LayerNorm, mean over the frames of a clip, 2x2 patches to one token, LayerNorm.

    Token (i, j) of an entry holds its four patches in the order (2i, 2j), (2i, 2j+1), (2i+1, 2j),
    (2i+1, 2j+1), each normalised on its own, side by side. An entry of (t, h, w) patches gives
    h w / 4 tokens in row order, whatever t is.

    Args:
        x: ``[L, D]`` bfloat16, float16, float32 or float64: output of the last encoder layer.
        grid_thws: ``[n, 3]`` int32 or int64: (t, h, w) of each entry, positive, h and w even;
            other values give undefined numbers.
        merged_length: sum of h w / 4, as a host integer (the values above stay on the device).
        final_weight: ``[D]``, dtype of ``x``; with ``final_bias`` the final LayerNorm.
        final_bias: ``[D]``, dtype of ``x``.
        pre_weight: ``[D]``, dtype of ``x``; with ``pre_bias`` the projector's LayerNorm.
        pre_bias: ``[D]``, dtype of ``x``.
        eps: of both norms, 1e-5 in Kimi K2.5.

    Returns:
        ``[merged_length, 4D]`` contiguous, dtype of ``x``; rows past the last entry are 0, and
        patches that an entry announces past the end of ``x`` count as 0 in the mean.

    Raises:
        ValueError, TypeError: a shape, dtype, device or number other than stated.

    Gradients: to ``x`` and the four parameters of the norms.

    Source: MoonViT-3D and the patch merger in the Kimi K2.5 report, arXiv 2602.02276.
    """
    y: Tensor = _op(
        x, grid_thws, merged_length, final_weight, final_bias, pre_weight, pre_bias, eps
    )
    return y
