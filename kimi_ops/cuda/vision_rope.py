"""Launches `csrc/cuda/vision_rope.cu`."""

from __future__ import annotations

from torch import Tensor

from kimi_ops.cuda._launcher import launch_kernel
from kimi_ops.cuda._support import ELEMENTS, is_aligned, refusal

BATCH_INVARIANT = True  # a patch's values depend on nothing but itself and its place
_WARPS = 4
_WIDEST_HEAD = 256


def unsupported(qkv: Tensor, grid_thws: Tensor) -> str | None:
    if qkv.shape[3] > _WIDEST_HEAD:
        return f"vision_rope in CUDA C++ takes heads of up to {_WIDEST_HEAD}, got {qkv.shape[3]}"
    return refusal("vision_rope", qkv, tuple(ELEMENTS))


def launch(outputs: None, qkv: Tensor, grid_thws: Tensor) -> None:
    length, _, heads, head_dim = qkv.shape
    if 0 in (length, heads, head_dim):
        return
    vectors = head_dim % (16 // qkv.element_size()) == 0 and is_aligned(qkv)
    launch_kernel(
        "vision_rope",
        f"vision_rope_kernel_{ELEMENTS[qkv.dtype]}_{'vec' if vectors else 'each'}",
        grid=(-(-length // _WARPS),),
        block=(32 * _WARPS,),
        args=[
            qkv,
            grid_thws.contiguous(),
            grid_thws.element_size(),
            length,
            len(grid_thws),
            heads,
            head_dim,
            *qkv.stride(),
        ],
    )
