"""Launches `csrc/cuda/mla_decode.cu`: its form for every GPU, or on sm_90 the one on wgmma."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_ops._batch_invariant import is_batch_invariant
from kimi_ops._mla_plan import Plan, plan_of
from kimi_ops._target import Target, target
from kimi_ops.cuda._launcher import launch_kernel
from kimi_ops.cuda._support import ELEMENTS, is_aligned, refusal

BATCH_INVARIANT = True  # then `plan_of` fixes the split size

MAX_RANK, MAX_ROPE = 512, 64
ROWS_A_MULTIPROCESSOR = 8  # of the second stage, that fill one
MAX_CAPACITY = 1 << 30  # tokens of a page table's row: counted in int32
SPLITS_A_WARP = 16  # of the second stage; `mla_decode_combine.cuh`


@dataclass(frozen=True)
class Tile:
    """One block of the first stage, as `csrc/cuda/mla_decode_split.cuh` has it.

    Attributes:
        rows: query rows.
        warps: of a block.
        per_sm: blocks that are resident on one multiprocessor with enough shared memory for them.
        tokens: of a step.
    """

    rows: int
    warps: int
    per_sm: int
    tokens: int = 32

    @property
    def suffix(self) -> str:
        """What the kernel's name ends with."""
        return str(self.rows)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: ``Shared`` of the source, field by field."""
        row, owners = 2 * (MAX_RANK + MAX_ROPE + 8), 2 if self.rows == 64 else 4
        queries = self.rows * row if self.rows == 64 else 16
        given_away = {16: 1, 32: 3, 64: 2}[self.rows] * 512 * self.warps
        p = self.rows * (2 * self.tokens + 16)
        small = 4 * (owners * self.rows + self.rows + self.tokens + self.warps)
        return 2 * self.tokens * row + queries + p + given_away + small


@dataclass(frozen=True)
class WgmmaTile(Tile):
    """The same, as `csrc/cuda/mla_decode_sm90.cuh` has it: for Kimi K2.5's widths, no fp8 cache."""

    @property
    def suffix(self) -> str:
        """As of `Tile`."""
        return "sm90"

    @property
    def shared_bytes(self) -> int:
        """``sm90::Shared`` of the source, field by field."""
        scorers, warps = 2, 8
        tiles = scorers * self.tokens * 2 * (MAX_RANK + MAX_ROPE)
        queries_and_p = self.rows * 2 * (MAX_RANK + scorers * self.tokens)
        return tiles + queries_and_p + 4 * self.rows * 3 * scorers + 8 * 2 * scorers + 4 * warps


TILES = (Tile(16, 4, 2), Tile(32, 8, 1), Tile(64, 8, 1))
TILE_SM90 = WgmmaTile(64, 16, 1, tokens=64)
FEW_ROWS = 16  # that two blocks an SM of mma.sync take in less shared-memory time than wgmma's 64
BLOCK_TOKENS = 32  # that splits are counted in by the kernels of either form
RESERVED_BYTES = 1024  # of shared memory, that the system takes of every block's


def tile_of(gpu: Target, rows: int, *, usual: bool = False) -> Tile:
    """The first tile that takes all query rows at once, or the largest that the GPU can hold.

    Args:
        gpu: that the launch is for.
        rows: S * H.
        usual: whether C and R are Kimi K2.5's and the cache is not of fp8 format.
    """
    if usual and gpu.capability == 90 and rows > FEW_ROWS:
        return TILE_SM90
    tiles = [tile for tile in TILES if tile.shared_bytes <= gpu.shared_bytes]
    return next((tile for tile in tiles if tile.rows >= rows), tiles[-1])


def unsupported(
    q_latent: Tensor,
    kv_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    kv_lora_rank: int,
) -> str | None:
    reason = refusal("mla_decode", q_latent, (torch.bfloat16, torch.float16))
    if reason is not None:
        return reason
    rope = q_latent.shape[3] - kv_lora_rank
    if kv_lora_rank > MAX_RANK or rope > MAX_ROPE:
        return (
            f"mla_decode in CUDA C++ takes C up to {MAX_RANK} and R up to {MAX_ROPE}, "
            f"not {kv_lora_rank} and {rope}"
        )
    capacity = page_table.shape[1] * kv_cache.shape[1]
    if capacity >= MAX_CAPACITY:
        return f"mla_decode in CUDA C++ takes page tables of less than 2^30 tokens, not {capacity}"
    return None


def has_vectors(x: Tensor, rank: int, rope_bytes: int) -> bool:
    """Whether 16-byte accesses reach the latent and the rope values of every row of ``x``."""
    return is_aligned(x) and rank * x.element_size() % 16 == 0 and rope_bytes % 16 == 0


@dataclass(frozen=True)
class FirstStage:
    """How the first stage of a call is cut.

    Attributes:
        tile, plan: query rows and tokens of a block; row tiles and splits.
    """

    tile: Tile
    plan: Plan

    @staticmethod
    def of(q_latent: Tensor, kv_cache: Tensor, page_table: Tensor, kv_lora_rank: int) -> FirstStage:
        """From the shapes of a call."""
        batch, new, heads, width = q_latent.shape
        rows, gpu = new * heads, target(q_latent.device)
        widths = (kv_lora_rank, width - kv_lora_rank)
        usual = widths == (MAX_RANK, MAX_ROPE) and kv_cache.dtype == q_latent.dtype
        tile = tile_of(gpu, rows, usual=usual)
        fit = gpu.shared_bytes // (tile.shared_bytes + RESERVED_BYTES)
        slots = gpu.multiprocessors * max(1, min(tile.per_sm, fit))
        capacity = page_table.shape[1] * kv_cache.shape[1]
        plan = plan_of(tile, slots, batch, rows, capacity, invariant=is_batch_invariant())
        return FirstStage(tile, plan)

    @property
    def min_blocks(self) -> int:
        """Blocks of `BLOCK_TOKENS` that a split takes at least."""
        return self.plan.min_blocks * self.tile.tokens // BLOCK_TOKENS

    def partials(self, q_latent: Tensor, kv_lora_rank: int) -> tuple[Tensor, Tensor]:
        """Memory for what a second stage joins, ``[B, splits, S * H, C]`` and its lse."""
        batch, new, heads, _ = q_latent.shape
        shape = (batch, self.plan.splits, new * heads, kv_lora_rank)
        part = q_latent.new_empty(shape, dtype=torch.float32)
        return part, part.new_empty((batch, new * heads, self.plan.splits))

    def launch(
        self,
        part: Tensor | None,
        out: Tensor | None,
        lse: Tensor,
        q_latent: Tensor,
        kv_cache: Tensor,
        page_table: Tensor,
        seq_lens: Tensor,
        scale: float,
        kv_lora_rank: int,
    ) -> None:
        """Writes partial results and their lse, or without ``part`` the op's own."""
        batch, new, heads, width = q_latent.shape
        fp8, rope = kv_cache.dtype == torch.uint8, width - kv_lora_rank
        launch_kernel(
            "mla_decode",
            f"mla_decode_split_kernel_{ELEMENTS[q_latent.dtype]}_{self.tile.suffix}",
            grid=(batch * self.plan.splits * self.plan.row_tiles,),
            block=(32 * self.tile.warps,),
            args=[
                q_latent,
                kv_cache,
                page_table,
                seq_lens,
                part,
                out,
                lse,
                scale,
                new,
                heads,
                kv_lora_rank,
                rope,
                kv_cache.shape[0],
                kv_cache.shape[1],
                page_table.shape[1] * kv_cache.shape[1],
                self.plan.splits,
                self.min_blocks,
                int(fp8),
                int(has_vectors(q_latent, kv_lora_rank, 2 * rope)),
                int(has_vectors(kv_cache, kv_lora_rank, 2 * rope)),
                *(stride * q_latent.element_size() for stride in q_latent.stride()),
                *(stride * kv_cache.element_size() for stride in kv_cache.stride()),
                *page_table.stride(),
                seq_lens.stride(0),
            ],
            shared_bytes=self.tile.shared_bytes,
        )


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
    if stage.plan.splits == 1:
        stage.launch(None, out, lse, *call)
        return
    part, part_lse = stage.partials(q_latent, kv_lora_rank)
    stage.launch(part, None, part_lse, *call)
    vectors = kv_lora_rank % 4 == 0
    # A block has all columns of a row where there are rows enough to fill the GPU.
    chunks = -(-kv_lora_rank // (128 if vectors else 32))
    enough = lse.numel() >= ROWS_A_MULTIPROCESSOR * target(out.device).multiprocessors
    launch_kernel(
        "mla_decode",
        f"mla_decode_combine_kernel_{ELEMENTS[out.dtype]}_{'vec' if vectors else 'each'}",
        grid=(lse.numel(), 1 if enough else chunks),
        block=(32, -(-stage.plan.partials // SPLITS_A_WARP)),
        args=[
            part,
            part_lse,
            seq_lens,
            out,
            lse,
            part.shape[2],
            kv_lora_rank,
            page_table.shape[1] * kv_cache.shape[1],
            stage.plan.splits,
            stage.min_blocks,
            seq_lens.stride(0),
        ],
    )
