"""Many tokens on int4 weights, and on 16-bit ones: blocks of rows times blocks of tokens.

``blocked``: a group of codes lies in one thread, which makes it 32 weights q * scale, rounded once
to x's dtype as the reference does. They reach the matrix unit through shared memory, in the order
[group, plane, unit]; x comes in that order too (`_int4.rearrange`), so nothing is shuffled.

``dense``: the shared expert's weights, as they are.

Both return two float32 [BN, BLOCK_T] for two sets of BN rows that share every x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_ops.kernels._int4 import (
    FOUR_BF16,
    FOUR_FP16,
    OPERANDS_SCALED,
    SCALED_BF16,
    SCALED_FP16,
    UNITS,
    bias_of,
    planes,
)


@triton.jit
def _weights(units, scale, shift, dtype: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Codes [BN, 8 G] and scales [BN, G] -> [BN, 32 G] in ``dtype``: group, plane, unit."""
    BN: tl.constexpr = units.shape[0]
    G: tl.constexpr = scale.shape[1]
    scale = tl.broadcast_to(scale[:, :, None], [BN, G, UNITS]).reshape(BN, UNITS * G)
    if ASSEMBLY and scale.dtype == dtype:
        wide = tl.broadcast_to(shift, units.shape)
        if dtype == tl.bfloat16:
            p0, p1, p2, p3 = tl.inline_asm_elementwise(
                SCALED_BF16,
                OPERANDS_SCALED,
                [units, wide, scale],
                dtype=FOUR_BF16,
                is_pure=True,
                pack=2,
            )
        else:
            p0, p1, p2, p3 = tl.inline_asm_elementwise(
                SCALED_FP16,
                OPERANDS_SCALED,
                [units, wide, scale],
                dtype=FOUR_FP16,
                is_pure=True,
                pack=2,
            )
    else:
        bias: tl.constexpr = bias_of(dtype)
        scale = scale.to(tl.float32)
        p0, p1, p2, p3 = planes(units, shift, dtype, ASSEMBLY)
        p0 = ((p0.to(tl.float32) - bias) * scale).to(dtype)
        p1 = ((p1.to(tl.float32) - bias) * scale).to(dtype)
        p2 = ((p2.to(tl.float32) - bias) * scale).to(dtype)
        p3 = ((p3.to(tl.float32) - bias) * scale).to(dtype)
    four = tl.join(tl.join(p0, p2), tl.join(p1, p3)).reshape(BN, G, UNITS, 4)
    return four.permute(0, 1, 3, 2).reshape(BN, 4 * UNITS * G)


@triton.jit
def blocked(
    units_ptr,  # int16, at the expert
    scale_ptr,
    rows_a,  # [BN] int64: rows of the weights, all within them
    rows_b,
    stride_units_n,  # in groups
    stride_scale_n,
    x_ptr,  # [.., K/32, 4, 8], as `_int4.rearrange` leaves it
    tokens,  # [BLOCK_T] int64
    groups,
    shift,  # [1, 1] int32: `_int4.SHIFT`
    BLOCK_G: tl.constexpr,
    EVEN: tl.constexpr,  # K holds whole blocks
    ASSEMBLY: tl.constexpr,
):
    """W x^T, int4 weights."""
    BN: tl.constexpr = rows_a.shape[0]
    BLOCK_T: tl.constexpr = tokens.shape[0]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    offs_u = tl.arange(0, UNITS * BLOCK_G)
    offs_g = tl.arange(0, BLOCK_G)
    offs_k = tl.arange(0, 32 * BLOCK_G)
    a_ptrs = units_ptr + (rows_a * (stride_units_n * UNITS))[:, None] + offs_u[None, :]
    b_ptrs = units_ptr + (rows_b * (stride_units_n * UNITS))[:, None] + offs_u[None, :]
    sa_ptrs = scale_ptr + (rows_a * stride_scale_n)[:, None] + offs_g[None, :]
    sb_ptrs = scale_ptr + (rows_b * stride_scale_n)[:, None] + offs_g[None, :]
    x_ptrs = x_ptr + (tokens * groups * 32)[:, None] + offs_k[None, :]
    acc_a = tl.zeros([BN, BLOCK_T], tl.float32)
    acc_b = tl.zeros([BN, BLOCK_T], tl.float32)
    for g in range(0, groups, BLOCK_G):
        if EVEN:
            a = tl.load(a_ptrs + g * UNITS)
            b = tl.load(b_ptrs + g * UNITS)
            sa = tl.load(sa_ptrs + g)
            sb = tl.load(sb_ptrs + g)
            x = tl.load(x_ptrs + g * 32)
        else:
            mask_u = (g + offs_u // UNITS < groups)[None, :]
            mask_g = (g + offs_g < groups)[None, :]
            a = tl.load(a_ptrs + g * UNITS, mask=mask_u, other=0)
            b = tl.load(b_ptrs + g * UNITS, mask=mask_u, other=0)
            sa = tl.load(sa_ptrs + g, mask=mask_g, other=0.0)
            sb = tl.load(sb_ptrs + g, mask=mask_g, other=0.0)
            x = tl.load(x_ptrs + g * 32, mask=(g + offs_k // 32 < groups)[None, :], other=0.0)
        x = x.trans()
        acc_a = tl.dot(_weights(a, sa, shift, dtype, ASSEMBLY), x, acc_a)
        acc_b = tl.dot(_weights(b, sb, shift, dtype, ASSEMBLY), x, acc_b)
    return acc_a, acc_b


@triton.jit
def dense(
    w_ptr,  # like x
    rows_a,  # [BN] int64: rows of the weights, all within them
    rows_b,
    stride_w_n,
    x_ptr,
    tokens,  # [BLOCK_T] int64
    stride_x_t,
    K,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    """W x^T, weights in the dtype of x; columns side by side in both."""
    BN: tl.constexpr = rows_a.shape[0]
    BLOCK_T: tl.constexpr = tokens.shape[0]
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = w_ptr + (rows_a * stride_w_n)[:, None] + offs_k[None, :]
    b_ptrs = w_ptr + (rows_b * stride_w_n)[:, None] + offs_k[None, :]
    x_ptrs = x_ptr + (tokens * stride_x_t)[:, None] + offs_k[None, :]
    acc_a = tl.zeros([BN, BLOCK_T], tl.float32)
    acc_b = tl.zeros([BN, BLOCK_T], tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN:
            a = tl.load(a_ptrs + k)
            b = tl.load(b_ptrs + k)
            x = tl.load(x_ptrs + k)
        else:
            mask = (k + offs_k < K)[None, :]
            a = tl.load(a_ptrs + k, mask=mask, other=0.0)
            b = tl.load(b_ptrs + k, mask=mask, other=0.0)
            x = tl.load(x_ptrs + k, mask=mask, other=0.0)
        x = x.trans()
        acc_a = tl.dot(a, x, acc_a)
        acc_b = tl.dot(b, x, acc_b)
    return acc_a, acc_b
