"""Few tokens on int4 weights: scales on the accumulators of separated groups.

x [K] of a token arrives rearranged (`_int4.rearrange`), with minus the sum of each group times the
bias of the planes beside it. One step multiplies GS groups (8 GS units) of BN rows with
TOKENS * GS columns::

    columns     token 0               token 1                 x in column (t, g): the units of
    groups   |0 1 2 .. GS-1|       |0 1 2 .. GS-1|            token t that are in group g, else 0
    acc   [BN, TOKENS * GS]  4 products, one per plane
    total [BN, TOKENS * GS]  += (acc + bias[t, g]) * scale[n, g]     at the end: summed over g

Scales cost one multiply-add per accumulator instead of one multiply per weight, and are exact. The
price is GS times the multiply-adds: with at most 16 columns the tensor cores still wait for memory.
Two sets of BN rows (gate and up, or neighbouring rows) share every x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_ops.kernels._int4 import UNITS, planes


@triton.jit
def _halves(s):
    """[BN, 2 C] -> its left and right [BN, C]."""
    BN: tl.constexpr = s.shape[0]
    C: tl.constexpr = s.shape[1] // 2
    return tl.split(s.reshape(BN, 2, C).permute(0, 2, 1))


@triton.jit
def _spread(s, TOKENS: tl.constexpr):
    """Scales [BN, GS] -> float32 [BN, TOKENS * GS], the same for every token."""
    BN: tl.constexpr = s.shape[0]
    GS: tl.constexpr = s.shape[1]
    s = tl.broadcast_to(s[:, None, :], [BN, TOKENS, GS])
    return s.reshape(BN, TOKENS * GS).to(tl.float32)


@triton.jit
def _separated_tile(
    total_a,  # [BN, TOKENS * GS] float32
    total_b,
    scale_a,  # [BN, GS]
    scale_b,
    a_ptrs,  # [BN, 8 GS] int16
    b_ptrs,
    x_ptrs,  # [TOKENS * GS, 8 GS], plane 0
    bias_ptrs,  # [TOKENS * GS]
    g0,
    groups,
    shift,  # [1, 1] int32: `_int4.SHIFT`
    TOKENS: tl.constexpr,
    EVEN: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """GS groups, from g0 on, of two sets of BN rows for TOKENS tokens."""
    COLUMNS: tl.constexpr = total_a.shape[1]
    GS: tl.constexpr = COLUMNS // TOKENS
    dtype: tl.constexpr = x_ptrs.dtype.element_ty
    offs_u = tl.arange(0, UNITS * GS)  # [8 GS]
    offs_c = tl.arange(0, COLUMNS)  # [TOKENS * GS]
    own = (offs_u // UNITS)[None, :] == (offs_c % GS)[:, None]
    if EVEN:
        a = tl.load(a_ptrs + g0 * UNITS)
        b = tl.load(b_ptrs + g0 * UNITS)
        bias = tl.load(bias_ptrs + g0)
    else:
        inside = g0 + offs_u // UNITS < groups
        own = own & inside[None, :]
        a = tl.load(a_ptrs + g0 * UNITS, mask=inside[None, :], other=0)
        b = tl.load(b_ptrs + g0 * UNITS, mask=inside[None, :], other=0)
        bias = tl.load(bias_ptrs + g0, mask=g0 + offs_c % GS < groups, other=0.0)
    x_ptrs += g0 * UNITS
    plane = groups * UNITS
    x0 = tl.load(x_ptrs, mask=own, other=0.0).trans()
    x1 = tl.load(x_ptrs + plane, mask=own, other=0.0).trans()
    x2 = tl.load(x_ptrs + 2 * plane, mask=own, other=0.0).trans()
    x3 = tl.load(x_ptrs + 3 * plane, mask=own, other=0.0).trans()
    a0, a1, a2, a3 = planes(a, shift, dtype, ASSEMBLY)
    b0, b1, b2, b3 = planes(b, shift, dtype, ASSEMBLY)
    acc_a = tl.dot(a3, x3, tl.dot(a2, x2, tl.dot(a1, x1, tl.dot(a0, x0))))
    acc_b = tl.dot(b3, x3, tl.dot(b2, x2, tl.dot(b1, x1, tl.dot(b0, x0))))
    total_a += (acc_a + bias[None, :]) * _spread(scale_a, TOKENS)
    total_b += (acc_b + bias[None, :]) * _spread(scale_b, TOKENS)
    return total_a, total_b


@triton.jit
def _separated_pair(
    total_a, total_b, scale_a, scale_b, a_ptrs, b_ptrs, x_ptrs, bias_ptrs, g0, groups, shift,
    TOKENS: tl.constexpr, EVEN: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Two tiles side by side, whose scales came in one load of [BN, 2 GS]."""
    GS: tl.constexpr = scale_a.shape[1] // 2
    left_a, right_a = _halves(scale_a)
    left_b, right_b = _halves(scale_b)
    total_a, total_b = _separated_tile(
        total_a, total_b, left_a, left_b, a_ptrs, b_ptrs, x_ptrs, bias_ptrs, g0, groups, shift,
        TOKENS, EVEN, ASSEMBLY,
    )  # fmt: skip
    return _separated_tile(
        total_a, total_b, right_a, right_b, a_ptrs, b_ptrs, x_ptrs, bias_ptrs, g0 + GS, groups,
        shift, TOKENS, EVEN, ASSEMBLY,
    )  # fmt: skip


@triton.jit
def separated(
    units_ptr,  # int16, at the expert
    scale_ptr,
    rows_a,  # [BN] int64: rows of the weights, all within them
    rows_b,
    stride_units_n,  # in groups
    stride_scale_n,
    x_ptr,  # [.., 4, K/4], as `_int4.rearrange` leaves it
    bias_ptr,  # [.., K/32] float32: -(sum of the group) * bias_of
    tokens,  # [TOKENS * GS] int64: token of each column
    groups,
    shift,  # [1, 1] int32: `_int4.SHIFT`
    TOKENS: tl.constexpr,
    GS: tl.constexpr,  # groups that the accumulator keeps apart
    TILES: tl.constexpr,  # 1, 2 or 4 such per load of scales
    EVEN: tl.constexpr,  # K holds whole tiles
    ASSEMBLY: tl.constexpr,
):
    """W x^T of two sets of BN rows for TOKENS tokens: two float32 [BN, TOKENS]."""
    BN: tl.constexpr = rows_a.shape[0]
    COLUMNS: tl.constexpr = TOKENS * GS
    offs_u = tl.arange(0, UNITS * GS)
    offs_g = tl.arange(0, GS * TILES)
    a_ptrs = units_ptr + (rows_a * (stride_units_n * UNITS))[:, None] + offs_u[None, :]
    b_ptrs = units_ptr + (rows_b * (stride_units_n * UNITS))[:, None] + offs_u[None, :]
    sa_ptrs = scale_ptr + (rows_a * stride_scale_n)[:, None] + offs_g[None, :]
    sb_ptrs = scale_ptr + (rows_b * stride_scale_n)[:, None] + offs_g[None, :]
    x_ptrs = x_ptr + (tokens * groups * 32)[:, None] + offs_u[None, :]
    bias_ptrs = bias_ptr + tokens * groups + tl.arange(0, COLUMNS) % GS
    a = tl.zeros([BN, COLUMNS], tl.float32)
    b = tl.zeros([BN, COLUMNS], tl.float32)
    # Scales are loaded one step ahead: they come straight to registers, and the wait would show.
    mask = (offs_g < groups)[None, :]
    sa = tl.load(sa_ptrs, mask=mask, other=0.0)
    sb = tl.load(sb_ptrs, mask=mask, other=0.0)
    for g in range(0, groups, GS * TILES):
        ahead = g + GS * TILES
        if EVEN:
            mask = (ahead + offs_g * 0 < groups)[None, :]
        else:
            mask = (ahead + offs_g < groups)[None, :]
        next_sa = tl.load(sa_ptrs + ahead, mask=mask, other=0.0)
        next_sb = tl.load(sb_ptrs + ahead, mask=mask, other=0.0)
        if TILES == 1:
            a, b = _separated_tile(
                a, b, sa, sb, a_ptrs, b_ptrs, x_ptrs, bias_ptrs, g, groups, shift,
                TOKENS, EVEN, ASSEMBLY,
            )  # fmt: skip
        elif TILES == 2:
            a, b = _separated_pair(
                a, b, sa, sb, a_ptrs, b_ptrs, x_ptrs, bias_ptrs, g, groups, shift,
                TOKENS, EVEN, ASSEMBLY,
            )  # fmt: skip
        else:
            sa0, sa1 = _halves(sa)
            sb0, sb1 = _halves(sb)
            a, b = _separated_pair(
                a, b, sa0, sb0, a_ptrs, b_ptrs, x_ptrs, bias_ptrs, g, groups, shift,
                TOKENS, EVEN, ASSEMBLY,
            )  # fmt: skip
            a, b = _separated_pair(
                a, b, sa1, sb1, a_ptrs, b_ptrs, x_ptrs, bias_ptrs, g + 2 * GS, groups, shift,
                TOKENS, EVEN, ASSEMBLY,
            )  # fmt: skip
        sa = next_sa
        sb = next_sb
    return tl.sum(a.reshape(BN, TOKENS, GS), 2), tl.sum(b.reshape(BN, TOKENS, GS), 2)
