"""Learned position table, resampled to each picture, and the temporal sinusoid, added."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops._dispatch import define_op


def outputs(x: Tensor, table: Tensor, grid_thws: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_op = define_op(
    "vision_pos_embed(Tensor x, Tensor table, Tensor grid_thws) -> Tensor",
    checks={
        "x": "[L, D] float",
        "table": "[rows, columns, D] like x",
        "grid_thws": "[n, 3] int",
        "rows": "rows > 0",
        "columns": "columns > 0",
        "D": "D % 2 == 0",
    },
    outputs=outputs,
)


def vision_pos_embed(x: Tensor, table: Tensor, grid_thws: Tensor) -> Tensor:
    """Adds to every patch its position in the picture and, in a clip, its frame.

    The table is resampled to (h, w) of each entry by separable bicubic convolution with a = -0.75,
    half-pixel centres and clamped borders (torch's ``interpolate(mode="bicubic")``, no antialias),
    in float32. In a clip (t > 1) frame f adds ``[sin(f w_0) .. | cos(f w_0) ..]`` with
    ``w_i = 10000^(-2i/D)``; a single frame adds nothing.

    Args:
        x: ``[L, D]`` bfloat16, float16, float32 or float64: patches of all entries, each in
            frame, row, column order.
        table: ``[rows, columns, D]``, dtype of ``x``; 64 x 64 x 1152 in Kimi K2.5.
        grid_thws: ``[n, 3]`` int32 or int64: (t, h, w) of each entry, in patches, all positive;
            other values give undefined numbers.

    Returns:
        ``[L, D]`` contiguous, dtype of ``x``; rows past the last entry are those of ``x``.

    Raises:
        ValueError, TypeError: a shape, dtype or device other than stated.

    Gradients: to ``x`` and ``table``.

    Source: Keys, IEEE TASSP 29 (1981); MoonViT-3D in the Kimi K2.5 report, arXiv 2602.02276.
    """
    y: Tensor = _op(x, table, grid_thws)
    return y
