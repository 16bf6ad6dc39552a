"""The four kernels of `moe_experts_int4`, in launch order; the plan is in `moe_experts_int4`."""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_ops.kernels import _int4, _moe_blocks
from kimi_ops.kernels._int4_many import dense
from kimi_ops.kernels._int4_product import product


@triton.jit
def moe_experts_int4_prepare_kernel(
    x_ptr,  # [T, D]
    xr_ptr,  # [T, D], rearranged; if lifted 256 zeros behind it
    bias_ptr,  # [T, D/32] float32; if lifted [T, 2, D/32]
    ids_ptr,  # [T, K]
    tables_ptr,
    stride_x_t,
    stride_x_d,
    stride_ids_t,
    stride_ids_k,
    experts,
    slot_count,
    K,
    first,
    blocks,
    groups,  # D/32
    chunks,  # of BLOCK_G groups in a row
    TOKENS: tl.constexpr,
    SEPARATED: tl.constexpr,
    LIFTED: tl.constexpr,  # for `_moe_experts_int4_direct`
    BY_SLOT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    program = tl.program_id(0)
    if program < experts:
        _moe_blocks.write_blocks(
            program, experts, ids_ptr, stride_ids_t, stride_ids_k, slot_count, K, first,
            tables_ptr, blocks, TOKENS, BY_SLOT, BLOCK_S,
        )  # fmt: skip
    else:
        row = ((program - experts) // chunks).to(tl.int64)
        g0 = (program - experts) % chunks * BLOCK_G
        x_ptr += row * stride_x_t
        if LIFTED:
            width = (groups + 1) // 2 * 64
            out_ptr = xr_ptr + row * width
            bias_ptr += row * groups * 2
            _int4.rearrange_lifted(x_ptr, stride_x_d, out_ptr, bias_ptr, g0, groups, BLOCK_G)
            if program == experts:
                T = (tl.num_programs(0) - experts) // chunks
                zero = tl.zeros([256], xr_ptr.dtype.element_ty)
                zeros_ptr = xr_ptr + tl.cast(T, tl.int64) * width
                tl.store(zeros_ptr + tl.arange(0, 256), zero)
        else:
            out_ptr = xr_ptr + row * groups * 32
            bias_ptr += row * groups
            _int4.rearrange(x_ptr, stride_x_d, out_ptr, bias_ptr, g0, groups, SEPARATED, BLOCK_G)


@triton.jit
def moe_experts_int4_gate_up_kernel(
    x_ptr,  # [T, D], for the shared expert
    xr_ptr,  # [T, D], rearranged
    bias_ptr,  # [T, D/32]
    units_ptr,  # [E, 2F, D/4] int16
    scale_ptr,  # [E, 2F, D/32]
    shared_ptr,  # [2F', D] or None
    tables_ptr,
    h_ptr,  # [T K, F], rearranged
    h_bias_ptr,  # [T K, F/32]
    h_shared_ptr,  # [T, F']
    stride_x_t,
    stride_units_e,  # in groups, as
    stride_units_n,
    stride_scale_e,
    stride_scale_n,
    stride_shared_n,
    T,
    K,
    F,
    F_SHARED,
    groups,  # D/32
    blocks,
    shared_programs,
    shared_blocks,
    TOKENS: tl.constexpr,
    GS: tl.constexpr,
    TILES: tl.constexpr,
    BN: tl.constexpr,
    BLOCK_TS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SEPARATED: tl.constexpr,
    EVEN: tl.constexpr,  # K of the product holds whole steps
    EXACT: tl.constexpr,  # and its rows whole tiles
    EVEN_SHARED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    SHARED: tl.constexpr,
):
    program = tl.program_id(0)
    offs_n = tl.arange(0, BN)
    if SHARED and program < shared_programs:
        n = program // shared_blocks * BN + offs_n  # [BN]
        offs_t = program % shared_blocks * BLOCK_TS + tl.arange(0, BLOCK_TS)  # [BLOCK_TS]
        rows = tl.minimum(n, F_SHARED - 1).to(tl.int64)
        tokens = tl.minimum(offs_t, T - 1).to(tl.int64)
        gate, up = dense(
            shared_ptr, rows, rows + F_SHARED, stride_shared_n, x_ptr, tokens, stride_x_t,
            groups * 32, BLOCK_K, EVEN_SHARED,
        )  # fmt: skip
        h = (gate / (1.0 + tl.exp(-gate)) * up).to(h_shared_ptr.dtype.element_ty)
        mask = (n < F_SHARED)[:, None] & (offs_t < T)[None, :]
        tl.store(h_shared_ptr + (tokens * F_SHARED)[None, :] + rows[:, None], h, mask=mask)
    else:
        program -= shared_programs
        slot_count = T * K
        block = program % blocks
        expert, start, count = _moe_blocks.read_block(tables_ptr, slot_count, blocks, block)
        if count > 0:
            shift = _moe_blocks.read_shift(tables_ptr, slot_count, blocks)
            n = program // blocks * BN + offs_n  # [BN]
            rows = _int4.inside(n, F, EXACT).to(tl.int64)
            e_units_ptr = units_ptr + expert * stride_units_e * _int4.UNITS
            e_scale_ptr = scale_ptr + expert * stride_scale_e
            gate, up = product(
                e_units_ptr, e_scale_ptr, rows, rows + F, stride_units_n, stride_scale_n,
                xr_ptr, bias_ptr, tables_ptr + start, count, K, groups, shift,
                TOKENS, GS, TILES, SEPARATED, EVEN, ASSEMBLY,
            )  # fmt: skip
            h = (gate / (1.0 + tl.exp(-gate)) * up).to(h_ptr.dtype.element_ty)
            offs_t = tl.arange(0, TOKENS)
            mask_t = (offs_t < count)[None, :]
            slots = tl.load(tables_ptr + start + tl.minimum(offs_t, count - 1)).to(tl.int64)
            at = _int4.rearranged(rows, F // 32, SEPARATED)[:, None]
            tl.store(h_ptr + (slots * F)[None, :] + at, h, mask=(n < F)[:, None] & mask_t)
            if SEPARATED:
                offs_g = program // blocks * (BN // 32) + tl.arange(0, BN // 32)
                sums = tl.sum(h.to(tl.float32).reshape(BN // 32, 32, TOKENS), 1)
                sums *= -_int4.bias_of(h_ptr.dtype.element_ty)
                g_ptrs = h_bias_ptr + (slots * (F // 32))[None, :] + offs_g[:, None]
                tl.store(g_ptrs, sums, mask=(offs_g < F // 32)[:, None] & mask_t)


@triton.jit
def moe_experts_int4_down_kernel(
    hr_ptr,  # [T K, F], rearranged
    bias_ptr,  # [T K, F/32]
    h_shared_ptr,  # [T, F']
    units_ptr,  # [E, D, F/4] int16
    scale_ptr,  # [E, D, F/32]
    shared_ptr,  # [D, F'] or None
    tables_ptr,
    rows_ptr,  # [T K + T, D]: a row per slot, then the shared expert's
    stride_units_e,  # in groups, as
    stride_units_n,
    stride_scale_e,
    stride_scale_n,
    stride_shared_n,
    T,
    K,
    D,
    F_SHARED,
    groups,  # F/32
    blocks,
    shared_programs,
    shared_blocks,
    TOKENS: tl.constexpr,
    GS: tl.constexpr,
    TILES: tl.constexpr,
    BN: tl.constexpr,
    BLOCK_TS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SEPARATED: tl.constexpr,
    EVEN: tl.constexpr,  # K of the product holds whole steps
    EXACT: tl.constexpr,  # and its rows whole tiles
    EVEN_SHARED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    SHARED: tl.constexpr,
):
    program = tl.program_id(0)
    slot_count = T * K
    offs_n = tl.arange(0, BN)
    if SHARED and program < shared_programs:
        n = program // shared_blocks * (2 * BN) + offs_n  # [BN]
        offs_t = program % shared_blocks * BLOCK_TS + tl.arange(0, BLOCK_TS)  # [BLOCK_TS]
        rows_a = tl.minimum(n, D - 1).to(tl.int64)
        rows_b = tl.minimum(n + BN, D - 1).to(tl.int64)
        tokens = tl.minimum(offs_t, T - 1).to(tl.int64)
        a, b = dense(
            shared_ptr, rows_a, rows_b, stride_shared_n, h_shared_ptr, tokens, F_SHARED,
            F_SHARED, BLOCK_K, EVEN_SHARED,
        )  # fmt: skip
        y_ptrs = rows_ptr + ((slot_count + tokens) * D)[None, :]
        mask_t = (offs_t < T)[None, :]
        y_dtype: tl.constexpr = rows_ptr.dtype.element_ty
        tl.store(y_ptrs + rows_a[:, None], a.to(y_dtype), mask=(n < D)[:, None] & mask_t)
        tl.store(y_ptrs + rows_b[:, None], b.to(y_dtype), mask=(n + BN < D)[:, None] & mask_t)
    else:
        program -= shared_programs
        block = program % blocks
        expert, start, count = _moe_blocks.read_block(tables_ptr, slot_count, blocks, block)
        if count > 0:
            shift = _moe_blocks.read_shift(tables_ptr, slot_count, blocks)
            n = program // blocks * (2 * BN) + offs_n  # [BN]
            rows_a = _int4.inside(n, D, EXACT).to(tl.int64)
            rows_b = _int4.inside(n + BN, D, EXACT).to(tl.int64)
            e_units_ptr = units_ptr + expert * stride_units_e * _int4.UNITS
            e_scale_ptr = scale_ptr + expert * stride_scale_e
            a, b = product(
                e_units_ptr, e_scale_ptr, rows_a, rows_b, stride_units_n, stride_scale_n,
                hr_ptr, bias_ptr, tables_ptr + start, count, 1, groups, shift,
                TOKENS, GS, TILES, SEPARATED, EVEN, ASSEMBLY,
            )  # fmt: skip
            offs_t = tl.arange(0, TOKENS)
            mask_t = (offs_t < count)[None, :]
            slots = tl.load(tables_ptr + start + tl.minimum(offs_t, count - 1)).to(tl.int64)
            y_ptrs = rows_ptr + (slots * D)[None, :]
            y_dtype: tl.constexpr = rows_ptr.dtype.element_ty
            tl.store(y_ptrs + rows_a[:, None], a.to(y_dtype), mask=(n < D)[:, None] & mask_t)
            tl.store(y_ptrs + rows_b[:, None], b.to(y_dtype), mask=(n + BN < D)[:, None] & mask_t)


@triton.jit
def moe_experts_int4_sum_kernel(
    rows_ptr,  # [T K + T, D]
    ids_ptr,  # [T, K]
    weights_ptr,  # [T, K]
    y_ptr,  # [T, D]
    stride_ids_t,
    stride_ids_k,
    stride_weights_t,
    stride_weights_k,
    T,
    K,
    D,
    first,
    last,
    ROUTED: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask_d = offs_d < D
    y = tl.zeros([BLOCK_D], tl.float32)
    if ROUTED:
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
            mask_k = k < K
            ids_ptrs = ids_ptr + t * stride_ids_t + k.to(tl.int64) * stride_ids_k
            w_ptrs = weights_ptr + t * stride_weights_t + k.to(tl.int64) * stride_weights_k
            ids = tl.load(ids_ptrs, mask=mask_k, other=0).to(tl.int64)
            local = mask_k & (ids >= first) & (ids < last)  # no other slot has been written
            weight = tl.load(w_ptrs, mask=local, other=0.0).to(tl.float32)
            mask = local[:, None] & mask_d[None, :]
            row_ptrs = rows_ptr + ((t * K + k) * D)[:, None] + offs_d[None, :]
            rows = tl.load(row_ptrs, mask=mask, other=0.0).to(tl.float32)
            y += tl.sum(rows * weight[:, None], 0)
    if SHARED:
        row_ptrs = rows_ptr + (tl.cast(T, tl.int64) * K + t) * D + offs_d
        y += tl.load(row_ptrs, mask=mask_d, other=0.0).to(tl.float32)
    tl.store(y_ptr + t * D + offs_d, y.to(y_ptr.dtype.element_ty), mask=mask_d)
