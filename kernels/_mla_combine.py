"""Second stage of `mla_decode`: the results of a sequence's splits joined, weighted by their lse.

A program has one query row and BLOCK_C columns of it. What it waits for is the length, which tells
how many splits there are, and then everything else at once:

    part_lse[b, r, 0..n]  ->  weight[n] = exp(lse[n] - max)
    part[b, 0..n, r, columns]  ->  out = sum_n weight[n] * part[n] / sum_n weight[n]
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_ops.kernels._mla_split import LOG2_E, split_bounds


@triton.jit
def split_weights(lse):
    """Weights ``[BLOCK_N, ...]`` of splits with these lse, 1 / their sum, and the lse of all.

    A split, or all of them, may have no keys and the lse -inf. A NaN of the first stage goes
    through.
    """
    top = tl.max(lse, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2((lse - base) * LOG2_E)
    total = tl.sum(weight, 0)
    norm = tl.where(total == 0, 0.0, 1.0 / total)
    return weight, norm, tl.where(total == 0, float("-inf"), base + tl.log(total))


@triton.jit
def mla_decode_combine_kernel(
    part_ptr,  # [B, num_splits, S * H, C] float32
    part_lse_ptr,  # [B, S * H, num_splits] float32
    length_ptr,  # [B]
    out_ptr,  # [B, S, H, C]
    lse_ptr,  # [B, S, H]
    rows,  # S * H
    capacity,
    num_splits,
    min_blocks,
    stride_length_b,
    C: tl.constexpr,
    SPLIT_T: tl.constexpr,  # BLOCK_T of the first stage
    BLOCK_N: tl.constexpr,  # num_splits up to the next power of two
    BLOCK_C: tl.constexpr,  # columns of one program
):
    row = tl.program_id(0).to(tl.int64)
    b = row // rows
    length = tl.load(length_ptr + b * stride_length_b)
    length = tl.minimum(tl.maximum(length, 0), capacity)
    _, _, used = split_bounds(length, 0, num_splits, min_blocks, SPLIT_T)

    offs_n = tl.arange(0, BLOCK_N)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_n, mask_c = offs_n < used, offs_c < C
    part_row = (b * num_splits + offs_n) * rows + row % rows
    lse = tl.load(part_lse_ptr + row * num_splits + offs_n, mask=mask_n, other=float("-inf"))
    part = tl.load(  # [BLOCK_N, BLOCK_C], all in flight before the first is used
        part_ptr + part_row[:, None] * C + offs_c[None, :],
        mask=mask_n[:, None] & mask_c[None, :],
        other=0.0,
    )
    weight, norm, lse = split_weights(lse)
    out = tl.sum(part * weight[:, None], 0) * norm
    tl.store(out_ptr + row * C + offs_c, out.to(out_ptr.dtype.element_ty), mask=mask_c)
    tl.store(lse_ptr + row, lse, mask=tl.program_id(1) == 0)
