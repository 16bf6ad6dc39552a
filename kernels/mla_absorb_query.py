"""Triton kernel of `kimi_ops.mla_absorb_query`: (q_nope @ w_uk | rope(q_rope)) per head, in one.

Grid: ``(cdiv(T, BLOCK_T), H * chunks + cdiv(H, HEADS))``, chunks = cdiv(C, BLOCK_Y). Programs of
the first H * chunks rows multiply, those of the others rotate HEADS heads with angles made once:

    q [T, H, N + R]                      q_latent [T, H, C + R]
    | nope 128 | rope 64 |               | latent 512                              | rope 64 |
      x w_uk[h] [128, 512] ------------> | chunk 0 | chunk 1 | chunk 2 | chunk 3   |
                 turned by position * inv_freq ----------------------------------> |         |

Neighbours in the grid have the same weights and other tokens, so that w_uk comes from memory once
and then from L2. Bytes: w_uk and q once, q_latent once, ``2 H N C + 2 T H (N + C + 2 R)``: 8.4 MB
and 98 KB a token at 64 heads. Flops: ``2 T H N C``, 85 for each byte of q and q_latent: bound by
memory at every T. Tiles, and what they cost in shared memory: `kimi_ops.kernels._head_product`.

Numerics: float32 sums in the tensor cores, one rounding at the end. Angles are
``position * inv_freq`` in float32, the reference's own; their sines are right to 8e-8 at any
position. In batch-invariant mode every T has one tile and one order of summation; otherwise the
tile follows T.

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
from kimi_ops.kernels._angle import sin_cos
from kimi_ops.kernels._head_product import Tile, candidates, head_product, tile_for
from kimi_ops.kernels._rotate import rotate_pairs
from kimi_ops.kernels._tiles import TileChoice

BATCH_INVARIANT = True  # then `tile_for` has one answer
# Tokens of a tile for each head that a rotating program takes. Few tokens are over soonest with a
# program for each head; of 128 tokens it takes 8, so that their angles are made an eighth as often.
TOKENS_PER_HEAD = 16
TILES = TileChoice(
    "mla_absorb_query", candidates, row=("heads", "columns", "depth"), batch="tokens"
)


@triton.jit
def mla_absorb_query_kernel(
    q_ptr,  # [T, H, N+R]
    w_uk_ptr,  # [H, N, C]
    positions_ptr,  # [T]
    inv_freq_ptr,  # [R/2]
    q_latent_ptr,  # [T, H, C+R], contiguous
    tokens,
    heads,
    stride_q_t,
    stride_q_h,
    stride_q_d,
    stride_w_h,
    stride_w_n,
    stride_w_c,
    stride_position,
    stride_freq,
    stride_y_t,
    N: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HEADS: tl.constexpr,
):
    chunks: tl.constexpr = (C + BLOCK_Y - 1) // BLOCK_Y
    unit = tl.program_id(1)
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < tokens
    offs_t = offs_t.to(tl.int64)
    if unit < heads * chunks:
        head = (unit // chunks).to(tl.int64)
        offs_c = unit % chunks * BLOCK_Y + tl.arange(0, BLOCK_Y)
        mask_c = offs_c < C
        latent = head_product(
            q_ptr + head * stride_q_h,
            w_uk_ptr + head * stride_w_h,
            offs_t,
            offs_c.to(tl.int64),
            mask_t,
            mask_c,
            stride_q_t,
            stride_q_d,
            stride_w_n,
            stride_w_c,
            N,
            BLOCK_K,
        )  # [BLOCK_T, BLOCK_Y]
        at_ptr = q_latent_ptr + head * (C + R) + offs_t[:, None] * stride_y_t + offs_c[None, :]
        latent = latent.to(q_latent_ptr.dtype.element_ty)
        tl.store(at_ptr, latent, mask=mask_t[:, None] & mask_c[None, :])
    else:
        offs_m = tl.arange(0, BLOCK_R // 2)  # pairs
        offs_r = tl.arange(0, BLOCK_R)
        position = tl.load(positions_ptr + offs_t * stride_position, mask=mask_t, other=0)
        freq = tl.load(inv_freq_ptr + offs_m * stride_freq, mask=offs_m < R // 2, other=0.0)
        sin, cos = sin_cos(position.to(tl.float32)[:, None] * freq[None, :])  # [BLOCK_T, R/2]
        mask = mask_t[:, None] & (offs_r < R)[None, :]
        offs_q = (N + offs_r).to(tl.int64)[None, :] * stride_q_d
        from_ptr = q_ptr + offs_t[:, None] * stride_q_t + offs_q
        to_ptr = q_latent_ptr + offs_t[:, None] * stride_y_t + (C + offs_r)[None, :]
        first = (unit - heads * chunks) * HEADS
        for turning in range(first, tl.minimum(first + HEADS, heads)):
            head = turning.to(tl.int64)
            rope = tl.load(from_ptr + head * stride_q_h, mask=mask, other=0.0)
            tl.store(to_ptr + head * (C + R), rotate_pairs(rope, sin, cos), mask=mask)


def _arguments(
    q_latent: Tensor, q: Tensor, w_uk: Tensor, positions: Tensor, inv_freq: Tensor, tile: Tile
) -> dict[str, Any]:
    rope = 2 * len(inv_freq)
    return {
        "q_ptr": q,
        "w_uk_ptr": w_uk,
        "positions_ptr": positions,
        "inv_freq_ptr": inv_freq,
        "q_latent_ptr": q_latent,
        "tokens": q.shape[0],
        "heads": q.shape[1],
        "stride_q_t": q.stride(0),
        "stride_q_h": q.stride(1),
        "stride_q_d": q.stride(2),
        "stride_w_h": w_uk.stride(0),
        "stride_w_n": w_uk.stride(1),
        "stride_w_c": w_uk.stride(2),
        "stride_position": positions.stride(0),
        "stride_freq": inv_freq.stride(0),
        "stride_y_t": q_latent.stride(0),
        "N": w_uk.shape[1],
        "C": w_uk.shape[2],
        "R": rope,
        "BLOCK_T": tile.tokens,
        "BLOCK_Y": tile.columns,
        "BLOCK_K": tile.depth,
        "BLOCK_R": max(2, triton.next_power_of_2(rope)),
        "HEADS": tile.tokens // TOKENS_PER_HEAD,
    }


def unsupported(q: Tensor, w_uk: Tensor, positions: Tensor, inv_freq: Tensor) -> str | None:
    if len(inv_freq) > 128:
        return (
            "mla_absorb_query in Triton keeps the rope values of a tile in registers, R up to 256, "
            f"got {2 * len(inv_freq)}"
        )
    return _head_product.unsupported("mla_absorb_query", "q", q)


def launch(q_latent: Tensor, q: Tensor, w_uk: Tensor, positions: Tensor, inv_freq: Tensor) -> None:
    if q_latent.numel() == 0:
        return
    tokens, heads, _ = q_latent.shape
    _, depth, columns = w_uk.shape
    built_in = tile_for(q.device, tokens, heads, columns)
    tile = TILES.choose(q.device, built_in, heads, columns, depth, tokens)
    call = _arguments(
        q_latent=q_latent, q=q, w_uk=w_uk, positions=positions, inv_freq=inv_freq, tile=tile
    )
    products = heads * triton.cdiv(columns, tile.columns)
    rotations = triton.cdiv(heads, call["HEADS"]) if len(inv_freq) else 0
    grid = (triton.cdiv(tokens, tile.tokens), products + rotations)
    mla_absorb_query_kernel[grid](**call, num_warps=tile.warps, num_stages=tile.stages)


def static_cases() -> Iterable[Any]:
    """Every tile at Kimi K2.5's widths."""
    from kimi_ops.testing.static import StaticCase

    positions = torch.empty(4096, dtype=torch.int32, device="meta")
    inv_freq = torch.empty(32, device="meta")
    for dtype in (torch.bfloat16, torch.float16):
        q_latent = torch.empty(4096, 64, 576, dtype=dtype, device="meta")
        q = torch.empty(4096, 64, 192, dtype=dtype, device="meta")
        w_uk = torch.empty(64, 256, 512, dtype=dtype, device="meta")[:, :128]
        for tile, arches in _head_product.compiled_tiles():
            yield StaticCase.of_call(
                f"{tile.tokens}x{tile.columns}x{tile.stages}_{str(dtype).removeprefix('torch.')}",
                mla_absorb_query_kernel,
                _arguments(
                    q_latent=q_latent,
                    q=q,
                    w_uk=w_uk,
                    positions=positions,
                    inv_freq=inv_freq,
                    tile=tile,
                ),
                num_warps=tile.warps,
                num_stages=tile.stages,
                arches=arches,
            )
