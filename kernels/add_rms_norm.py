"""Triton kernel of `kimi_ops.add_rms_norm`: h = x + residual and y = rms_norm(h), one launch.

Grid: ``(cdiv(T, BLOCK_T),)``, a program owns BLOCK_T rows from end to end, as in `rms_norm`:

    x, residual [T, D]   program 0: |row 0 ......... D|   ->  h [T, D], y [T, D]
                         program 1: |row 1 ......... D|

Bytes: x and residual once, y and h once, the weight from L2 after the first program. Rows wider
than 8,192 read h, which the same threads have just written, a second time.
Numerics: the sum in float32, rounded once to the dtype of x; the norm is that of the rounded sum,
its statistics in float32, and rounded before and after the weight as the model has it.

Source: the pre-norm block of Kimi K2.5 (DeepSeek-V3 family).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_ops._strided_rows import or_packed
from kimi_ops.kernels._rows import Tile, norm_candidates, norm_tile, rms_factor, row_offsets
from kimi_ops.kernels._tiles import TileChoice

BATCH_INVARIANT = True  # tiles follow from the width of a row alone
TILES = TileChoice("add_rms_norm", norm_candidates, row=("columns", "element_bytes"))


@triton.jit
def add_rms_norm_kernel(
    x_ptr,  # [T, D]
    residual_ptr,  # [T, D]
    weight_ptr,  # [D]
    y_ptr,  # [T, D], contiguous
    h_ptr,  # [T, D], contiguous
    rows,
    columns,
    inner_x,
    stride_x_outer,
    stride_x_inner,
    stride_x_d,
    inner_r,
    stride_r_outer,
    stride_r_inner,
    stride_r_d,
    stride_w_d,
    eps,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,  # BLOCK_D holds a row
):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    mask_t = (offs_t < rows)[:, None]
    x_rows_ptr = x_ptr + row_offsets(offs_t, inner_x, stride_x_outer, stride_x_inner)[:, None]
    r_rows_ptr = (
        residual_ptr + row_offsets(offs_t, inner_r, stride_r_outer, stride_r_inner)[:, None]
    )
    out_rows = (offs_t.to(tl.int64) * columns)[:, None]

    h = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    squares = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(0, BLOCK_D if WHOLE else columns, BLOCK_D):
        offs_d = (start + tl.arange(0, BLOCK_D))[None, :]  # [1, BLOCK_D]
        mask = mask_t & (offs_d < columns)
        wide_d = offs_d.to(tl.int64)
        x = tl.load(x_rows_ptr + wide_d * stride_x_d, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(r_rows_ptr + wide_d * stride_r_d, mask=mask, other=0.0).to(tl.float32)
        rounded = (x + r).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + out_rows + offs_d, rounded, mask=mask)
        h = rounded.to(tl.float32)
        squares += h * h
    PRECISE: tl.constexpr = y_ptr.dtype.element_ty == tl.float32
    scale, correction = rms_factor(squares, columns, eps, PRECISE)  # [BLOCK_T, 1]

    for start in range(0, BLOCK_D if WHOLE else columns, BLOCK_D):
        offs_d = (start + tl.arange(0, BLOCK_D))[None, :]
        mask_d = offs_d < columns
        mask = mask_t & mask_d
        if not WHOLE:
            # Masks and layout are those of the store above: every thread reads what it wrote.
            h = tl.load(h_ptr + out_rows + offs_d, mask=mask, other=0.0).to(tl.float32)
        w_ptr = weight_ptr + offs_d.to(tl.int64) * stride_w_d
        weight = tl.load(w_ptr, mask=mask_d, other=0.0).to(tl.float32)
        normal = h * scale
        if PRECISE:
            normal = tl.fma(h, scale, h * correction)
        normal = normal.to(y_ptr.dtype.element_ty).to(tl.float32)
        y = (weight * normal).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + out_rows + offs_d, y, mask=mask)


def _arguments(
    y: Tensor, h: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[dict[str, Any], Tile]:
    columns = x.shape[-1]
    tile = TILES.choose(x.device, norm_tile(columns), columns, x.element_size())
    x, rows_x = or_packed(x)
    residual, rows_r = or_packed(residual)
    arguments = {
        "x_ptr": x,
        "residual_ptr": residual,
        "weight_ptr": weight,
        "y_ptr": y,
        "h_ptr": h,
        "rows": rows_x.total,
        "columns": x.shape[-1],
        "inner_x": rows_x.inner,
        "stride_x_outer": rows_x.stride_outer,
        "stride_x_inner": rows_x.stride_inner,
        "stride_x_d": rows_x.stride_d,
        "inner_r": rows_r.inner,
        "stride_r_outer": rows_r.stride_outer,
        "stride_r_inner": rows_r.stride_inner,
        "stride_r_d": rows_r.stride_d,
        "stride_w_d": weight.stride(0),
        "eps": eps,
        "BLOCK_T": tile.rows,
        "BLOCK_D": tile.columns,
        "WHOLE": x.shape[-1] <= tile.columns,
    }
    return arguments, tile


def unsupported(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> str | None:
    if x.dtype == torch.float64:
        return "add_rms_norm in Triton computes in float32; x is float64"
    return None


def launch(
    outputs: tuple[Tensor, Tensor], x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> None:
    y, h = outputs
    if y.numel() == 0:
        return
    arguments, tile = _arguments(y=y, h=h, x=x, residual=residual, weight=weight, eps=eps)
    grid = (triton.cdiv(arguments["rows"], tile.rows),)
    add_rms_norm_kernel[grid](**arguments, num_warps=tile.warps)


def static_cases() -> Iterable[Any]:
    """One case for each tile and dtype that Kimi K2.5 uses, and one for rows that do not fit."""
    from kimi_ops.testing.static import StaticCase

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for columns in (64, 512, 1536, 7168, 16384):
            x = torch.empty(64, columns, dtype=dtype, device="meta")
            weight = torch.empty(columns, dtype=dtype, device="meta")
            y, h = torch.empty_like(x), torch.empty_like(x)
            arguments, tile = _arguments(y=y, h=h, x=x, residual=x, weight=weight, eps=1e-5)
            name = f"{str(dtype).removeprefix('torch.')}_{columns}"
            yield StaticCase.of_call(name, add_rms_norm_kernel, arguments, num_warps=tile.warps)
