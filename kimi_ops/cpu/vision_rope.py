"""Launches `csrc/cpu/vision_rope.cpp`."""

from __future__ import annotations

from torch import Tensor

from kimi_ops import _native
from kimi_ops.cpu._support import refusal

BATCH_INVARIANT = True  # a patch's values depend on nothing but itself and its place


def unsupported(qkv: Tensor, grid_thws: Tensor) -> str | None:
    if qkv.shape[3] > 1 and qkv.stride(3) != 1:
        return "vision_rope on the CPU rotates heads whose values are side by side"
    return refusal("vision_rope", qkv)


def launch(outputs: None, qkv: Tensor, grid_thws: Tensor) -> None:
    length, _, heads, head_dim = qkv.shape
    if 0 in (length, heads, head_dim):
        return
    _native.call(
        "vision_rope",
        dtype=qkv.dtype,
        qkv=qkv,
        stride_patch=qkv.stride(0),
        stride_part=qkv.stride(1),
        stride_head=qkv.stride(2),
        grid_thws=grid_thws.contiguous(),
        grid_bytes=grid_thws.element_size(),
        entries=len(grid_thws),
        length=length,
        heads=heads,
        head_dim=head_dim,
    )
