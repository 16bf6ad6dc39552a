"""Launches `csrc/cpu/patch_merge.cpp`."""

from __future__ import annotations

from torch import Tensor

from kimi_ops import _native
from kimi_ops.cpu._support import dense_rows, refusal

BATCH_INVARIANT = True  # a token sees nothing of the others


def unsupported(
    x: Tensor,
    grid_thws: Tensor,
    merged_length: int,
    final_weight: Tensor,
    final_bias: Tensor,
    pre_weight: Tensor,
    pre_bias: Tensor,
    eps: float,
) -> str | None:
    return refusal("patch_merge", x)


def launch(
    y: Tensor,
    x: Tensor,
    grid_thws: Tensor,
    merged_length: int,
    final_weight: Tensor,
    final_bias: Tensor,
    pre_weight: Tensor,
    pre_bias: Tensor,
    eps: float,
) -> None:
    if y.numel() == 0:
        return
    x = dense_rows(x)[0]
    _native.call(
        "patch_merge",
        dtype=x.dtype,
        y=y,
        x=x,
        stride_x=x.stride(0),
        grid_thws=grid_thws.contiguous(),
        grid_bytes=grid_thws.element_size(),
        entries=len(grid_thws),
        final_weight=final_weight.contiguous(),
        final_bias=final_bias.contiguous(),
        pre_weight=pre_weight.contiguous(),
        pre_bias=pre_bias.contiguous(),
        length=x.shape[0],
        merged_length=merged_length,
        width=x.shape[1],
        eps=eps,
    )
