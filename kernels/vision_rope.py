"""Triton kernel of `kimi_ops.vision_rope`: two-dimensional RoPE, in place, mixed sizes, one launch.

    pair 2i   of q and k  turns by  column * 10000^(-4i/head_dim)
    pair 2i+1 of q and k  turns by  row    * 10000^(-4i/head_dim)

Grid: ``(cdiv(L, ROWS),)``. A program finds the entries of its ROWS patches in the device's grid
table, makes their angles once, and then goes through the heads of q and k, HEADS at a time:

    qkv [L, 3, H, head_dim]    program 0: patches 0..ROWS-1   q h0 h1, k h0 h1; q h2 h3, k h2 ..
                               program 1: patches ROWS..      ( v is not read )

Bytes: q and k are read once and written once, 8 H head_dim bytes a patch in 16-bit dtypes; the grid
table comes from L2. A head of 72 is a tile of 128 of which 56 lanes' worth of loads are masked off:
they cost issue slots, no bytes. Angles are float32 products as the reference has them, their sines
in float32, one rounding at the end.

Source: RoFormer, arXiv 2104.09864; MoonViT, arXiv 2504.07491.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_ops.kernels._alignment import common_alignment
from kimi_ops.kernels._angle import power_of_10000, sin_cos
from kimi_ops.kernels._grid import ENTRIES_PER_STEP, locate
from kimi_ops.kernels._rotate import rotate_pairs

BATCH_INVARIANT = True  # a patch's values depend on nothing but itself and its place

# Patches per program: the angles of a patch cost about as much as four of its heads, so a program
# keeps them for all heads. 8 patches x 2 heads x 128 are two 16-byte loads per thread of 4 warps,
# and each turn of the loop has those of q and of k in flight: stores in between would order them.
# Two heads of 72 side by side are nine 32-byte sectors; one at a time they would be five each.
ROWS = 8
HEADS = 2
WARPS = 4


@triton.jit
def vision_rope_kernel(
    qkv_ptr,  # [L, 3, H, head_dim]
    grid_ptr,  # [n, 3]
    length,
    num_entries,
    heads,
    stride_l,
    stride_part,
    stride_h,
    stride_d,
    head_dim: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    STEP: tl.constexpr,
):
    tile = tl.arange(0, ROWS * HEADS)  # of a patch, HEADS heads side by side
    offs_l = tl.program_id(0) * ROWS + tile // HEADS
    found, _, h, w, place, _ = locate(offs_l, grid_ptr, num_entries, False, STEP)
    mask_l = (offs_l < length) & (found != 0)
    place = place % (h * w)
    row = (place // w).to(tl.float32)
    column = (place % w).to(tl.float32)

    offs_m = tl.arange(0, BLOCK_D // 2)  # pairs
    frequency = power_of_10000((offs_m // 2 * 4).to(tl.float32) / -head_dim)
    position = tl.where((offs_m % 2 == 0)[None, :], column[:, None], row[:, None])
    sin, cos = sin_cos(position * frequency[None, :])  # [ROWS * HEADS, BLOCK_D / 2]

    offs_d = tl.arange(0, BLOCK_D)
    offs_row = offs_l.to(tl.int64) * stride_l + tile % HEADS * stride_h
    rows_ptr = qkv_ptr + tl.multiple_of(offs_row, ALIGN)[:, None] + offs_d[None, :] * stride_d
    for head in range(0, heads, HEADS):
        mask = (mask_l & (head + tile % HEADS < heads))[:, None] & (offs_d < head_dim)[None, :]
        q_ptr = rows_ptr + tl.multiple_of(head * stride_h, ALIGN)
        k_ptr = rows_ptr + tl.multiple_of(head * stride_h + stride_part, ALIGN)
        q = tl.load(q_ptr, mask=mask, other=0.0)
        k = tl.load(k_ptr, mask=mask, other=0.0)
        tl.store(q_ptr, rotate_pairs(q, sin, cos), mask=mask)
        tl.store(k_ptr, rotate_pairs(k, sin, cos), mask=mask)


def _arguments(qkv: Tensor, grid_thws: Tensor) -> dict[str, Any]:
    length, _, heads, head_dim = qkv.shape
    return {
        "qkv_ptr": qkv,
        "grid_ptr": grid_thws,
        "length": length,
        "num_entries": grid_thws.shape[0],
        "heads": heads,
        "stride_l": qkv.stride(0),
        "stride_part": qkv.stride(1),
        "stride_h": qkv.stride(2),
        "stride_d": qkv.stride(3),
        "head_dim": head_dim,
        "ALIGN": common_alignment(*qkv.stride()[:3]),
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "ROWS": ROWS,
        "HEADS": HEADS,
        "STEP": ENTRIES_PER_STEP,
    }


def unsupported(qkv: Tensor, grid_thws: Tensor) -> str | None:
    if qkv.dtype == torch.float64:
        return "vision_rope in Triton computes in float32; qkv is float64"
    if qkv.shape[3] > 256:
        return f"vision_rope in Triton holds a head of up to 256, got {qkv.shape[3]}"
    return None


def launch(outputs: None, qkv: Tensor, grid_thws: Tensor) -> None:
    length, _, heads, head_dim = qkv.shape
    if 0 in (length, heads, head_dim):
        return
    grid = (triton.cdiv(length, ROWS),)
    arguments = _arguments(qkv=qkv, grid_thws=grid_thws.contiguous())
    vision_rope_kernel[grid](**arguments, num_warps=WARPS)


def static_cases() -> Iterable[Any]:
    from kimi_ops.testing.static import StaticCase

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        qkv = torch.empty(4096, 3, 16, 72, dtype=dtype, device="meta")
        grid = torch.empty(2, 3, dtype=torch.int64, device="meta")
        arguments = _arguments(qkv=qkv, grid_thws=grid)
        name = f"16_heads_of_72_{str(dtype).removeprefix('torch.')}"
        yield StaticCase.of_call(name, vision_rope_kernel, arguments, num_warps=WARPS)
