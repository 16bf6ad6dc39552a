"""Triton kernel of `kimi_ops.rms_norm`: y = weight * round(x / sqrt(mean(x^2) + eps)), one launch.

Grid: ``(cdiv(T, BLOCK_T),)`` for the T rows that all leading dimensions make. A program owns
BLOCK_T rows from end to end:

    x [T, D]    program 0: |row 0 ......... D|      statistics: a sum over the row in float32,
                program 1: |row 1 ......... D|      across the warps through shared memory
                program 2: |row 2 ...  (BLOCK_T = 1 from D = 513 on)

Bytes: x once, y once, and the weight, which after the first program comes from L2. Rows wider than
8,192 are read twice, the second time from L2. Flops: 4 an element: bound by memory everywhere.
Numerics: squares, sum and root in float32; rounded to the dtype of x before the weight as the model
has it, and once more after.

Source: Zhang and Sennrich, arXiv 1910.07467.
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
TILES = TileChoice("rms_norm", norm_candidates, row=("columns", "element_bytes"))


@triton.jit
def rms_norm_kernel(
    x_ptr,  # [T, D]
    weight_ptr,  # [D]
    y_ptr,  # [T, D], contiguous
    rows,
    columns,
    inner_x,
    stride_x_outer,
    stride_x_inner,
    stride_x_d,
    stride_w_d,
    eps,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,  # BLOCK_D holds a row
):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    mask_t = (offs_t < rows)[:, None]
    rows_ptr = x_ptr + row_offsets(offs_t, inner_x, stride_x_outer, stride_x_inner)[:, None]
    y_rows_ptr = y_ptr + (offs_t.to(tl.int64) * columns)[:, None]

    x = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    squares = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(0, BLOCK_D if WHOLE else columns, BLOCK_D):
        offs_d = (start + tl.arange(0, BLOCK_D))[None, :]  # [1, BLOCK_D]
        mask = mask_t & (offs_d < columns)
        at_ptr = rows_ptr + offs_d.to(tl.int64) * stride_x_d
        x = tl.load(at_ptr, mask=mask, other=0.0).to(tl.float32)
        squares += x * x
    PRECISE: tl.constexpr = y_ptr.dtype.element_ty == tl.float32
    scale, correction = rms_factor(squares, columns, eps, PRECISE)  # [BLOCK_T, 1]

    for start in range(0, BLOCK_D if WHOLE else columns, BLOCK_D):
        offs_d = (start + tl.arange(0, BLOCK_D))[None, :]
        mask_d = offs_d < columns
        mask = mask_t & mask_d
        if not WHOLE:
            at_ptr = rows_ptr + offs_d.to(tl.int64) * stride_x_d
            x = tl.load(at_ptr, mask=mask, other=0.0).to(tl.float32)
        w_ptr = weight_ptr + offs_d.to(tl.int64) * stride_w_d
        weight = tl.load(w_ptr, mask=mask_d, other=0.0).to(tl.float32)
        normal = x * scale
        if PRECISE:
            normal = tl.fma(x, scale, x * correction)
        normal = normal.to(y_ptr.dtype.element_ty).to(tl.float32)
        y = (weight * normal).to(y_ptr.dtype.element_ty)
        tl.store(y_rows_ptr + offs_d, y, mask=mask)


def _arguments(y: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[dict[str, Any], Tile]:
    columns = x.shape[-1]
    tile = TILES.choose(x.device, norm_tile(columns), columns, x.element_size())
    x, rows = or_packed(x)
    arguments = {
        "x_ptr": x,
        "weight_ptr": weight,
        "y_ptr": y,
        "rows": rows.total,
        "columns": x.shape[-1],
        "inner_x": rows.inner,
        "stride_x_outer": rows.stride_outer,
        "stride_x_inner": rows.stride_inner,
        "stride_x_d": rows.stride_d,
        "stride_w_d": weight.stride(0),
        "eps": eps,
        "BLOCK_T": tile.rows,
        "BLOCK_D": tile.columns,
        "WHOLE": x.shape[-1] <= tile.columns,
    }
    return arguments, tile


def unsupported(x: Tensor, weight: Tensor, eps: float) -> str | None:
    if x.dtype == torch.float64:
        return "rms_norm in Triton computes in float32; x is float64"
    return None


def launch(y: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    if y.numel() == 0:
        return
    arguments, tile = _arguments(y=y, x=x, weight=weight, eps=eps)
    rms_norm_kernel[(triton.cdiv(arguments["rows"], tile.rows),)](**arguments, num_warps=tile.warps)


def static_cases() -> Iterable[Any]:
    """One case for each tile and dtype that Kimi K2.5 uses, and one for rows that do not fit."""
    from kimi_ops.testing.static import StaticCase

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for columns in (64, 512, 1536, 7168, 16384):
            x = torch.empty(64, columns, dtype=dtype, device="meta")
            weight = torch.empty(columns, dtype=dtype, device="meta")
            arguments, tile = _arguments(y=torch.empty_like(x), x=x, weight=weight, eps=1e-5)
            name = f"{str(dtype).removeprefix('torch.')}_{columns}"
            yield StaticCase.of_call(name, rms_norm_kernel, arguments, num_warps=tile.warps)
