"""Launches `csrc/cuda/patch_merge.cu`."""

from __future__ import annotations

from torch import Tensor

from kimi_ops.cuda._launcher import launch_kernel
from kimi_ops.cuda._support import ELEMENTS, is_aligned, refusal

BATCH_INVARIANT = True  # a token's block sees nothing of the others
_CORNERS = 4
_ONE_WARP = 1280  # D that one warp a corner holds, 40 elements a lane
_WIDEST = 2048  # that four hold, 16 a lane


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
    if x.shape[1] > _WIDEST:
        return f"patch_merge in CUDA C++ holds D of up to {_WIDEST} in registers, got {x.shape[1]}"
    return refusal("patch_merge", x, tuple(ELEMENTS))


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
    length, width = x.shape
    norms = [v.contiguous() for v in (final_weight, final_bias, pre_weight, pre_bias)]
    vectors = width % (16 // x.element_size()) == 0 and is_aligned(x, *norms)
    warps = 1 if width <= _ONE_WARP else 4
    launch_kernel(
        "patch_merge",
        f"patch_merge_kernel_{ELEMENTS[x.dtype]}_{'vec' if vectors else 'each'}_{warps}",
        grid=(merged_length,),
        block=(32 * warps * _CORNERS,),
        args=[
            x,
            grid_thws.contiguous(),
            grid_thws.element_size(),
            *norms,
            y,
            length,
            len(grid_thws),
            width,
            x.stride(0),
            x.stride(1),
            eps,
        ],
    )
