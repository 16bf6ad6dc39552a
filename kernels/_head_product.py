"""A matrix product per head, ``y[t, h] = x[t, h] @ w[h]``, for `mla_absorb_query` and
`mla_project_value`: which tiles, and the product of one tile.

    head h:   x [T, K] | k0 | k1 | ..     w [K, Y]   columns    y [T, Y]
              BLOCK_T  [    |    |  ]  x  BLOCK_K    [ .. ]  =  BLOCK_T x BLOCK_Y

At 128 x 512 per head both are bound by memory at every T: 8.4 MB of weights of 64 heads are all
there is to read for few tokens, and for many each byte of x and y takes 85 to 102 flops, where an
H100 would need 295. So for few tokens the grid must cover the machine with parts of w, each read
once; for many, tiles must be large, so that x and w are read again (from L2) less often.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kimi_ops._batch_invariant import is_batch_invariant
from kimi_ops._target import Target, target


class Tile(NamedTuple):
    """BLOCK_T, BLOCK_Y and BLOCK_K of a program, its warps and the stages of its loop along K."""

    tokens: int
    columns: int
    depth: int
    warps: int
    stages: int


# The preferred one first: larger tiles read less from L2. 64 rows and 4 warps are what wgmma and
# tcgen05 take at least; with fewer tokens the product is mma.sync on every architecture, and the
# tensor cores idle either way. Shared memory: at most stages * depth * (tokens + columns) * 2
# bytes, 96 KiB of the widest, which therefore has 2 stages where an SM has 99 KiB. Few tokens: the
# weights of a program of `mla_absorb_query`, 8 to 32 KiB, are all asked for before its first
# product. (16 x 128 in steps of 128 spilled two registers on sm_90.)
_TILES = (
    Tile(128, 128, 64, 8, 3),
    Tile(64, 128, 64, 4, 3),
    Tile(64, 64, 64, 4, 3),
    Tile(32, 128, 128, 4, 2),
    Tile(32, 64, 128, 4, 3),
    Tile(16, 128, 64, 4, 3),
    Tile(16, 64, 128, 4, 3),
    Tile(16, 32, 128, 4, 4),
)
# In batch-invariant mode one tile multiplies at every T: 64 rows, so that wgmma sums in one order,
# and 64 columns, so that one token still makes 128 programs of K2.5's 64 heads of 128 values.
_INVARIANT = _TILES[2]
_AMD_STAGES = 2  # LDS of 64 KiB


def _for_gpu(tile: Tile, gpu: Target) -> Tile:
    if gpu.vendor != "cuda":
        return tile._replace(stages=min(tile.stages, _AMD_STAGES))
    if gpu.shared_bytes < 160 << 10 and tile.tokens == 128:
        return tile._replace(stages=2)
    return tile


def tile_for(device: torch.device, tokens: int, heads: int, columns: int) -> Tile:
    """The tile for T tokens: the largest that leaves no multiprocessor without a program.

    Where none does, the one that makes the most programs. No tile has twice the tokens there are,
    or more, but for the least. In batch-invariant mode the answer is always the same.
    """
    gpu = target(device)
    if is_batch_invariant():
        return _for_gpu(_INVARIANT, gpu)

    def programs(tile: Tile) -> int:
        return triton.cdiv(tokens, tile.tokens) * heads * triton.cdiv(columns, tile.columns)

    fitting = [tile for tile in _TILES if tile.tokens < max(2 * tokens, 17)]
    enough = (tile for tile in fitting if programs(tile) >= gpu.multiprocessors)
    return _for_gpu(next(enough, max(fitting, key=programs)), gpu)


def candidates(heads: int, columns: int, depth: int, tokens: int) -> tuple[Tile, ...]:
    """Tiles for `kimi_ops.kernels._tiles`: those that fit T as `tile_for` has it, 2 to 4 stages."""
    return tuple(
        tile._replace(stages=stages)
        for tile in _TILES
        if tile.tokens < max(2 * tokens, 17)
        for stages in (2, 3, 4)
    )


_GPUS = {
    "sm_80": Target("cuda", 80, 108, 163 << 10),
    "sm_86": Target("cuda", 86, 84, 99 << 10),
    "sm_89": Target("cuda", 89, 128, 99 << 10),
    "sm_90a": Target("cuda", 90, 132, 227 << 10),
    "sm_100a": Target("cuda", 100, 148, 227 << 10),
    "sm_120": Target("cuda", 120, 170, 99 << 10),
    "gfx942": Target("hip", 942, 304, 64 << 10),
}


def compiled_tiles() -> Iterator[tuple[Tile, tuple[str, ...]]]:
    """Every tile, with the architectures that use it; for static cases."""
    users: dict[Tile, list[str]] = {}
    for arch, gpu in _GPUS.items():
        for tile in _TILES:
            users.setdefault(_for_gpu(tile, gpu), []).append(arch)
    for tile, arches in users.items():
        yield tile, tuple(arches)


def unsupported(op: str, name: str, x: torch.Tensor) -> str | None:
    """Why ``op`` cannot multiply ``x``, its argument ``name``, or None."""
    if x.element_size() != 2:
        return f"{op} in Triton multiplies bfloat16 or float16 on tensor cores; {name} is {x.dtype}"
    return None


@triton.jit
def head_product(
    x_ptr,  # [T, K] of one head
    w_ptr,  # [K, Y] of one head
    offs_t,  # [BLOCK_T] int64
    offs_y,  # [BLOCK_Y] int64
    mask_t,
    mask_y,
    stride_x_t,
    stride_x_k,
    stride_w_k,
    stride_w_y,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 ``[BLOCK_T, BLOCK_Y]``, summed along K in steps of BLOCK_K from 0 on.

    What is masked off is loaded as 0, so a token's sum has nothing of its neighbours in it.
    """
    y = tl.zeros([offs_t.shape[0], offs_y.shape[0]], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        wide_k = offs_k.to(tl.int64)
        x = tl.load(
            x_ptr + offs_t[:, None] * stride_x_t + wide_k[None, :] * stride_x_k,
            mask=mask_t[:, None] & mask_k[None, :],
            other=0.0,
        )  # [BLOCK_T, BLOCK_K]
        w = tl.load(
            w_ptr + wide_k[:, None] * stride_w_k + offs_y[None, :] * stride_w_y,
            mask=mask_k[:, None] & mask_y[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_Y]
        y = tl.dot(x, w, y)
    return y
