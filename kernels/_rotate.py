"""Rotation of adjacent pairs in registers, which every RoPE here ends in."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotate_pairs(x, sin, cos):
    """``x [BLOCK, BLOCK_R]`` with pairs (2i, 2i+1) turned by ``sin, cos [BLOCK, BLOCK_R / 2]``.

    Computed in float32, rounded to the dtype of x once.
    """
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    even, odd = even.to(tl.float32), odd.to(tl.float32)
    turned = tl.join(even * cos - odd * sin, odd * cos + even * sin)
    return tl.reshape(turned, x.shape).to(x.dtype)
