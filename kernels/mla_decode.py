"""Triton kernels of `kimi_ops.mla_decode`: absorbed attention over a paged cache, in two stages.

    score[r, t] = scale * q[r] . kv[t]               r = (s, h) a query row, t < limit of s
    out[r]      = sum_t softmax(score[r])[t] * kv[t, :C]        lse[r] = log(sum_t exp(score[r, t]))

All query rows of a sequence share its keys, so a program takes all S * H of them (64 at most) and
reads each cached token once. The tokens are dealt out to splits, and a second stage joins them:

    stage 1, grid (B * splits * row tiles)              stage 2, grid (B * S * H, C / BLOCK_C)
    sequence b |  split 0  |  split 1  |  split 2 |     row r: part[b, 0..splits, r, columns]
      tokens     BLOCK_T at a time --->                        weighted by exp(lse - max), added up
      pages      page_table[b, t // P] at every block          all loads before the first use
    program (b, split): q [BLOCK_M, C+R] resident,      one split: stage 1 writes the op's outputs
      part [BLOCK_M, C], lse [BLOCK_M]                  itself and there is no stage 2

Row tiles are innermost in the grid: with more than 64 rows the second tile reads the cache from L2.

Bytes: the cache's used rows once, (C+R) * 2 each; q once per split; 2 * 4 * C per row and split for
the partials, which stay in L2. Floor at B = 64, H = 64, 4,096 tokens on an H100: 92 us of DRAM,
40 us of tensor cores (2 * (2C+R) * 64 flops a token). `_mla_plan` has tiles and shared memory.

Numerics: products of 16-bit values added in float32; score times scale, softmax, running maximum
and sum in float32; p is rounded to the dtype of the cache for its product with the values, as the
reference does, while its sum is of the unrounded p; partials are float32, out is rounded once. The
lse is a natural logarithm. Rows without keys have out 0 and lse -inf; a page id that is in use and
is no page makes the sequence's results NaN. The order of all sums is the same from run to run.

Which first stage runs: `_mla_split` (plain Triton, every GPU); on sm_90 with Kimi K2.5's widths,
pages of 64 n tokens and a Triton that `_gluon` names, `_mla_split_sm90` from 33 and
`_mla_split_sm90_narrow` up to 16 query rows. The second stage is in `_mla_combine`.

Source: DeepSeek-V2, arXiv 2405.04434 section 2.1; split over keys: Flash-Decoding, 2023.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from kimi_ops._batch_invariant import is_batch_invariant
from kimi_ops._mla_plan import MAX_SPLITS, Plan, plan_of
from kimi_ops._target import Target, target
from kimi_ops.kernels import _gluon
from kimi_ops.kernels._e4m3 import FP8_CACHE, is_aligned_fp8
from kimi_ops.kernels._int4 import takes_assembly
from kimi_ops.kernels._mla_combine import mla_decode_combine_kernel
from kimi_ops.kernels._mla_plan import ARCHES_OF, TILES, TILES_FP8, Tile, table_of, tile_of
from kimi_ops.kernels._mla_split import mla_decode_split_kernel
from kimi_ops.quant.latent_fp8 import entry_bytes

BATCH_INVARIANT = True  # then `plan_of` fixes the split size

MAX_RANK, MAX_ROPE = 512, 64
MAX_CAPACITY = 1 << 30  # tokens of a page table's row: counted in int32
# One warp holds all splits of its columns, so that nothing goes through shared memory; 64 registers
# of a thread hold the partials in flight.
COMBINE_WARPS, COMBINE_TILE = 1, 2048


def _padded(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def unsupported(
    q_latent: Tensor,
    kv_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    kv_lora_rank: int,
) -> str | None:
    if q_latent.dtype not in (torch.bfloat16, torch.float16):
        return f"the Triton kernel is for bfloat16 and float16, not {q_latent.dtype}"
    rope = q_latent.shape[3] - kv_lora_rank
    if kv_lora_rank > MAX_RANK or rope > MAX_ROPE:
        return (
            f"the Triton kernel is for C up to {MAX_RANK} and R up to {MAX_ROPE}, "
            f"not {kv_lora_rank} and {rope}"
        )
    capacity = page_table.shape[1] * kv_cache.shape[1]
    if capacity >= MAX_CAPACITY:
        return f"the Triton kernel is for page tables of less than 2^30 tokens, not {capacity}"
    if kv_cache.dtype == torch.uint8 and not is_aligned_fp8(kv_cache, kv_lora_rank):
        return f"the Triton kernel: {FP8_CACHE}"
    return None


def _fits_gluon(gpu: Target, q_latent: Tensor, kv_cache: Tensor, kv_lora_rank: int) -> bool:
    """Whether this Triton and this call are such as the Gluon kernels for sm_90 were made for."""
    if table_of(gpu) != "sm_90" or not _gluon.compiles():
        return False
    if kv_cache.dtype == torch.uint8:
        return False  # their copies bring the cache to shared memory as it is
    return bool(_kernels_of("_mla_split_sm90").fits(q_latent, kv_cache, kv_lora_rank))


def _kernels_of(module: str) -> ModuleType:
    """A module of Gluon kernels, imported at its first use: not every Triton can."""
    return importlib.import_module(f"kimi_ops.kernels.{module}")


def _shared_arguments(
    q_latent: Tensor,
    kv_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    part: Tensor,
    part_lse: Tensor,
    plan: Plan,
) -> dict[str, Any]:
    """What every kernel of the first stage takes."""
    return {
        "q_ptr": q_latent,
        "kv_ptr": kv_cache,
        "table_ptr": page_table,
        "length_ptr": seq_lens,
        "out_ptr": part,
        "lse_ptr": part_lse,
        "scale": scale,
        "new": q_latent.shape[1],
        "heads": q_latent.shape[2],
        "num_pages": kv_cache.shape[0],
        "capacity": page_table.shape[1] * kv_cache.shape[1],
        "num_splits": plan.splits,
        "min_blocks": plan.min_blocks,
        "stride_q_b": q_latent.stride(0),
        "stride_q_s": q_latent.stride(1),
        "stride_q_h": q_latent.stride(2),
        "stride_kv_p": kv_cache.stride(0),
        "stride_table_b": page_table.stride(0),
        "stride_table_p": page_table.stride(1),
        "stride_length_b": seq_lens.stride(0),
        "PAGE": kv_cache.shape[1],
    }


def _plain_arguments(
    q_latent: Tensor, kv_cache: Tensor, kv_lora_rank: int, tile: Tile, assembly: bool
) -> dict[str, Any]:
    """What `mla_decode_split_kernel` takes besides."""
    rope = q_latent.shape[3] - kv_lora_rank
    return {
        "stride_q_w": q_latent.stride(3),
        "stride_kv_t": kv_cache.stride(1),
        "stride_kv_w": kv_cache.stride(2),
        "C": kv_lora_rank,
        "R": rope,
        "BLOCK_M": tile.rows,
        "BLOCK_T": tile.tokens,
        "BLOCK_C": _padded(kv_lora_rank),
        "BLOCK_R": _padded(rope) if rope else 0,
        "TOKEN_AXIS": tile.token_axis,
        "ASSEMBLY": assembly and kv_cache.dtype == torch.uint8,
    }


def _combine_arguments(
    out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor,
    seq_lens: Tensor, capacity: int, plan: Plan, tile: Tile,
) -> dict[str, Any]:  # fmt: skip
    _, new, heads, rank = out.shape
    return {
        "part_ptr": part,
        "part_lse_ptr": part_lse,
        "length_ptr": seq_lens,
        "out_ptr": out,
        "lse_ptr": lse,
        "rows": new * heads,
        "capacity": capacity,
        "num_splits": plan.splits,
        "min_blocks": plan.min_blocks,
        "stride_length_b": seq_lens.stride(0),
        "C": rank,
        "SPLIT_T": tile.tokens,
        "BLOCK_N": plan.partials,
        "BLOCK_C": min(_padded(rank), COMBINE_TILE // plan.partials),
    }


@dataclass(frozen=True)
class FirstStage:
    """How the first stage of a call is cut; `mla_decode_value` begins with it too.

    Attributes:
        tile, plan: from `_mla_plan`.
    """

    tile: Tile
    plan: Plan

    @staticmethod
    def of(q_latent: Tensor, kv_cache: Tensor, page_table: Tensor, kv_lora_rank: int) -> FirstStage:
        """From the shapes, strides and alignment of a call."""
        batch, new, heads, _ = q_latent.shape
        page_size, rows = kv_cache.shape[1], new * heads
        gpu = target(q_latent.device)
        gluon = _fits_gluon(gpu, q_latent, kv_cache, kv_lora_rank)
        capacity = page_table.shape[1] * page_size
        tokens = None if is_batch_invariant() else batch * capacity
        fp8 = kv_cache.dtype == torch.uint8
        tile = tile_of(gpu, rows, page_size, tokens, gluon=gluon, fp8=fp8)
        slots = gpu.multiprocessors * tile.per_sm
        plan = plan_of(tile, slots, batch, rows, capacity, invariant=is_batch_invariant())
        return FirstStage(tile, plan)

    @property
    def is_all(self) -> bool:
        """Whether it can write the op's results itself."""
        return self.plan.splits == 1 and self.tile.direct

    def partials(self, q_latent: Tensor, kv_lora_rank: int) -> tuple[Tensor, Tensor]:
        """Memory for what a second stage joins, ``[B, splits, S * H, C]`` and its lse."""
        batch, new, heads, _ = q_latent.shape
        rows, splits = new * heads, self.plan.splits
        part = q_latent.new_empty((batch, splits, rows, kv_lora_rank), dtype=torch.float32)
        return part, part.new_empty((batch, rows, splits))

    def launch(
        self,
        part: Tensor,
        part_lse: Tensor,
        q_latent: Tensor,
        kv_cache: Tensor,
        page_table: Tensor,
        seq_lens: Tensor,
        scale: float,
        kv_lora_rank: int,
    ) -> None:
        """Writes partial results, or the op's own where it `is_all`."""
        tile, plan = self.tile, self.plan
        arguments = _shared_arguments(
            q_latent, kv_cache, page_table, seq_lens, scale, part, part_lse, plan
        )
        arguments |= {"num_warps": tile.warps, "num_stages": tile.stages}
        grid = (q_latent.shape[0] * plan.splits * plan.row_tiles,)
        if tile.gluon:
            kernel = _kernels_of(tile.gluon).mla_decode_split_sm90_kernel
            kernel[grid](**arguments, STRIDE_KV_T=kv_cache.stride(1), BLOCK_T=tile.tokens)
        else:
            assembly = takes_assembly(q_latent.device)
            arguments |= _plain_arguments(q_latent, kv_cache, kv_lora_rank, tile, assembly)
            mla_decode_split_kernel[grid](**arguments)


def launch(
    outputs: tuple[Tensor, Tensor],
    q_latent: Tensor,
    kv_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    kv_lora_rank: int,
) -> None:
    out, lse = outputs
    if lse.numel() == 0:
        return
    stage = FirstStage.of(q_latent, kv_cache, page_table, kv_lora_rank)
    call = (q_latent, kv_cache, page_table, seq_lens, scale, kv_lora_rank)
    if stage.is_all:
        stage.launch(out, lse, *call)
        return
    part, part_lse = stage.partials(q_latent, kv_lora_rank)
    stage.launch(part, part_lse, *call)
    capacity = page_table.shape[1] * kv_cache.shape[1]
    arguments = _combine_arguments(
        out, lse, part, part_lse, seq_lens, capacity, stage.plan, stage.tile
    )
    grid = (lse.numel(), triton.cdiv(kv_lora_rank, arguments["BLOCK_C"]))
    mla_decode_combine_kernel[grid](**arguments, num_warps=COMBINE_WARPS)


def static_cases() -> Iterable[Any]:
    """Both stages: plain tiles at pages that hold a block of them and that do not, and Gluon's."""
    from kimi_ops.testing.static import StaticCase

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def call(
        rows: int, page: int, splits: int, rank: int, rope: int, direct: bool
    ) -> tuple[Tensor, ...]:
        kind = torch.bfloat16 if direct else torch.float32
        return (
            empty(4, 1, rows, rank + rope),
            empty(99, page, rank + rope),
            empty(4, 33, dtype=torch.int32),
            empty(4, dtype=torch.int32),
            empty(4, splits, rows, rank, dtype=kind),
            empty(4, rows, splits, dtype=torch.float32),
        )

    every = [(t, tile, False) for t, tiles in TILES.items() for tile in tiles]
    every += [(t, tile, True) for t, tiles in TILES_FP8.items() for tile in tiles]
    for table, tile, fp8 in every:
        if not tile.gluon:
            pages = (64,) if tile.within_page else (64, 1) if fp8 else (64, 1, 48)
            uses = [(page, splits, 512, 64) for page in pages for splits in (8, 1)]
            for page, splits, rank, rope in (*uses, (64, 8, 32, 16)):
                q, kv, page_table, seq_lens, part, part_lse = call(
                    tile.rows, page, splits, rank, rope, tile.direct and splits == 1
                )
                if fp8:
                    kv = empty(99, page, entry_bytes(rank, rope), dtype=torch.uint8)
                arguments = _shared_arguments(
                    q, kv, page_table, seq_lens, 0.1, part, part_lse, Plan(1, splits, 1, splits)
                ) | _plain_arguments(q, kv, rank, tile, table != "gfx942")
                name = f"{tile.rows}x{tile.tokens}_w{tile.warps}_{rank}_page_{page}_splits_{splits}"
                yield StaticCase.of_call(
                    f"split_{'fp8_' * fp8}{table}_{name}", mla_decode_split_kernel, arguments,
                    num_warps=tile.warps, num_stages=tile.stages, arches=ARCHES_OF[table],
                )  # fmt: skip
    if _gluon.compiles():
        for tile in (tile for tile in TILES["sm_90"] if tile.gluon):
            for splits in (8, 1):
                tensors = call(tile.rows, 64, splits, 512, 64, tile.direct and splits == 1)
                q, kv, page_table, seq_lens, part, part_lse = tensors
                arguments = _shared_arguments(
                    q, kv, page_table, seq_lens, 0.1, part, part_lse, Plan(1, splits, 1, splits)
                ) | {"STRIDE_KV_T": kv.stride(1), "BLOCK_T": tile.tokens}
                yield StaticCase.of_call(
                    f"gluon_{tile.rows}x{tile.tokens}_splits_{splits}",
                    _kernels_of(tile.gluon).mla_decode_split_sm90_kernel, arguments,
                    num_warps=tile.warps, num_stages=1, arches=ARCHES_OF["sm_90"],
                )  # fmt: skip
    for splits in (2, 16, 64, MAX_SPLITS):
        _, _, _, seq_lens, part, part_lse = call(64, 64, splits, 512, 64, False)
        yield StaticCase.of_call(
            f"combine_splits_{splits}",
            mla_decode_combine_kernel,
            _combine_arguments(
                empty(4, 1, 64, 512), empty(4, 1, 64, dtype=torch.float32), part, part_lse,
                seq_lens, 4096, Plan(1, splits, 1, splits), TILES["sm_80"][0],
            ),
            num_warps=COMBINE_WARPS,
        )  # fmt: skip
