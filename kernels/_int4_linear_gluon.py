"""The product of `int4_linear` for many rows, in Gluon; see `_int4_many_gluon`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kimi_ops.kernels._int4_many_gluon import OUT, ROWS, product, store_rows


@gluon.jit
def int4_linear_gluon_kernel(
    xr_ptr,  # [T, K], rearranged
    shift_ptr,  # [1]
    units_ptr,  # [N, K/4] int16
    scale_ptr,  # [N, K/32]
    y_ptr,  # [T, N], contiguous
    stride_units_n,  # in groups
    stride_scale_n,  # in SPAN groups
    T,
    N,
    groups,  # K/32
    blocks,
    TOKENS: gl.constexpr,
    SPAN: gl.constexpr,
    STAGES: gl.constexpr,
    HOPPER: gl.constexpr,
):
    program = gl.program_id(0)
    first = (program % blocks * TOKENS).to(gl.int64)
    n = program // blocks * (2 * ROWS)
    count = gl.minimum(T - first, TOKENS)
    a, b = product(
        units_ptr, scale_ptr, n, N - 1, n + ROWS, N - 1, stride_units_n, stride_scale_n,
        xr_ptr + first * (groups * 32), None, count, 1, groups, gl.load(shift_ptr),
        TOKENS, SPAN, STAGES, HOPPER,
    )  # fmt: skip
    offs_t = gl.arange(0, TOKENS, gl.SliceLayout(0, OUT))
    store_rows(y_ptr, a, b, n, N, first + offs_t, offs_t < count)
