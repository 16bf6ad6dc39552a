"""Many tokens on int4 weights in Gluon: codes become the matrix unit's operand in registers.

`_int4_many.blocked` passes every weight through shared memory as 16 bits. Here the layouts are
named: a lane's share of a group, two units, is what four neighbouring pairs of columns of the wide
operand are made of, so that weights never leave the registers they are unpacked in::

    step of 128 columns = 4 groups; a warp has 16 rows of W, twice (a and b)

    codes   [64, 32] units   global --cp.async--> shared --ldmatrix--> lane: rows r, r + 8,
    scales  [64, 16]         global --cp.async--> shared -->             units 2 c, 2 c + 1
    x       [TOKENS, 128]    global --cp.async--> shared, read by the matrix unit there (sm_90,
                             wgmma) or by ldmatrix (mma.sync)
    W       [64, 128]        registers: [group, plane, unit] as x is rearranged

STAGES steps are in shared memory, one barrier a step (Triton adds two of its own). Scales come SPAN
groups at a time, 32 bytes of a row where K allows, and have a ring of their own. wgmma reads
registers after it was issued: both products of a step are waited for before the next step writes
them.

Shared memory: 8 KiB of codes and TOKENS / 4 KiB of x a stage, 8 KiB of scales; the tables are in
`_int4_product`. cp.async moves 16 bytes and columns are not masked, so K must hold whole steps and
rows must be aligned: `_int4_many_plan.fits`. Gluon changes with every Triton release: this is for
those that it was compiled with, `_int4_many` for all others.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mma_v2,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kimi_ops.kernels._int4 import (
    FOUR_BF16,
    FOUR_FP16,
    OPERANDS_SCALED,
    SCALED_BF16,
    SCALED_FP16,
    UNITS,
)

ROWS = gl.constexpr(64)  # of the weights, twice in a program
STEP = gl.constexpr(128)  # columns
GROUPS = gl.constexpr(4)
_DENSE_STEP = gl.constexpr(64)
_DENSE_STAGES = gl.constexpr(2)  # no more shared memory than `product`
# Who copies what, 16 bytes a thread (4 warps).
_CODES_IN = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0]))
_X_IN = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
_DENSE_IN = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
_CODES_SHARED = gl.constexpr(gl.SwizzledSharedLayout(8, 2, 4, [1, 0]))
_SCALES_SHARED = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
_X_SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16))
# Codes as ldmatrix deals them out: [row, unit of 4 groups], and [row, group, unit].
_CODES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [8, 0], [0, 8], [0, 16]],
        lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 32],
    )
)
_GROUPED = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [8, 0, 0], [0, 1, 0], [0, 2, 0]],
        lane_bases=[[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0]],
        block_bases=[],
        shape=[64, 4, 8],
    )
)
# Results on their way out: a thread has 8 rows of a token, 16 bytes side by side.
OUT = gl.constexpr(gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1]))


@gluon.jit
def _weights(codes, scale, shift, dtype: gl.constexpr, OPERAND: gl.constexpr):
    """Codes [ROWS, 32] and scales [ROWS, 4] in shared memory -> [ROWS, STEP] in ``dtype``."""
    units = codes.load(_CODES).reshape([ROWS, GROUPS, UNITS])
    units = gl.convert_layout(units, _GROUPED, assert_trivial=True)
    units, scale = gl.broadcast(units, gl.expand_dims(scale.load(gl.SliceLayout(2, _GROUPED)), 2))
    wide = gl.full([ROWS, GROUPS, UNITS], 0, gl.int32, _GROUPED) + shift
    if dtype == gl.bfloat16:
        p0, p1, p2, p3 = gl.inline_asm_elementwise(
            SCALED_BF16, OPERANDS_SCALED, [units, wide, scale],
            dtype=FOUR_BF16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        p0, p1, p2, p3 = gl.inline_asm_elementwise(
            SCALED_FP16, OPERANDS_SCALED, [units, wide, scale],
            dtype=FOUR_FP16, is_pure=True, pack=2,
        )  # fmt: skip
    planes = gl.join(gl.join(p0, p2), gl.join(p1, p3)).reshape([ROWS, GROUPS, UNITS, 4])
    return gl.convert_layout(
        planes.permute([0, 1, 3, 2]).reshape([ROWS, STEP]), OPERAND, assert_trivial=True
    )


@gluon.jit
def _rows(ptr, first, last, stride, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """Pointers to columns 0 .. of rows ``first ..``; rows behind ``last`` repeat it."""
    rows = gl.minimum(first + gl.arange(0, ROWS, gl.SliceLayout(1, layout)), last).to(gl.int64)
    offs = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    return ptr + (rows * stride)[:, None] + offs[None, :]


@gluon.jit
def _copy(shared, ptrs, there):
    """Starts a copy of all of ``ptrs``, or of zeros."""
    mask = gl.full(ptrs.shape, 1, gl.int1, ptrs.type.layout) & there
    async_copy.async_copy_global_to_shared(shared, ptrs, mask=mask)


@gluon.jit
def slots_of(slots_ptr, count, TOKENS: gl.constexpr, layout: gl.constexpr):
    """The slots of a block, int64; those from ``count`` on repeat the last one."""
    column = gl.minimum(gl.arange(0, TOKENS, layout), count - 1)
    if slots_ptr is not None:
        column = gl.load(slots_ptr + column)
    return column.to(gl.int64)


@gluon.jit
def product(
    units_ptr,  # int16, at the expert
    scale_ptr,
    first_a,  # rows of the weights
    last_a,
    first_b,
    last_b,
    stride_units_n,  # in groups
    stride_scale_n,  # in SPAN groups
    x_ptr,  # [.., K/32, 4, 8], as `_int4.rearrange` leaves it
    slots_ptr,  # at the block; None: they are 0, 1, 2, ..
    count,
    slots_per_row,
    groups,
    shift,  # `_int4.SHIFT`
    TOKENS: gl.constexpr,
    SPAN: gl.constexpr,
    STAGES: gl.constexpr,
    HOPPER: gl.constexpr,
):
    """W x^T of two sets of ROWS rows for ``count`` slots: two float32 [ROWS, TOKENS].

    The row of x that belongs to a slot is slot // slots_per_row.
    """
    if HOPPER:
        ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    else:
        ACC: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    SCALES_IN: gl.constexpr = gl.BlockedLayout(
        [1, min(SPAN, 8)], [16 if SPAN == 16 else 32, 2 if SPAN == 16 else 1], [4, 1], [1, 0]
    )
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    PER: gl.constexpr = SPAN // GROUPS  # steps per load of scales
    SPANS: gl.constexpr = 2 if PER >= STAGES else STAGES
    AHEAD: gl.constexpr = STAGES - 1
    units_n: gl.constexpr = UNITS * GROUPS

    a_codes = gl.allocate_shared_memory(gl.int16, [STAGES, ROWS, units_n], _CODES_SHARED)
    b_codes = gl.allocate_shared_memory(gl.int16, [STAGES, ROWS, units_n], _CODES_SHARED)
    a_scales = gl.allocate_shared_memory(dtype, [SPANS, ROWS, SPAN], _SCALES_SHARED)
    b_scales = gl.allocate_shared_memory(dtype, [SPANS, ROWS, SPAN], _SCALES_SHARED)
    xs = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, STEP], _X_SHARED)

    stride_units, stride_scale = stride_units_n * UNITS, stride_scale_n * SPAN
    a_ptrs = _rows(units_ptr, first_a, last_a, stride_units, units_n, _CODES_IN)
    b_ptrs = _rows(units_ptr, first_b, last_b, stride_units, units_n, _CODES_IN)
    sa_ptrs = _rows(scale_ptr, first_a, last_a, stride_scale, SPAN, SCALES_IN)
    sb_ptrs = _rows(scale_ptr, first_b, last_b, stride_scale, SPAN, SCALES_IN)
    x_rows = slots_of(slots_ptr, count, TOKENS, gl.SliceLayout(1, _X_IN)) // slots_per_row
    offs_k = gl.arange(0, STEP, gl.SliceLayout(0, _X_IN))
    x_ptrs = x_ptr + (x_rows * (groups * 32))[:, None] + offs_k[None, :]

    steps = groups // GROUPS
    for early in gl.static_range(AHEAD):
        if early % PER == 0:
            _copy(a_scales.index(early // PER), sa_ptrs + early * GROUPS, early < steps)
            _copy(b_scales.index(early // PER), sb_ptrs + early * GROUPS, early < steps)
        _copy(a_codes.index(early), a_ptrs + early * units_n, early < steps)
        _copy(b_codes.index(early), b_ptrs + early * units_n, early < steps)
        _copy(xs.index(early), x_ptrs + early * STEP, early < steps)
        async_copy.commit_group()

    acc_a = gl.zeros([ROWS, TOKENS], gl.float32, ACC)
    acc_b = gl.zeros([ROWS, TOKENS], gl.float32, ACC)
    for span in range(0, steps // PER):
        for j in gl.static_range(PER):
            step = span * PER + j
            async_copy.wait_group(AHEAD - 1)
            if HOPPER:
                # cp.async wrote x through the generic proxy, wgmma reads through the other one.
                fence_async_shared()
            gl.barrier()  # this step is there, and all warps are done with the one before
            new = step + AHEAD
            if (j + AHEAD) % PER == 0:
                _copy(a_scales.index(new // PER % SPANS), sa_ptrs + new * GROUPS, new < steps)
                _copy(b_scales.index(new // PER % SPANS), sb_ptrs + new * GROUPS, new < steps)
            _copy(a_codes.index(new % STAGES), a_ptrs + new * units_n, new < steps)
            _copy(b_codes.index(new % STAGES), b_ptrs + new * units_n, new < steps)
            _copy(xs.index(new % STAGES), x_ptrs + new * STEP, new < steps)
            async_copy.commit_group()
            stage = step % STAGES
            a_scale = a_scales.index(span % SPANS).slice(j * GROUPS, GROUPS, 1)
            b_scale = b_scales.index(span % SPANS).slice(j * GROUPS, GROUPS, 1)
            x = xs.index(stage).permute([1, 0])
            if HOPPER:
                a = _weights(a_codes.index(stage), a_scale, shift, dtype, OPERAND)
                acc_a = warpgroup_mma(a, x, acc_a, is_async=True)
                b = _weights(b_codes.index(stage), b_scale, shift, dtype, OPERAND)
                acc_b = warpgroup_mma(b, x, acc_b, is_async=True)
                acc_a, acc_b = warpgroup_mma_wait(0, [acc_a, acc_b])
            else:
                x = x.load(gl.DotOperandLayout(1, ACC, 2))
                a = _weights(a_codes.index(stage), a_scale, shift, dtype, OPERAND)
                acc_a = mma_v2(a, x, acc_a)
                b = _weights(b_codes.index(stage), b_scale, shift, dtype, OPERAND)
                acc_b = mma_v2(b, x, acc_b)
    async_copy.wait_group(0)
    gl.barrier()  # what comes next may have the same shared memory
    return acc_a, acc_b


@gluon.jit
def dense(
    w_ptr,  # like x
    first_a,  # rows of the weights
    last_a,
    first_b,
    last_b,
    stride_w_n,  # in 8 columns, as stride_x_t
    x_ptr,
    first_t,
    T,
    stride_x_t,
    K,
    TOKENS: gl.constexpr,
    HOPPER: gl.constexpr,
):
    """W x^T, 16-bit weights, for tokens ``first_t ..``: two float32 [ROWS, TOKENS]."""
    if HOPPER:
        ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    else:
        ACC: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8])
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    wa = gl.allocate_shared_memory(dtype, [_DENSE_STAGES, ROWS, _DENSE_STEP], _X_SHARED)
    wb = gl.allocate_shared_memory(dtype, [_DENSE_STAGES, ROWS, _DENSE_STEP], _X_SHARED)
    xs = gl.allocate_shared_memory(dtype, [_DENSE_STAGES, TOKENS, _DENSE_STEP], _X_SHARED)
    a_ptrs = _rows(w_ptr, first_a, last_a, stride_w_n * 8, _DENSE_STEP, _DENSE_IN)
    b_ptrs = _rows(w_ptr, first_b, last_b, stride_w_n * 8, _DENSE_STEP, _DENSE_IN)
    tokens = first_t + gl.arange(0, TOKENS, gl.SliceLayout(1, _DENSE_IN))
    tokens = gl.minimum(tokens, T - 1).to(gl.int64)
    offs_k = gl.arange(0, _DENSE_STEP, gl.SliceLayout(0, _DENSE_IN))
    x_ptrs = x_ptr + (tokens * (stride_x_t * 8))[:, None] + offs_k[None, :]
    steps = K // _DENSE_STEP
    for early in gl.static_range(_DENSE_STAGES - 1):
        _copy(wa.index(early), a_ptrs + early * _DENSE_STEP, early < steps)
        _copy(wb.index(early), b_ptrs + early * _DENSE_STEP, early < steps)
        _copy(xs.index(early), x_ptrs + early * _DENSE_STEP, early < steps)
        async_copy.commit_group()
    acc_a = gl.zeros([ROWS, TOKENS], gl.float32, ACC)
    acc_b = gl.zeros([ROWS, TOKENS], gl.float32, ACC)
    for step in range(0, steps):
        async_copy.wait_group(_DENSE_STAGES - 2)
        if HOPPER:
            fence_async_shared()
        gl.barrier()
        new = step + _DENSE_STAGES - 1
        _copy(wa.index(new % _DENSE_STAGES), a_ptrs + new * _DENSE_STEP, new < steps)
        _copy(wb.index(new % _DENSE_STAGES), b_ptrs + new * _DENSE_STEP, new < steps)
        _copy(xs.index(new % _DENSE_STAGES), x_ptrs + new * _DENSE_STEP, new < steps)
        async_copy.commit_group()
        stage = step % _DENSE_STAGES
        x = xs.index(stage).permute([1, 0])
        if HOPPER:
            acc_a = warpgroup_mma(wa.index(stage), x, acc_a, is_async=True)
            acc_b = warpgroup_mma(wb.index(stage), x, acc_b, is_async=True)
            acc_a, acc_b = warpgroup_mma_wait(0, [acc_a, acc_b])
        else:
            OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
            x = x.load(gl.DotOperandLayout(1, ACC, 2))
            acc_a = mma_v2(wa.index(stage).load(OPERAND), x, acc_a)
            acc_b = mma_v2(wb.index(stage).load(OPERAND), x, acc_b)
    async_copy.wait_group(0)
    gl.barrier()
    return acc_a, acc_b


@gluon.jit
def store_rows(y_ptr, a, b, n, N, rows, mask_t):
    """Writes W rows ``n ..`` of two [ROWS, TOKENS] as columns of the rows of y [.., N]."""
    offs_n = n + gl.arange(0, ROWS, gl.SliceLayout(1, OUT))
    y_ptrs = y_ptr + (rows * N)[None, :] + offs_n[:, None]
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    a = gl.convert_layout(a.to(dtype), OUT)
    gl.store(y_ptrs, a, mask=(offs_n < N)[:, None] & mask_t[None, :])
    b = gl.convert_layout(b.to(dtype), OUT)
    gl.store(y_ptrs + ROWS, b, mask=(offs_n + ROWS < N)[:, None] & mask_t[None, :])
