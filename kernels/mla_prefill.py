"""Triton kernel of `kimi_ops.mla_prefill`: un-absorbed causal attention of packed sequences.

The kernel, its grid and its numerics are those of `kimi_ops.kernels._packed_attention`: a head of
192 is 128 + 64 columns, values are 128, queries are aligned to the last key (bottom right), and a
tile stops at the last key that its last query sees.

Work: ``2 H (192 + 128)`` flops for each query and key that it sees; bytes: q, out and lse once, k
and v once per tile of queries, from L2. Bound by tensor cores from about 512 queries on.

Source: DeepSeek-V2, arXiv 2405.04434 section 2.1; FlashAttention-2, arXiv 2307.08691.
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
TILES = TileChoice("mla_prefill", candidates, row=("width", "value_width"))

# With wgmma, 128 queries (48 KiB) and two stages of 64 keys and values (40 KiB each) are 128 KiB of
# shared memory and 241 registers. mma.sync keeps q and a step's keys in registers too: 64 queries
# with 32 keys take 229 registers and 48 KiB, which fits every device; larger tiles spill.
_WGMMA, _MMA = Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)


def _tile(q: Tensor, v: Tensor) -> Tile:
    wgmma = target(q.device).capability in (90, 100) and q.shape[2] <= 192
    return TILES.choose(q.device, _WGMMA if wgmma else _MMA, q.shape[2], v.shape[2])


def unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
) -> str | None:
    return _packed_attention.unsupported("mla_prefill", q, v)


def launch(
    outputs: tuple[Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
) -> None:
    out, lse = outputs
    if lse.numel() == 0:
        return
    tile = _tile(q, v)
    call = _packed_attention.arguments(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=cu_seqlens_q.contiguous(),
        cu_seqlens_k=cu_seqlens_k.contiguous(),
        out=out,
        lse=lse,
        longest=max_seqlen_q,
        scale=scale,
        causal=causal,
        tile=tile,
    )
    _packed_attention.run(call, heads=q.shape[1], tile=tile)


def static_cases() -> Iterable[Any]:
    from kimi_ops.testing.static import ARCHES, StaticCase

    wgmma = ("sm_90a", "sm_100a")
    others = tuple(arch for arch in ARCHES if arch not in wgmma)
    offsets = torch.empty(3, dtype=torch.int32, device="meta")
    for dtype in (torch.bfloat16, torch.float16):
        for tile, arches in ((_WGMMA, wgmma), (_MMA, others)):
            for causal in (True, False):
                q = torch.empty(4096, 64, 192, dtype=dtype, device="meta")
                v = torch.empty(4096, 64, 128, dtype=dtype, device="meta")
                call = _packed_attention.arguments(
                    q=q,
                    k=q,
                    v=v,
                    cu_seqlens_q=offsets,
                    cu_seqlens_k=offsets,
                    out=v,
                    lse=torch.empty(4096, 64, device="meta"),
                    longest=4096,
                    scale=192**-0.5,
                    causal=causal,
                    tile=tile,
                )
                kind = "causal" if causal else "all_keys"
                yield StaticCase.of_call(
                    f"{kind}_{str(dtype).removeprefix('torch.')}_{tile.queries}x{tile.keys}",
                    packed_attention_kernel,
                    call,
                    num_warps=tile.warps,
                    num_stages=tile.stages,
                    arches=arches,
                )
