"""The two products of `moe_experts_int4` for many tokens, in Gluon; see `_int4_many_gluon`.

Grids, tables and workspaces are those of `_moe_experts_int4`; there, what the arguments are.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kimi_ops.kernels._int4_many_gluon import OUT, ROWS, dense, product, slots_of, store_rows
from kimi_ops.kernels._moe_blocks import TABLES, read_block


@gluon.jit
def _swiglu(gate, up, dtype: gl.constexpr):
    return (gate / (1.0 + gl.exp(-gate)) * up).to(dtype)


@gluon.jit
def moe_experts_int4_gate_up_gluon_kernel(
    x_ptr,  # [T, D], for the shared expert
    xr_ptr,  # [T, D], rearranged
    units_ptr,  # [E, 2F, D/4] int16
    scale_ptr,  # [E, 2F, D/32]
    shared_ptr,  # [2F', D] or None
    tables_ptr,
    h_ptr,  # [T K, F], rearranged
    h_shared_ptr,  # [T, F']
    stride_x_t,  # in 8 columns, as stride_shared_n
    stride_units_e,  # in groups, as
    stride_units_n,
    stride_scale_e,  # in SPAN groups, as
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
    TOKENS: gl.constexpr,
    SPAN: gl.constexpr,
    STAGES: gl.constexpr,
    HOPPER: gl.constexpr,
    SHARED: gl.constexpr,
):
    program = gl.program_id(0)
    offs_t = gl.arange(0, TOKENS, gl.SliceLayout(0, OUT))
    offs_n = gl.arange(0, ROWS, gl.SliceLayout(1, OUT))
    if SHARED and program < shared_programs:
        n = program // shared_blocks * ROWS
        t = program % shared_blocks * TOKENS
        gate, up = dense(
            shared_ptr, n, F_SHARED - 1, n + F_SHARED, 2 * F_SHARED - 1, stride_shared_n,
            x_ptr, t, T, stride_x_t, groups * 32, TOKENS, HOPPER,
        )  # fmt: skip
        h = gl.convert_layout(_swiglu(gate, up, h_shared_ptr.dtype.element_ty), OUT)
        h_ptrs = h_shared_ptr + ((t + offs_t).to(gl.int64) * F_SHARED)[None, :]
        mask = (n + offs_n < F_SHARED)[:, None] & (t + offs_t < T)[None, :]
        gl.store(h_ptrs + (n + offs_n)[:, None], h, mask=mask)
    else:
        program -= shared_programs
        expert, start, count = read_block(tables_ptr, T * K, blocks, program % blocks)
        shift = gl.load(tables_ptr + T * K + TABLES * blocks)
        if count > 0:
            n = program // blocks * ROWS
            slots_ptr = tables_ptr + start
            gate, up = product(
                units_ptr + expert * stride_units_e * 8, scale_ptr + expert * stride_scale_e * SPAN,
                n, F - 1, n + F, 2 * F - 1, stride_units_n, stride_scale_n,
                xr_ptr, slots_ptr, count, K, groups, shift, TOKENS, SPAN, STAGES, HOPPER,
            )  # fmt: skip
            h = _swiglu(gate, up, h_ptr.dtype.element_ty)
            # Rows are groups of [unit, plane], and lie as [plane, unit].
            h = h.reshape([ROWS // 32, 8, 4, TOKENS]).permute([0, 2, 1, 3]).reshape([ROWS, TOKENS])
            h = gl.convert_layout(h, OUT)
            slots = slots_of(slots_ptr, count, TOKENS, gl.SliceLayout(0, OUT))
            mask = (n + offs_n < F)[:, None] & (offs_t < count)[None, :]
            gl.store(h_ptr + (slots * F)[None, :] + (n + offs_n)[:, None], h, mask=mask)


@gluon.jit
def moe_experts_int4_down_gluon_kernel(
    hr_ptr,  # [T K, F], rearranged
    h_shared_ptr,  # [T, F']
    units_ptr,  # [E, D, F/4] int16
    scale_ptr,  # [E, D, F/32]
    shared_ptr,  # [D, F'] or None
    tables_ptr,
    rows_ptr,  # [T K + T, D]: a row per slot, then the shared expert's
    stride_units_e,  # in groups, as
    stride_units_n,
    stride_scale_e,  # in SPAN groups, as
    stride_scale_n,
    stride_shared_n,  # in 8 columns
    T,
    K,
    D,
    F_SHARED,
    groups,  # F/32
    blocks,
    shared_programs,
    shared_blocks,
    TOKENS: gl.constexpr,
    SPAN: gl.constexpr,
    STAGES: gl.constexpr,
    HOPPER: gl.constexpr,
    SHARED: gl.constexpr,
):
    program = gl.program_id(0)
    slot_count = T * K
    offs_t = gl.arange(0, TOKENS, gl.SliceLayout(0, OUT))
    if SHARED and program < shared_programs:
        n = program // shared_blocks * (2 * ROWS)
        t = program % shared_blocks * TOKENS
        a, b = dense(
            shared_ptr, n, D - 1, n + ROWS, D - 1, stride_shared_n,
            h_shared_ptr, t, T, F_SHARED // 8, F_SHARED, TOKENS, HOPPER,
        )  # fmt: skip
        store_rows(rows_ptr, a, b, n, D, (slot_count + t + offs_t).to(gl.int64), t + offs_t < T)
    else:
        program -= shared_programs
        expert, start, count = read_block(tables_ptr, slot_count, blocks, program % blocks)
        shift = gl.load(tables_ptr + slot_count + TABLES * blocks)
        if count > 0:
            n = program // blocks * (2 * ROWS)
            a, b = product(
                units_ptr + expert * stride_units_e * 8, scale_ptr + expert * stride_scale_e * SPAN,
                n, D - 1, n + ROWS, D - 1, stride_units_n, stride_scale_n,
                hr_ptr, tables_ptr + start, count, 1, groups, shift, TOKENS, SPAN, STAGES, HOPPER,
            )  # fmt: skip
            slots = slots_of(tables_ptr + start, count, TOKENS, gl.SliceLayout(0, OUT))
            store_rows(rows_ptr, a, b, n, D, slots, offs_t < count)
