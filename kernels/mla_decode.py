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
pages of 64 n tokens and a Triton of `GLUON_TRITON`, `_mla_split_sm90` from 33 and
`_mla_split_sm90_narrow` up to 16 query rows.

Source: DeepSeek-V2, arXiv 2405.04434 section 2.1; split over keys: Flash-Decoding, 2023.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_ops._batch_invariant import is_batch_invariant
from kimi_ops.kernels._mla_plan import (
    ARCHES_OF,
    MAX_SPLITS,
    TILES,
    Plan,
    Tile,
    plan_of,
    table_of,
    tile_of,
)
from kimi_ops.kernels._mla_split import LOG2_E, mla_decode_split_kernel, split_bounds
from kimi_ops.kernels._target import Target, target

BATCH_INVARIANT = True  # then `plan_of` fixes the split size

MAX_RANK, MAX_ROPE = 512, 64
MAX_CAPACITY = 1 << 30  # tokens of a page table's row: counted in int32
COMBINE_WARPS = 4
COMBINE_TILE = 8192  # float32 values that a program of the second stage has in flight
# Releases of Triton that `_mla_split_sm90` was compiled with; Gluon changes with each.
GLUON_TRITON = ("3.7.", "3.8.")


@triton.jit
def mla_decode_combine_kernel(
    part_ptr,  # [B, num_splits, S * H, C] float32
    part_lse_ptr,  # [B, S * H, num_splits] float32
    length_ptr,  # [B]
    out_ptr,  # [B, S, H, C]
    lse_ptr,  # [B, S, H]
    rows,  # S * H
    capacity,
    num_splits,
    min_blocks,
    stride_length_b,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,  # of the first stage
    BLOCK_N: tl.constexpr,  # num_splits up to the next power of two
    BLOCK_C: tl.constexpr,  # columns of one program
):
    row = tl.program_id(0).to(tl.int64)
    b = row // rows
    length = tl.load(length_ptr + b * stride_length_b)
    length = tl.minimum(tl.maximum(length, 0), capacity)
    _, _, used = split_bounds(length, 0, num_splits, min_blocks, BLOCK_T)

    offs_n = tl.arange(0, BLOCK_N)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_n, mask_c = offs_n < used, offs_c < C
    part_row = (b * num_splits + offs_n) * rows + row % rows
    lse = tl.load(part_lse_ptr + row * num_splits + offs_n, mask=mask_n, other=float("-inf"))
    part = tl.load(  # [BLOCK_N, BLOCK_C], all in flight before the first is used
        part_ptr + part_row[:, None] * C + offs_c[None, :],
        mask=mask_n[:, None] & mask_c[None, :],
        other=0.0,
    )
    top = tl.max(lse, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2((lse - base) * LOG2_E)  # a NaN of the first stage goes through
    total = tl.sum(weight, 0)
    norm = tl.where(total == 0, 0.0, 1.0 / total)
    out = tl.sum(part * weight[:, None], 0) * norm
    tl.store(out_ptr + row * C + offs_c, out.to(out_ptr.dtype.element_ty), mask=mask_c)
    whole = tl.where(total == 0, float("-inf"), base + tl.log(total))
    tl.store(lse_ptr + row, whole, mask=tl.program_id(1) == 0)


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
    gpu = target(q_latent.device)
    if gpu.vendor == "cuda" and gpu.capability < 80:
        return f"the Triton kernel is for sm_80 and later, not sm_{gpu.capability}"
    return None


def _fits_gluon(gpu: Target, q_latent: Tensor, kv_cache: Tensor, kv_lora_rank: int) -> bool:
    """Whether this Triton and this call are such as the Gluon kernels for sm_90 were made for."""
    if table_of(gpu) != "sm_90" or not triton.__version__.startswith(GLUON_TRITON):
        return False
    return bool(_gluon("_mla_split_sm90").fits(q_latent, kv_cache, kv_lora_rank))


def _gluon(module: str) -> ModuleType:
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
    q_latent: Tensor, kv_cache: Tensor, kv_lora_rank: int, tile: Tile
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
        "BLOCK_T": tile.tokens,
        "BLOCK_N": plan.partials,
        "BLOCK_C": min(_padded(rank), COMBINE_TILE // plan.partials),
    }


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
    batch, new, heads, _ = q_latent.shape
    page_size, rows = kv_cache.shape[1], new * heads
    capacity = page_table.shape[1] * page_size
    gpu = target(q_latent.device)
    gluon = _fits_gluon(gpu, q_latent, kv_cache, kv_lora_rank)
    tile = tile_of(gpu, rows, page_size, gluon=gluon)
    slots = gpu.multiprocessors * tile.per_sm
    plan = plan_of(tile, slots, batch, rows, capacity, invariant=is_batch_invariant())

    part, part_lse = out, lse
    two_stages = plan.splits > 1 or not tile.direct
    if two_stages:
        part = out.new_empty((batch, plan.splits, rows, kv_lora_rank), dtype=torch.float32)
        part_lse = lse.new_empty((batch, rows, plan.splits))
    arguments = _shared_arguments(
        q_latent, kv_cache, page_table, seq_lens, scale, part, part_lse, plan
    )
    arguments |= {"num_warps": tile.warps, "num_stages": tile.stages}
    grid = (batch * plan.splits * plan.row_tiles,)
    if tile.gluon:
        kernel = _gluon(tile.gluon).mla_decode_split_sm90_kernel
        kernel[grid](**arguments, STRIDE_KV_T=kv_cache.stride(1))
    else:
        arguments |= _plain_arguments(q_latent, kv_cache, kv_lora_rank, tile)
        mla_decode_split_kernel[grid](**arguments)
    if two_stages:
        arguments = _combine_arguments(out, lse, part, part_lse, seq_lens, capacity, plan, tile)
        columns = triton.cdiv(kv_lora_rank, arguments["BLOCK_C"])
        mla_decode_combine_kernel[(batch * rows, columns)](**arguments, num_warps=COMBINE_WARPS)


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

    for table, tiles in TILES.items():
        for tile in (tile for tile in tiles if not tile.gluon):
            pages = (64,) if tile.within_page else (64, 1, 48)
            uses = [(page, splits, 512, 64) for page in pages for splits in (8, 1)]
            for page, splits, rank, rope in (*uses, (64, 8, 32, 16)):
                q, kv, page_table, seq_lens, part, part_lse = call(
                    tile.rows, page, splits, rank, rope, tile.direct and splits == 1
                )
                arguments = _shared_arguments(
                    q, kv, page_table, seq_lens, 0.1, part, part_lse, Plan(1, splits, 1, splits)
                ) | _plain_arguments(q, kv, rank, tile)
                name = f"{tile.rows}x{tile.tokens}_w{tile.warps}_{rank}_page_{page}_splits_{splits}"
                yield StaticCase.of_call(
                    f"split_{table}_{name}", mla_decode_split_kernel, arguments,
                    num_warps=tile.warps, num_stages=tile.stages, arches=ARCHES_OF[table],
                )  # fmt: skip
    if triton.__version__.startswith(GLUON_TRITON):
        for tile in (tile for tile in TILES["sm_90"] if tile.gluon):
            for splits in (8, 1):
                tensors = call(tile.rows, 64, splits, 512, 64, tile.direct and splits == 1)
                q, kv, page_table, seq_lens, part, part_lse = tensors
                arguments = _shared_arguments(
                    q, kv, page_table, seq_lens, 0.1, part, part_lse, Plan(1, splits, 1, splits)
                ) | {"STRIDE_KV_T": kv.stride(1)}
                yield StaticCase.of_call(
                    f"gluon_{tile.rows}x{tile.tokens}_splits_{splits}",
                    _gluon(tile.gluon).mla_decode_split_sm90_kernel, arguments,
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
