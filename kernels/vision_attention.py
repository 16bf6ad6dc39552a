"""Triton kernel of `kimi_ops.vision_attention`: full attention within each picture or clip.

The kernel, its grid and its numerics are those of `kimi_ops.kernels._packed_attention`, not causal
and without lse. A head of 72 is 64 + 16 columns, 8 of them masked: 1.11 times its arithmetic, where
a tile of 128 would do 1.78 times.

Work: ``4 n^2 H head_dim`` flops a segment of n patches; bytes: q and out once, k and v once per
tile of queries, from L2 (a picture of 4,096 patches has 1.2 MB of them per head). Bound by tensor
cores.

Source: FlashAttention-2, arXiv 2307.08691; MoonViT-3D in arXiv 2602.02276.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kimi_ops._target import target
from kimi_ops.kernels import _packed_attention
from kimi_ops.kernels._packed_attention import Tile, candidates, packed_attention_kernel
from kimi_ops.kernels._tiles import TileChoice

BATCH_INVARIANT = True  # tiles follow from the head's width alone
TILES = TileChoice("vision_attention", candidates, row=("width", "value_width"))

# Queries are 16 rows of a warp each. With wgmma the operands stay in shared memory and 128 queries
# take 168 registers; mma.sync keeps q and a step's keys in registers too, where 64 keys a step
# spill (12 to 60 bytes at 255 registers) and 32 take 140.
_WGMMA, _MMA, _WIDE = Tile(128, 64, 8, 2), Tile(64, 32, 4, 3), Tile(64, 32, 4, 2)


def _tile(q: Tensor, v: Tensor) -> Tile:
    if q.shape[2] > 96:
        tile = _WIDE
    else:
        tile = _WGMMA if target(q.device).capability in (90, 100) else _MMA
    return TILES.choose(q.device, tile, q.shape[2], v.shape[2])


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> str | None:
    return _packed_attention.unsupported("vision_attention", q, v)


def launch(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> None:
    if out.numel() == 0:
        return
    tile, offsets = _tile(q, v), cu_seqlens.contiguous()
    call = _packed_attention.arguments(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=offsets,
        cu_seqlens_k=offsets,
        out=out,
        lse=None,
        longest=max_seqlen,
        scale=scale,
        causal=False,
        tile=tile,
    )
    _packed_attention.run(call, heads=q.shape[1], tile=tile)


def static_cases() -> Iterable[Any]:
    from kimi_ops.testing.static import ARCHES, StaticCase

    wgmma = ("sm_90a", "sm_100a")
    entries = (
        (72, _WGMMA, wgmma),
        (72, _MMA, tuple(arch for arch in ARCHES if arch not in wgmma)),
        (128, _WIDE, ARCHES),
    )
    for dtype in (torch.bfloat16, torch.float16):
        for width, tile, arches in entries:
            q, k, v = torch.empty(4096, 3, 16, width, dtype=dtype, device="meta").unbind(1)
            offsets = torch.empty(3, dtype=torch.int32, device="meta")
            call = _packed_attention.arguments(
                q=q,
                k=k,
                v=v,
                cu_seqlens_q=offsets,
                cu_seqlens_k=offsets,
                out=torch.empty(4096, 16, width, dtype=dtype, device="meta"),
                lse=None,
                longest=4096,
                scale=width**-0.5,
                causal=False,
                tile=tile,
            )
            yield StaticCase.of_call(
                f"heads_of_{width}_{str(dtype).removeprefix('torch.')}_{tile.queries}x{tile.keys}",
                packed_attention_kernel,
                call,
                num_warps=tile.warps,
                num_stages=tile.stages,
                arches=arches,
            )
