"""Triton kernel of `kimi_ops.vision_pos_embed`: bicubic positions and frame sinusoids, added.

    y[l] = x[l] + sum over 4 x 4 taps of weight * table[tap] + [sin(f w_0) .. | cos(f w_0) ..]

Grid: ``(cdiv(L, ROWS),)``. A program has ROWS consecutive patches, finds their entries in the
device's grid table, makes their 4 + 4 tap positions and weights once, and goes through D in chunks:

    x, y [L, D]                             table [rows, columns, D]  (L2: 9.4 MB, 64 x 64 x 1152)
    program 0: rows 0..ROWS-1   chunk 0, 1, ..   16 rows per patch; consecutive patches of a
    program 1: rows ROWS..2ROWS-1                picture row share most of theirs (L1)

Bytes: x once and y once, ``4 L D`` in 16-bit dtypes, from DRAM; the taps come from L2 and L1. The
weights and the sum are float32 as the reference has them, one rounding at the end. A single frame
adds no sinusoid: its sines are skipped where no patch of the program is of a clip.

Source: Keys, IEEE TASSP 29 (1981), a = -0.75, half-pixel centres; MoonViT-3D, arXiv 2602.02276.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_ops.kernels._angle import power_of_10000, sin_cos
from kimi_ops.kernels._grid import ENTRIES_PER_STEP, locate

BATCH_INVARIANT = True  # a patch's values depend on nothing but itself and its place

# 8 patches x 128 elements are one 16-byte load per thread of 4 warps and tap, sixteen in flight;
# 1152 is nine chunks of 128, so no lane is masked. A 64 x 64 picture is 512 programs.
ROWS = 8
BLOCK_D = 128
WARPS = 4


@triton.jit
def _tap(source, number: tl.constexpr, size, stride):
    """Offset and weight, each ``[ROWS]``, of tap ``number`` (0 to 3) around a source coordinate."""
    tap = tl.floor(source) + (number - 1)
    d = tl.abs(source - tap)
    near = (1.25 * d - 2.25) * d * d + 1.0  # the cubic with a = -0.75, |d| <= 1
    far = ((-0.75 * d + 3.75) * d - 6.0) * d + 3.0  # 1 < |d| < 2
    clamped = tl.minimum(tl.maximum(tap, 0.0), size - 1.0)
    return clamped.to(tl.int64) * stride, tl.where(d <= 1.0, near, far)


@triton.jit
def _row_of_taps(position, row_ptr, weight_y, at0, at1, at2, at3, w0, w1, w2, w3, mask):
    """Adds the four taps of one table row to ``position [ROWS, BLOCK_D]``; pointers likewise."""
    position += (weight_y * w0)[:, None] * tl.load(row_ptr + at0[:, None], mask=mask, other=0.0)
    position += (weight_y * w1)[:, None] * tl.load(row_ptr + at1[:, None], mask=mask, other=0.0)
    position += (weight_y * w2)[:, None] * tl.load(row_ptr + at2[:, None], mask=mask, other=0.0)
    position += (weight_y * w3)[:, None] * tl.load(row_ptr + at3[:, None], mask=mask, other=0.0)
    return position


@triton.jit
def vision_pos_embed_kernel(
    x_ptr,  # [L, D]
    table_ptr,  # [rows, columns, D]
    grid_ptr,  # [n, 3]
    y_ptr,  # [L, D]
    length,
    num_entries,
    table_rows,
    table_columns,
    stride_x_l,
    stride_x_d,
    stride_t_row,
    stride_t_column,
    stride_t_d,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
):
    offs_l = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    found, t, h, w, place, _ = locate(offs_l, grid_ptr, num_entries, False, STEP)
    frame = place // (h * w)
    place = place % (h * w)
    row, column = (place // w).to(tl.float32), (place % w).to(tl.float32)
    # Divisions round to nearest: the reference's scale and source coordinate, bit for bit.
    scale_y = tl.div_rn(table_rows.to(tl.float32) + tl.zeros_like(row), h.to(tl.float32))
    scale_x = tl.div_rn(table_columns.to(tl.float32) + tl.zeros_like(row), w.to(tl.float32))
    source_y = (row + 0.5) * scale_y - 0.5
    source_x = (column + 0.5) * scale_x - 0.5
    y0, v0 = _tap(source_y, 0, table_rows, stride_t_row)
    y1, v1 = _tap(source_y, 1, table_rows, stride_t_row)
    y2, v2 = _tap(source_y, 2, table_rows, stride_t_row)
    y3, v3 = _tap(source_y, 3, table_rows, stride_t_row)
    x0, w0 = _tap(source_x, 0, table_columns, stride_t_column)
    x1, w1 = _tap(source_x, 1, table_columns, stride_t_column)
    x2, w2 = _tap(source_x, 2, table_columns, stride_t_column)
    x3, w3 = _tap(source_x, 3, table_columns, stride_t_column)

    mask_l = (offs_l < length)[:, None]
    inside = (found != 0)[:, None]
    clips = tl.max(t, 0) > 1
    for start in range(0, width, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask = mask_l & (offs_d < width)[None, :]
        taps = mask & inside
        chunk_ptr = table_ptr + offs_d[None, :] * stride_t_d
        position = tl.zeros([ROWS, BLOCK_D], tl.float32)
        position = _row_of_taps(
            position, chunk_ptr + y0[:, None], v0, x0, x1, x2, x3, w0, w1, w2, w3, taps
        )
        position = _row_of_taps(
            position, chunk_ptr + y1[:, None], v1, x0, x1, x2, x3, w0, w1, w2, w3, taps
        )
        position = _row_of_taps(
            position, chunk_ptr + y2[:, None], v2, x0, x1, x2, x3, w0, w1, w2, w3, taps
        )
        position = _row_of_taps(
            position, chunk_ptr + y3[:, None], v3, x0, x1, x2, x3, w0, w1, w2, w3, taps
        )
        if clips:
            half: tl.constexpr = width // 2
            omega = power_of_10000((offs_d % half).to(tl.float32) / -half)
            sin, cos = sin_cos(frame.to(tl.float32)[:, None] * omega[None, :])
            time = tl.where((offs_d < half)[None, :], sin, cos)
            position += tl.where((t > 1)[:, None], time, 0.0)

        offs_x = offs_l.to(tl.int64)[:, None] * stride_x_l + offs_d[None, :] * stride_x_d
        x = tl.load(x_ptr + offs_x, mask=mask, other=0.0)
        y = tl.where(inside, x.to(tl.float32) + position, x.to(tl.float32))
        offs_y = offs_l.to(tl.int64)[:, None] * width + offs_d[None, :]
        tl.store(y_ptr + offs_y, y.to(x.dtype), mask=mask)


def _arguments(y: Tensor, x: Tensor, table: Tensor, grid_thws: Tensor) -> dict[str, Any]:
    return {
        "x_ptr": x,
        "table_ptr": table,
        "grid_ptr": grid_thws,
        "y_ptr": y,
        "length": x.shape[0],
        "num_entries": grid_thws.shape[0],
        "table_rows": table.shape[0],
        "table_columns": table.shape[1],
        "stride_x_l": x.stride(0),
        "stride_x_d": x.stride(1),
        "stride_t_row": table.stride(0),
        "stride_t_column": table.stride(1),
        "stride_t_d": table.stride(2),
        "width": x.shape[1],
        "ROWS": ROWS,
        "BLOCK_D": BLOCK_D,
        "STEP": ENTRIES_PER_STEP,
    }


def unsupported(x: Tensor, table: Tensor, grid_thws: Tensor) -> str | None:
    if x.dtype == torch.float64:
        return "vision_pos_embed in Triton computes in float32; x is float64"
    return None


def launch(y: Tensor, x: Tensor, table: Tensor, grid_thws: Tensor) -> None:
    if y.numel() == 0:
        return
    grid = (triton.cdiv(x.shape[0], ROWS),)
    arguments = _arguments(y=y, x=x, table=table, grid_thws=grid_thws.contiguous())
    vision_pos_embed_kernel[grid](**arguments, num_warps=WARPS)


def static_cases() -> Iterable[Any]:
    from kimi_ops.testing.static import StaticCase

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.empty(4096, 1152, dtype=dtype, device="meta")
        table = torch.empty(64, 64, 1152, dtype=dtype, device="meta")
        grid = torch.empty(2, 3, dtype=torch.int64, device="meta")
        arguments = _arguments(y=torch.empty_like(x), x=x, table=table, grid_thws=grid)
        name = f"table_64_64_1152_{str(dtype).removeprefix('torch.')}"
        yield StaticCase.of_call(name, vision_pos_embed_kernel, arguments, num_warps=WARPS)
