"""Triton kernel of `kimi_ops.mla_project_value`: value[t, h] = w_uv[h] @ out[t, h], one launch.

Grid: ``(cdiv(T, BLOCK_T), H * chunks)`` with chunks = cdiv(V, BLOCK_Y); neighbours in the grid have
the same weights and other tokens, so that w_uv comes from memory once and then from L2:

    w_uv [H, V, C]      program (0, h * chunks + i): tokens 0..BLOCK_T, rows i*BLOCK_Y.. of w_uv[h],
                        program (1, h * chunks + i): the next tokens,   all of C in steps of BLOCK_K

Bytes: w_uv and out once, value once, ``2 H V C + 2 T H (C + V)``: 8.4 MB and 82 KB a token at 64
heads. Flops: ``2 T H V C``, 102 for each byte of out and value: bound by memory at every T. Tiles,
and what they cost in shared memory: `kimi_ops.kernels._head_product`.

Numerics: float32 sums in the tensor cores, one rounding at the end. In batch-invariant mode every T
has one tile and one order of summation; otherwise the tile follows T.

Source: DeepSeek-V2, arXiv 2405.04434 section 2.1 (absorbed form).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_ops.kernels import _head_product
from kimi_ops.kernels._head_product import Tile, head_product, tile_for

BATCH_INVARIANT = True  # then `tile_for` has one answer


@triton.jit
def mla_project_value_kernel(
    out_ptr,  # [T, H, C]
    w_uv_ptr,  # [H, V, C]
    value_ptr,  # [T, H, V], contiguous
    tokens,
    stride_out_t,
    stride_out_h,
    stride_out_c,
    stride_w_h,
    stride_w_v,
    stride_w_c,
    stride_value_t,
    C: tl.constexpr,
    V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    chunks: tl.constexpr = (V + BLOCK_Y - 1) // BLOCK_Y
    head = (tl.program_id(1) // chunks).to(tl.int64)
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < tokens
    offs_t = offs_t.to(tl.int64)
    offs_v = tl.program_id(1) % chunks * BLOCK_Y + tl.arange(0, BLOCK_Y)
    mask_v = offs_v < V
    value = head_product(
        out_ptr + head * stride_out_h,
        w_uv_ptr + head * stride_w_h,
        offs_t,
        offs_v.to(tl.int64),
        mask_t,
        mask_v,
        stride_out_t,
        stride_out_c,
        stride_w_c,
        stride_w_v,
        C,
        BLOCK_K,
    )  # [BLOCK_T, BLOCK_Y]
    at_ptr = value_ptr + head * V + offs_t[:, None] * stride_value_t + offs_v[None, :]
    value = value.to(value_ptr.dtype.element_ty)
    tl.store(at_ptr, value, mask=mask_t[:, None] & mask_v[None, :])


def _arguments(value: Tensor, out: Tensor, w_uv: Tensor, tile: Tile) -> dict[str, Any]:
    return {
        "out_ptr": out,
        "w_uv_ptr": w_uv,
        "value_ptr": value,
        "tokens": out.shape[0],
        "stride_out_t": out.stride(0),
        "stride_out_h": out.stride(1),
        "stride_out_c": out.stride(2),
        "stride_w_h": w_uv.stride(0),
        "stride_w_v": w_uv.stride(1),
        "stride_w_c": w_uv.stride(2),
        "stride_value_t": value.stride(0),
        "C": out.shape[2],
        "V": w_uv.shape[1],
        "BLOCK_T": tile.tokens,
        "BLOCK_Y": tile.columns,
        "BLOCK_K": tile.depth,
    }


def unsupported(out: Tensor, w_uv: Tensor) -> str | None:
    return _head_product.unsupported("mla_project_value", "out", out)


def launch(value: Tensor, out: Tensor, w_uv: Tensor) -> None:
    if value.numel() == 0:
        return
    tokens, heads, columns = value.shape
    tile = tile_for(out.device, tokens, heads, columns)
    grid = (triton.cdiv(tokens, tile.tokens), heads * triton.cdiv(columns, tile.columns))
    mla_project_value_kernel[grid](
        **_arguments(value=value, out=out, w_uv=w_uv, tile=tile),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def static_cases() -> Iterable[Any]:
    """Every tile at Kimi K2.5's widths."""
    from kimi_ops.testing.static import StaticCase

    for dtype in (torch.bfloat16, torch.float16):
        value = torch.empty(4096, 64, 128, dtype=dtype, device="meta")
        out = torch.empty(4096, 64, 512, dtype=dtype, device="meta")
        w_uv = torch.empty(64, 256, 512, dtype=dtype, device="meta")[:, 128:]
        for tile, arches in _head_product.compiled_tiles():
            yield StaticCase.of_call(
                f"{tile.tokens}x{tile.columns}x{tile.stages}_{str(dtype).removeprefix('torch.')}",
                mla_project_value_kernel,
                _arguments(value=value, out=out, w_uv=w_uv, tile=tile),
                num_warps=tile.warps,
                num_stages=tile.stages,
                arches=arches,
            )
