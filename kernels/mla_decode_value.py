"""Triton kernels of `kimi_ops.mla_decode_value`: decode attention and its value projection.

The first stage is `mla_decode`'s. Where it splits the cached tokens, one more kernel joins the
splits and projects; without splits it is followed by `mla_project_value`'s kernel.

    stage 2, grid (cdiv(B * S, BLOCK_T), H * cdiv(V, BLOCK_V)), program (i, h, j):

      part[b, 0..n, (s, h), c0..]   [BLOCK_N, BLOCK_T, BLOCK_C]      w_uv[h, j.., c0..]
         joined by exp(lse - max) -> out [BLOCK_T, BLOCK_C]     x    [BLOCK_C, BLOCK_V]
                                                                 = value [BLOCK_T, BLOCK_V]
      c0 = 0, BLOCK_C, ..: the loads of the next columns are on their way meanwhile

Bytes: w_uv once per token tile, 8.4 MB at 64 heads, which is the floor of few tokens (2.5 us of an
H100's DRAM); the partials, which are in L2, once per tile of V: with 64 heads 17 MB of them where
the splits fill the GPU, 4.2 MB at B = 1. The multiplication is nothing beside that. All tokens are
one tile where they can be, so that w_uv is read once: splits x tokens is about the number of
multiprocessors, and BLOCK_N x BLOCK_T x BLOCK_C is a constant number of values in flight.

A tensor core multiplies 16 rows at least: fewer tokens are repeated up to 16, which costs no load.

Numerics: as the two ops one after the other. The joined result is rounded to the dtype of the
weight, the products are summed in float32, one rounding at the end. In batch-invariant mode every
call takes the same tile and this second stage, also with one split.

Source: DeepSeek-V2, arXiv 2405.04434 section 2.1; split over keys: Flash-Decoding, 2023.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_ops._batch_invariant import is_batch_invariant
from kimi_ops._mla_plan import MAX_SPLITS, Plan
from kimi_ops._target import Target, target
from kimi_ops.kernels import mla_project_value
from kimi_ops.kernels._mla_combine import split_weights
from kimi_ops.kernels._mla_plan import TILES
from kimi_ops.kernels._mla_split import split_bounds
from kimi_ops.kernels.mla_decode import FirstStage
from kimi_ops.kernels.mla_decode import unsupported as attention_unsupported

BATCH_INVARIANT = True  # then `plan_of` fixes the split size, and `Tile.of` has one answer

WARPS = 8
# What a program asks for at a time: float32 values of partials and 16-bit ones of the weight, 64
# registers of a thread each. The weight then lies in shared memory: 64 KiB, of which gfx942 has no
# more at all.
PARTIALS_IN_FLIGHT, WEIGHTS_IN_FLIGHT, WEIGHTS_IN_FLIGHT_LDS = 16384, 32768, 8192
MAX_TOKENS = 32  # 64 would be wgmma, tcgen05: more shared memory, and another order of sums
INVARIANT_TOKENS, INVARIANT_COLUMNS = 8, 64


class Tile(NamedTuple):
    """BLOCK_T, BLOCK_V and BLOCK_C of the second stage."""

    tokens: int
    columns: int
    depth: int

    @staticmethod
    def of(gpu: Target, partials: int, tokens: int, heads: int, value: int, rank: int) -> Tile:
        """The largest tile of which there are as many as multiprocessors, or as many as can be.

        The partials are read again for each tile of V and the weight for each tile of tokens, so
        V is cut only where there are too few tokens. In batch-invariant mode the answer depends on
        the widths alone.

        Args:
            gpu: that the launch is for.
            partials: BLOCK_N.
            tokens, heads, value, rank: B * S, H, V and C.
        """
        columns = max(16, min(128, _power_of_two(value)))
        most = min(MAX_TOKENS, PARTIALS_IN_FLIGHT // 64 // partials)
        rows = 1
        if is_batch_invariant():
            rows, columns = INVARIANT_TOKENS, min(columns, INVARIANT_COLUMNS)
        else:
            while rows < most and triton.cdiv(tokens, rows) * heads > gpu.multiprocessors:
                rows *= 2
            programs = triton.cdiv(tokens, rows) * heads * triton.cdiv(value, columns)
            while columns > 16 and 2 * programs <= gpu.multiprocessors:
                columns, programs = columns // 2, 2 * programs
        weights = WEIGHTS_IN_FLIGHT if gpu.shared_bytes > 64 << 10 else WEIGHTS_IN_FLIGHT_LDS
        depth = min(PARTIALS_IN_FLIGHT // (partials * rows), weights // columns)
        return Tile(rows, columns, min(depth, max(16, _power_of_two(rank))))


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


@triton.jit
def mla_decode_value_combine_kernel(
    part_ptr,  # [B, num_splits, S * H, C] float32
    part_lse_ptr,  # [B, S * H, num_splits] float32
    length_ptr,  # [B]
    w_uv_ptr,  # [H, V, C]
    value_ptr,  # [B, S, H, V], contiguous
    tokens,  # B * S
    new,  # S
    heads,  # H
    capacity,
    num_splits,
    min_blocks,
    stride_length_b,
    stride_w_h,
    stride_w_v,
    stride_w_c,
    C: tl.constexpr,
    V: tl.constexpr,
    SPLIT_T: tl.constexpr,  # BLOCK_T of the first stage
    BLOCK_N: tl.constexpr,  # num_splits up to the next power of two
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,  # of the product: BLOCK_T, or 16
):
    chunks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    head = tl.program_id(1) // chunks
    offs_v = tl.program_id(1) % chunks * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < tokens
    b = (offs_t // new).to(tl.int64)
    length = tl.load(length_ptr + b * stride_length_b, mask=mask_t, other=0)
    length = tl.minimum(tl.maximum(length, 0), capacity)
    _, _, used = split_bounds(length, 0, num_splits, min_blocks, SPLIT_T)

    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n[:, None] < used[None, :]  # [BLOCK_N, BLOCK_T]
    rows = new * heads
    row = offs_t % new * heads + head
    lse_at = ((b * rows + row) * num_splits)[None, :] + offs_n[:, None]
    lse = tl.load(part_lse_ptr + lse_at, mask=mask_n, other=float("-inf"))
    weight, norm, _ = split_weights(lse)
    part_at = ((b[None, :] * num_splits + offs_n[:, None]) * rows + row[None, :]) * C

    w_uv_ptr += head.to(tl.int64) * stride_w_h + offs_v.to(tl.int64)[None, :] * stride_w_v
    value = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        offs_c = c0 + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        w = tl.load(  # [BLOCK_C, BLOCK_V]
            w_uv_ptr + offs_c.to(tl.int64)[:, None] * stride_w_c,
            mask=mask_c[:, None] & mask_v[None, :],
            other=0.0,
        )
        part = tl.load(  # [BLOCK_N, BLOCK_T, BLOCK_C]
            part_ptr + part_at[:, :, None] + offs_c[None, None, :],
            mask=mask_n[:, :, None] & mask_c[None, None, :],
            other=0.0,
        )
        out = (tl.sum(part * weight[:, :, None], 0) * norm[:, None]).to(w.dtype)
        x = tl.broadcast_to(out[None, :, :], (ROWS // BLOCK_T, BLOCK_T, BLOCK_C))
        value = tl.dot(tl.reshape(x, (ROWS, BLOCK_C)), w, value)

    offs_m = tl.arange(0, ROWS)
    token = tl.program_id(0) * BLOCK_T + offs_m
    mask_m = (offs_m < BLOCK_T) & (token < tokens)  # each token once of the rows that repeat it
    value_row = (token.to(tl.int64) * heads + head) * V
    tl.store(
        value_ptr + value_row[:, None] + offs_v[None, :],
        value.to(value_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_v[None, :],
    )


def unsupported(
    q_latent: Tensor,
    kv_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    w_uv: Tensor,
    scale: float,
    kv_lora_rank: int,
) -> str | None:
    return attention_unsupported(q_latent, kv_cache, page_table, seq_lens, scale, kv_lora_rank)


def _arguments(
    value: Tensor, part: Tensor, part_lse: Tensor, seq_lens: Tensor, w_uv: Tensor,
    capacity: int, stage: FirstStage, tile: Tile,
) -> dict[str, Any]:  # fmt: skip
    batch, new, heads, columns = value.shape
    return {
        "part_ptr": part,
        "part_lse_ptr": part_lse,
        "length_ptr": seq_lens,
        "w_uv_ptr": w_uv,
        "value_ptr": value,
        "tokens": batch * new,
        "new": new,
        "heads": heads,
        "capacity": capacity,
        "num_splits": stage.plan.splits,
        "min_blocks": stage.plan.min_blocks,
        "stride_length_b": seq_lens.stride(0),
        "stride_w_h": w_uv.stride(0),
        "stride_w_v": w_uv.stride(1),
        "stride_w_c": w_uv.stride(2),
        "C": w_uv.shape[2],
        "V": columns,
        "SPLIT_T": stage.tile.tokens,
        "BLOCK_N": stage.plan.partials,
        "BLOCK_T": tile.tokens,
        "BLOCK_V": tile.columns,
        "BLOCK_C": tile.depth,
        "ROWS": max(16, tile.tokens),
    }


def launch(
    value: Tensor,
    q_latent: Tensor,
    kv_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    w_uv: Tensor,
    scale: float,
    kv_lora_rank: int,
) -> None:
    if value.numel() == 0:
        return
    batch, new, heads, columns = value.shape
    stage = FirstStage.of(q_latent, kv_cache, page_table, kv_lora_rank)
    call = (q_latent, kv_cache, page_table, seq_lens, scale, kv_lora_rank)
    if stage.is_all and not is_batch_invariant():
        out = q_latent.new_empty((batch, new, heads, kv_lora_rank))
        lse = q_latent.new_empty((batch, new, heads), dtype=torch.float32)
        stage.launch(out, lse, *call)
        mla_project_value.launch(value.flatten(0, 1), out.flatten(0, 1), w_uv)
        return
    part, part_lse = stage.partials(q_latent, kv_lora_rank)
    stage.launch(part, part_lse, *call)
    gpu = target(q_latent.device)
    tile = Tile.of(gpu, stage.plan.partials, batch * new, heads, columns, kv_lora_rank)
    capacity = page_table.shape[1] * kv_cache.shape[1]
    grid = (triton.cdiv(batch * new, tile.tokens), heads * triton.cdiv(columns, tile.columns))
    mla_decode_value_combine_kernel[grid](
        **_arguments(value, part, part_lse, seq_lens, w_uv, capacity, stage, tile),
        num_warps=WARPS,
        num_stages=1,
    )


_NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")


def static_cases() -> Iterable[Any]:
    """The second stage at Kimi K2.5's widths, from one token to more than one tile of them."""
    from kimi_ops.testing.static import StaticCase

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for gpu, arches in ((Target("cuda", 90, 132, 227 << 10), _NVIDIA),
                        (Target("hip", 942, 304, 64 << 10), ("gfx942",))):  # fmt: skip
        for splits, tokens, heads in ((1, 200, 64), (2, 64, 64), (16, 8, 64), (32, 1, 64),
                                      (64, 1, 16), (64, 8, 16), (MAX_SPLITS, 1, 64)):  # fmt: skip
            tile = Tile.of(gpu, splits, tokens, heads, 128, 512)
            stage = FirstStage(TILES["sm_80"][0], Plan(1, splits, 1, splits))
            part = empty(tokens, splits, heads, 512, dtype=torch.float32)
            yield StaticCase.of_call(
                f"{gpu.vendor}_splits_{splits}_{tile.tokens}x{tile.columns}x{tile.depth}",
                mla_decode_value_combine_kernel,
                _arguments(
                    empty(tokens, 1, heads, 128), part, empty(tokens, heads, splits).float(),
                    empty(tokens).int(), empty(heads, 256, 512)[:, 128:], 4096, stage, tile,
                ),
                num_warps=WARPS,
                num_stages=1,
                arches=arches,
            )  # fmt: skip
