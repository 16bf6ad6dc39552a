"""The two products of `moe_experts_int4` for one or two tokens a block, in Gluon.

As in `_moe_experts_int4`, with the form of `_int4_few_direct`; h is stored lifted.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kimi_ops.kernels._int4 import lift, paired, start_of
from kimi_ops.kernels._int4_few_direct import (
    ACC,
    ROWS,
    as_a,
    as_b,
    direct,
    rows_from,
    weights_layout,
    x_layout,
)
from kimi_ops.kernels._moe_blocks import read_block

_TOKENS = gl.constexpr(8)  # of the shared expert, at a time
_STEP = gl.constexpr(64)  # columns of its weights
_W = gl.constexpr(weights_layout(64, 8))
_X = gl.constexpr(x_layout(64))


@gluon.jit
def _dense_step(a_ptrs, b_ptrs, k, left, EVEN: gl.constexpr):
    if EVEN:
        mask = (k * 0 < left)[None, :]
        a = gl.load(a_ptrs, mask=mask)
        b = gl.load(b_ptrs, mask=mask)
    else:
        mask = (k < left)[None, :]
        a = gl.load(a_ptrs, mask=mask, other=0.0)
        b = gl.load(b_ptrs, mask=mask, other=0.0)
    return a, b


@gluon.jit
def _dense(
    w_ptr,  # like x; columns side by side, in x too
    first_a,
    first_b,
    last_a,
    last_b,
    stride_w_n,
    x_ptr,
    first_token,
    T,
    stride_x_t,
    K,
    EVEN: gl.constexpr,  # K holds whole steps
    EXACT: gl.constexpr,
):
    """W x^T of two sets of ROWS rows of 16-bit weights: two float32 [ROWS, 8] as `ACC` lies."""
    k = gl.arange(0, _STEP, gl.SliceLayout(0, _W))
    row: gl.constexpr = gl.SliceLayout(1, _W)
    rows_a = rows_from(first_a, last_a, row, EXACT) * stride_w_n
    rows_b = rows_from(first_b, last_b, row, EXACT) * stride_w_n
    a_ptrs = w_ptr + rows_a[:, None] + k[None, :]
    b_ptrs = w_ptr + rows_b[:, None] + k[None, :]
    k_x = gl.arange(0, _STEP, gl.SliceLayout(1, _X))
    t = gl.minimum(first_token + gl.arange(0, _TOKENS, gl.SliceLayout(0, _X)), T - 1)
    x_ptrs = x_ptr + (t.to(gl.int64) * stride_x_t)[None, :] + k_x[:, None]
    acc_a = gl.zeros([ROWS, _TOKENS], gl.float32, ACC)
    acc_b = gl.zeros([ROWS, _TOKENS], gl.float32, ACC)
    a, b = _dense_step(a_ptrs, b_ptrs, k, K, EVEN)
    for k0 in range(0, K, _STEP):
        a_ptrs += _STEP
        b_ptrs += _STEP
        next_a, next_b = _dense_step(a_ptrs, b_ptrs, k, K - k0 - _STEP, EVEN)
        if EVEN:
            x = gl.load(x_ptrs)
        else:
            x = gl.load(x_ptrs, mask=(k_x < K - k0)[:, None], other=0.0)
        x = as_b(x)
        acc_a = mma_v2(as_a(a), x, acc_a)
        acc_b = mma_v2(as_a(b), x, acc_b)
        x_ptrs += _STEP
        a = next_a
        b = next_b
    return acc_a, acc_b


@gluon.jit
def moe_experts_int4_gate_up_direct_kernel(
    x_ptr,  # [T, D], for the shared expert
    xr_ptr,  # [T, D], rearranged and lifted, D rounded up to pairs of groups
    bias_ptr,  # [T, 2, D/32]
    zeros_ptr,  # [256]
    words_ptr,  # [E, 2F, D/8] int32
    scale_ptr,  # [E, 2F, D/32]
    shared_ptr,  # [2F', D] or None
    tables_ptr,
    h_ptr,  # [T K, F], rearranged and lifted, F rounded up to pairs of groups
    h_bias_ptr,  # [T K, 2, F/32]
    h_shared_ptr,  # [T, F']
    stride_x_t,
    stride_words_e,  # in groups, as
    stride_words_n,
    stride_scale_e,  # in pieces of SCALE_ALIGN, as
    stride_scale_n,
    stride_shared_n,
    T,
    K,
    F,
    F_SHARED,
    groups,  # D/32
    steps,
    blocks,
    shared_programs,
    shared_blocks,
    shift,
    TOKENS: gl.constexpr,
    HALVES: gl.constexpr,
    TILES: gl.constexpr,
    SCALE_ALIGN: gl.constexpr,
    EVEN: gl.constexpr,
    EVEN_SHARED: gl.constexpr,
    SHARED: gl.constexpr,
):
    program = gl.program_id(0)
    dtype: gl.constexpr = h_ptr.dtype.element_ty
    if SHARED and program < shared_programs:
        first = program // shared_blocks * ROWS
        first_token = program % shared_blocks * _TOKENS
        gate, up = _dense(
            shared_ptr, first, first + F_SHARED, F_SHARED - 1, 2 * F_SHARED - 1, stride_shared_n,
            x_ptr, first_token, T, stride_x_t, groups * 32, EVEN_SHARED, False,
        )  # fmt: skip
        n = first + gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
        t = first_token + gl.arange(0, _TOKENS, gl.SliceLayout(0, ACC))
        at = t.to(gl.int64)[None, :] * F_SHARED + n[:, None]
        h = (gate / (1.0 + gl.exp(-gate)) * up).to(dtype)
        gl.store(h_shared_ptr + at, h, mask=(n < F_SHARED)[:, None] & (t < T)[None, :])
    else:
        program -= shared_programs
        slot_count = T * K
        expert, start, count = read_block(tables_ptr, slot_count, blocks, program % blocks)
        if count > 0:
            first = program // blocks * ROWS
            e_words_ptr = words_ptr + expert * stride_words_e * 4
            e_scale_ptr = scale_ptr + expert * stride_scale_e * SCALE_ALIGN
            gate, up = direct(
                e_words_ptr, e_scale_ptr, first, first + F, 0, stride_words_n,
                stride_scale_n * SCALE_ALIGN,
                xr_ptr, bias_ptr, zeros_ptr, tables_ptr + start, count, K, groups, steps, shift,
                TOKENS, HALVES, TILES, EVEN, True,
            )  # fmt: skip
            h = (gate / (1.0 + gl.exp(-gate)) * up).to(dtype).to(gl.float32)
            column: gl.constexpr = gl.SliceLayout(0, h.type.layout)
            offs_t = gl.arange(0, TOKENS, column)
            mask_t = offs_t < count
            slots = gl.load(tables_ptr + start + gl.minimum(offs_t, count - 1)).to(gl.int64)
            # The rows of a program are one group of the next product.
            raised, lower = lift(gl.max(gl.abs(h), 0), dtype)
            h = h * raised[None, :]
            bias_ptrs = h_bias_ptr + slots * (2 * (F // 32)) + program // blocks
            gl.store(bias_ptrs, start_of(gl.sum(h, 0), dtype), mask=mask_t)
            gl.store(bias_ptrs + F // 32, lower, mask=mask_t)
            n = first + gl.arange(0, ROWS, gl.SliceLayout(1, h.type.layout))
            h = gl.where((n % 2 == 0)[:, None], h, h * 0.0625)
            at = (slots * ((F + 32) // 64 * 64))[None, :] + paired(n)[:, None]
            gl.store(h_ptr + at, h.to(dtype), mask=mask_t[None, :])


@gluon.jit
def moe_experts_int4_down_direct_kernel(
    hr_ptr,  # [T K, F], rearranged and lifted
    bias_ptr,  # [T K, 2, F/32]
    zeros_ptr,  # [256]
    h_shared_ptr,  # [T, F']
    words_ptr,  # [E, D, F/8] int32
    scale_ptr,  # [E, D, F/32]
    shared_ptr,  # [D, F'] or None
    tables_ptr,
    rows_ptr,  # [T K + T, D]: a row per slot, then the shared expert's
    stride_words_e,  # in groups, as
    stride_words_n,
    stride_scale_e,  # in pieces of SCALE_ALIGN, as
    stride_scale_n,
    stride_shared_n,
    T,
    K,
    D,
    F_SHARED,
    groups,  # F/32
    steps,
    blocks,
    shared_programs,
    shared_blocks,
    shift,
    TOKENS: gl.constexpr,
    HALVES: gl.constexpr,
    TILES: gl.constexpr,
    SCALE_ALIGN: gl.constexpr,
    EVEN: gl.constexpr,
    EXACT: gl.constexpr,
    EVEN_SHARED: gl.constexpr,
    SHARED: gl.constexpr,
):
    program = gl.program_id(0)
    slot_count = T * K
    dtype: gl.constexpr = rows_ptr.dtype.element_ty
    if SHARED and program < shared_programs:
        first = program // shared_blocks * (2 * ROWS)
        first_token = program % shared_blocks * _TOKENS
        a, b = _dense(
            shared_ptr, first, first + ROWS, D - 1, D - 1, stride_shared_n,
            h_shared_ptr, first_token, T, F_SHARED, F_SHARED, EVEN_SHARED, EXACT,
        )  # fmt: skip
        n = first + gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
        t = first_token + gl.arange(0, _TOKENS, gl.SliceLayout(0, ACC))
        y_ptrs = rows_ptr + ((slot_count + t.to(gl.int64)) * D)[None, :] + n[:, None]
        mask_t = (t < T)[None, :]
        gl.store(y_ptrs, a.to(dtype), mask=(n < D)[:, None] & mask_t)
        gl.store(y_ptrs + ROWS, b.to(dtype), mask=(n + ROWS < D)[:, None] & mask_t)
    else:
        program -= shared_programs
        expert, start, count = read_block(tables_ptr, slot_count, blocks, program % blocks)
        if count > 0:
            first = program // blocks * (2 * ROWS)
            e_words_ptr = words_ptr + expert * stride_words_e * 4
            e_scale_ptr = scale_ptr + expert * stride_scale_e * SCALE_ALIGN
            a, b = direct(
                e_words_ptr, e_scale_ptr, first, first + ROWS, D - 1, stride_words_n,
                stride_scale_n * SCALE_ALIGN,
                hr_ptr, bias_ptr, zeros_ptr, tables_ptr + start, count, 1, groups, steps, shift,
                TOKENS, HALVES, TILES, EVEN, EXACT,
            )  # fmt: skip
            offs_t = gl.arange(0, TOKENS, gl.SliceLayout(0, a.type.layout))
            mask_t = (offs_t < count)[None, :]
            slots = gl.load(tables_ptr + start + gl.minimum(offs_t, count - 1)).to(gl.int64)
            n = first + gl.arange(0, ROWS, gl.SliceLayout(1, a.type.layout))
            y_ptrs = rows_ptr + (slots * D)[None, :] + n[:, None]
            gl.store(y_ptrs, a.to(dtype), mask=(n < D)[:, None] & mask_t)
            gl.store(y_ptrs + ROWS, b.to(dtype), mask=(n + ROWS < D)[:, None] & mask_t)
