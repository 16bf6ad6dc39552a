"""Triton kernel of `kimi_ops.silu_mul`: y = gate / (1 + exp(-gate)) * up, one launch.

Grid: ``(cdiv(T, BLOCK_T), cdiv(F, BLOCK_F))`` for the T rows that all leading dimensions make:

    gate_up [T, 2F]   | gate 0 .. F | up F .. 2F |   program (t, f) reads the same columns of both
    y       [T, F]    | 0 ....... F |                halves and writes them once

Bytes: 6 an element of y in 16-bit dtypes, each once; bound by memory. Numerics: float32 inside,
one rounding at the end. In float32 exp is exact to two units: the argument is reduced before the
machine's 2^x sees it, which for large arguments would otherwise be off by twenty.

Source: Shazeer, arXiv 2002.05202; Cody and Waite, Software Manual for the Elementary Functions,
chapter 6 (reduction of the argument of exp).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_ops._strided_rows import or_packed
from kimi_ops.kernels._rows import Tile, row_offsets
from kimi_ops.kernels._tiles import TileChoice

BATCH_INVARIANT = True  # tiles follow from the width of a row alone


# 8 elements per thread of 4 warps: one 16-byte load of each half in 16-bit dtypes. Narrow rows
# share a program.
_TILES = {64: Tile(16, 64, 4)}
_WIDE = Tile(1, 1024, 4)
_GRID_Y = 65535  # most programs in the second dimension of a CUDA grid


def _tile(width: int) -> Tile:
    return next((tile for most, tile in _TILES.items() if width <= most), _WIDE)


def _candidates(width: int, element_bytes: int) -> tuple[Tile, ...]:
    """8 to 32 values a thread; several rows only where they are whole; what fits the grid."""
    return tuple(
        Tile(rows, columns, warps)
        for warps in (1, 2, 4, 8)
        for rows, columns in ((16, 64), (8, 128), (4, 256), (1, 512), (1, 1024), (1, 2048))
        if (rows == 1 or columns >= width)
        and columns < max(128, 2 * width)
        and triton.cdiv(width, columns) <= _GRID_Y
        and 8 <= rows * columns // (32 * warps) <= 32
    )


TILES = TileChoice("silu_mul", _candidates, row=("width", "element_bytes"))


@triton.jit
def exp_float32(x):
    """exp of float32, within two units in the last place; 0 and infinity beyond the range."""
    x = tl.minimum(tl.maximum(x, -104.0), 104.0)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = tl.fma(n, -0.693145751953125, x)  # the upper 15 bits of log 2: this product is exact
    r = tl.fma(n, -1.428606765330187e-06, r)
    half = tl.floor(n * 0.5)  # 2^n in two factors, as 2^128 alone would overflow
    return tl.exp2(r * 1.4426950408889634) * tl.exp2(half) * tl.exp2(n - half)


@triton.jit
def silu_mul_kernel(
    gate_up_ptr,  # [T, 2F]
    y_ptr,  # [T, F], contiguous
    rows,
    width,
    inner,
    stride_outer,
    stride_inner,
    stride_f,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    offs_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    mask = (offs_t < rows)[:, None] & (offs_f < width)[None, :]
    gate_ptr = gate_up_ptr + row_offsets(offs_t, inner, stride_outer, stride_inner)[:, None]
    gate_ptr += (offs_f.to(tl.int64) * stride_f)[None, :]
    up_ptr = gate_ptr + tl.cast(width, tl.int64) * stride_f

    gate = tl.load(gate_ptr, mask=mask, other=0.0)
    up = tl.load(up_ptr, mask=mask, other=0.0).to(tl.float32)
    if gate.dtype == tl.float32:
        silu = tl.div_rn(gate, 1.0 + exp_float32(-gate))
    else:
        wide = gate.to(tl.float32)
        silu = wide / (1.0 + tl.exp(-wide))
    y = (silu * up).to(y_ptr.dtype.element_ty)
    y_rows = (offs_t.to(tl.int64) * width)[:, None]
    tl.store(y_ptr + y_rows + offs_f[None, :], y, mask=mask)


def _arguments(y: Tensor, gate_up: Tensor) -> tuple[dict[str, Any], Tile]:
    width = y.shape[-1]
    tile = TILES.choose(y.device, _tile(width), width, y.element_size())
    gate_up, rows = or_packed(gate_up)
    arguments = {
        "gate_up_ptr": gate_up,
        "y_ptr": y,
        "rows": rows.total,
        "width": y.shape[-1],
        "inner": rows.inner,
        "stride_outer": rows.stride_outer,
        "stride_inner": rows.stride_inner,
        "stride_f": rows.stride_d,
        "BLOCK_T": tile.rows,
        "BLOCK_F": tile.columns,
    }
    return arguments, tile


def unsupported(gate_up: Tensor) -> str | None:
    if gate_up.dtype == torch.float64:
        return "silu_mul in Triton computes in float32; gate_up is float64"
    if gate_up.shape[-1] > 2 * _GRID_Y * _WIDE.columns:
        return f"silu_mul in Triton takes rows of up to {2 * _GRID_Y * _WIDE.columns} values"
    return None


def launch(y: Tensor, gate_up: Tensor) -> None:
    if y.numel() == 0:
        return
    arguments, tile = _arguments(y=y, gate_up=gate_up)
    grid = (
        triton.cdiv(arguments["rows"], tile.rows),
        triton.cdiv(arguments["width"], tile.columns),
    )
    silu_mul_kernel[grid](**arguments, num_warps=tile.warps)


def static_cases() -> Iterable[Any]:
    """Both tiles in each dtype, at the widths of Kimi K2.5's experts and dense layer."""
    from kimi_ops.testing.static import StaticCase

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for width in (64, 2048, 18432):
            gate_up = torch.empty(64, 2 * width, dtype=dtype, device="meta")
            y = torch.empty(64, width, dtype=dtype, device="meta")
            arguments, tile = _arguments(y=y, gate_up=gate_up)
            name = f"{str(dtype).removeprefix('torch.')}_{width}"
            yield StaticCase.of_call(name, silu_mul_kernel, arguments, num_warps=tile.warps)
