"""Triton kernels of `kimi_ops.int4_linear`: y = x W^T with int4 weights, two launches.

    prepare   program = (row of x, 1,024 columns): x rearranged as the product wants it
    product   program = (block of rows of x, 2 BN rows of W); blocks fastest, so that those of the
              same weights run at about the same time and all but the first find them in L2

                     rows of x ->   block 0 | block 1 | ...        block: 1, 2, 4, 8 (separated) or
        W rows 0 .. 2 BN - 1           0    |    1    |            16, 32, 64 rows (blocked); the
        W rows 2 BN .. 4 BN - 1       ...   |   ...   |            tiles are those of the experts

The forms and their numerics are those of `_int4_few` and `_int4_many`, and where
`_int4_many_plan` says so of `_int4_many_gluon`; tables in `_int4_product`.
Bytes: 0.5625 per weight with 16-bit scales, once per block of rows; x and y are a few percent.
In batch-invariant mode a block has 16 rows whatever the batch. No sum is split over programs, so
results are equal from run to run.

Source: compressed-tensors ``pack-quantized``, as in the Kimi K2.5 checkpoint.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_ops import _target
from kimi_ops.kernels import _int4, _int4_many_plan
from kimi_ops.kernels._int4_product import Tile, compiled_tiles, product, tile_for

BATCH_INVARIANT = True  # then `tile_for` has one answer

_PREPARE_GROUPS = 32  # 1,024 columns of x


@triton.jit
def int4_linear_prepare_kernel(
    x_ptr,  # [T, K]
    xr_ptr,  # [T, K], rearranged
    bias_ptr,  # [T, K/32] float32
    shift_ptr,  # [1]
    stride_x_t,
    stride_x_k,
    groups,  # K/32
    SEPARATED: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    _int4.rearrange(
        x_ptr + row * stride_x_t, stride_x_k, xr_ptr + row * groups * 32, bias_ptr + row * groups,
        chunk * BLOCK_G, groups, SEPARATED, BLOCK_G,
    )  # fmt: skip
    if row == 0 and chunk == 0:
        tl.store(shift_ptr, _int4.SHIFT)


@triton.jit
def int4_linear_kernel(
    xr_ptr,  # [T, K], rearranged
    bias_ptr,  # [T, K/32]
    shift_ptr,  # [1]
    units_ptr,  # [N, K/4] int16
    scale_ptr,  # [N, K/32]
    y_ptr,  # [T, N], contiguous
    stride_units_n,  # in groups
    stride_scale_n,
    T,
    N,
    groups,  # K/32
    blocks,
    TOKENS: tl.constexpr,
    GS: tl.constexpr,
    TILES: tl.constexpr,
    BN: tl.constexpr,
    SEPARATED: tl.constexpr,
    EVEN: tl.constexpr,  # K holds whole steps
    EXACT: tl.constexpr,  # N holds whole tiles
    ASSEMBLY: tl.constexpr,
):
    program = tl.program_id(0)
    first = program % blocks * TOKENS
    n = program // blocks * (2 * BN) + tl.arange(0, BN)  # [BN]
    rows_a = _int4.inside(n, N, EXACT).to(tl.int64)
    rows_b = _int4.inside(n + BN, N, EXACT).to(tl.int64)
    count = tl.minimum(T - first, TOKENS)
    row = tl.cast(first, tl.int64)
    shift = tl.load(shift_ptr + tl.zeros([1, 1], tl.int32))
    a, b = product(
        units_ptr, scale_ptr, rows_a, rows_b, stride_units_n, stride_scale_n,
        xr_ptr + row * groups * 32, bias_ptr + row * groups, None, count, 1, groups, shift,
        TOKENS, GS, TILES, SEPARATED, EVEN, ASSEMBLY,
    )  # fmt: skip
    offs_t = tl.arange(0, TOKENS)
    mask_t = (offs_t < count)[None, :]
    y_ptrs = y_ptr + ((row + offs_t) * N)[None, :]
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    tl.store(y_ptrs + rows_a[:, None], a.to(dtype), mask=(n < N)[:, None] & mask_t)
    tl.store(y_ptrs + rows_b[:, None], b.to(dtype), mask=(n + BN < N)[:, None] & mask_t)


class _Call:
    """A call's workspaces and tile, and the arguments of its launches."""

    def __init__(
        self, y: Tensor, x: Tensor, packed: Tensor, scale: Tensor, tile: Tile | None = None
    ) -> None:
        T, K = x.shape
        N = packed.shape[0]
        groups = K // 32
        gluon = _int4_many_plan.fits(x, (scale,), ())
        self.tile = tile or tile_for(x.device, T, T, 1, gluon=gluon)
        xr = torch.empty((T, K), dtype=x.dtype, device=x.device)
        bias = torch.empty((T, groups), dtype=torch.float32, device=x.device)
        shift = torch.empty(1, dtype=torch.int32, device=x.device)
        self.prepare_grid = (T, triton.cdiv(groups, _PREPARE_GROUPS))
        self.prepare = {
            "x_ptr": x,
            "xr_ptr": xr,
            "bias_ptr": bias,
            "shift_ptr": shift,
            "stride_x_t": x.stride(0),
            "stride_x_k": x.stride(1),
            "groups": groups,
            "SEPARATED": self.tile.separated,
            "BLOCK_G": _PREPARE_GROUPS,
        }
        units, strides = _int4.units(packed)
        blocks = triton.cdiv(T, self.tile.tokens)
        self.grid = (blocks * triton.cdiv(N, 2 * self.tile.rows),)
        self.product = {
            "xr_ptr": xr,
            "shift_ptr": shift,
            "units_ptr": units,
            "scale_ptr": scale,
            "y_ptr": y,
            "stride_units_n": strides[0],
            "stride_scale_n": scale.stride(0),
            "T": T,
            "N": N,
            "groups": groups,
            "blocks": blocks,
        }
        if self.tile.gluon:
            self.product |= _int4_many_plan.constants(self.tile, groups, x.device)
            self.product["stride_scale_n"] = _int4_many_plan.scale_strides(scale)[0]
        else:
            self.product |= {
                "bias_ptr": bias,
                "TOKENS": self.tile.tokens,
                "GS": self.tile.groups,
                "TILES": self.tile.steps,
                "BN": self.tile.rows,
                "SEPARATED": self.tile.separated,
                "EVEN": groups % (self.tile.groups * self.tile.steps) == 0,
                "EXACT": N % (2 * self.tile.rows) == 0,
                "ASSEMBLY": _int4.takes_assembly(x.device),
            }

    @property
    def kernel(self) -> Any:
        """That of the product."""
        if self.tile.gluon:
            module = importlib.import_module("kimi_ops.kernels._int4_linear_gluon")
            return module.int4_linear_gluon_kernel
        return int4_linear_kernel


def unsupported(x: Tensor, packed: Tensor, scale: Tensor) -> str | None:
    return _int4.refusal("int4_linear", x, {"packed": (packed, scale)}, {})


def launch(y: Tensor, x: Tensor, packed: Tensor, scale: Tensor) -> None:
    if y.numel() == 0:
        return
    if x.shape[-1] == 0:
        y.zero_()
        return
    call = _Call(y, x.reshape(-1, x.shape[-1]), packed, scale)
    int4_linear_prepare_kernel[call.prepare_grid](**call.prepare, num_warps=4)
    call.kernel[call.grid](**call.product, **call.tile.options)


def static_cases() -> Iterable[Any]:
    """Every tile at a width of Kimi K2.5 and at one that no tile divides, in both dtypes."""
    from kimi_ops.testing.static import StaticCase

    for tile, arches, gpu in compiled_tiles():
        odd = (7200, 2176) if tile.gluon else (7200, 2080)
        for dtype, n, k in ((torch.bfloat16, 7168, 2048), (torch.float16, *odd)):
            rows = max(tile.tokens, 2)
            x = torch.empty(rows, k, dtype=dtype, device="meta")
            y = torch.empty(rows, n, dtype=dtype, device="meta")
            packed = torch.empty(n, k // 8, dtype=torch.int32, device="meta")
            scale = torch.empty(n, k // 32, dtype=dtype, device="meta")
            with _target.targeting(gpu):
                call = _Call(y, x, packed, scale, tile)
            name = f"{'gluon_' * tile.gluon}{tile.tokens}_{n}x{k}_{arches[0]}"
            yield StaticCase.of_call(
                name,
                call.kernel,
                call.product,
                num_warps=tile.warps,
                num_stages=tile.stages,
                options={"maxnreg": tile.registers} if tile.registers else {},
                arches=arches,
            )
            if arches[0] == "sm_80" and not tile.gluon:
                yield StaticCase.of_call(
                    f"prepare_{name}", int4_linear_prepare_kernel, call.prepare
                )
