"""Tiles of `mla_decode` by architecture and query rows; `kimi_ops._mla_plan` has the splits.

What decides a tile, bytes of shared memory first. A row of the cache is 1,152 B (512 + 64 values):

    rows of q        16: 18 KiB     32: 36 KiB     64: 72 KiB      read by every block, so resident
    tokens a block   16: 18 KiB     32: 36 KiB     64: 72 KiB      times the stages

- sm_80 (163 KiB): 32 tokens, two stages. Up to 16 rows two programs fit a multiprocessor.
- sm_86, 89 and 120 (99 KiB): 16 tokens, so that 64 rows and two stages take 92 KiB.
- sm_90 (227 KiB): wgmma wants 64 rows on its wide side: up to 32 query rows that side is the
  tokens, above it is the queries. In Gluon up to 16 rows one buffer of 64 tokens and two programs
  (`_mla_split_sm90_narrow`), above 32 rows 128 tokens a step (`_mla_split_sm90`), or 64 where 128
  would leave multiprocessors without a block. In plain Triton
  two stages of 64 tokens; where a block lies in several pages a thread's 16 page addresses spilled
  registers, so that up to 16 rows 8 warps share them, and above 32 rows a block is 32 tokens.
- sm_100 (227 KiB): tcgen05 wants 64 rows, and no fewer cost less: fewer rows run on a tile of 64.
  The compiler keeps more copies of a block, so 32 tokens and two stages take 209 KiB.
- gfx942 (64 KiB): q is kept in registers, 32 rows are what fits; more rows take several tiles.

No tile has more than 64 rows: its float32 accumulator is 128 KiB of the 256 KiB of registers (or of
tensor memory) that a multiprocessor has; 128 rows would take them all. The two tiles of 128 rows
are neighbours in the grid, so that the second reads the cache from L2.
"""

from __future__ import annotations

from dataclasses import dataclass

from kimi_ops._target import Target


@dataclass(frozen=True)
class Tile:
    """One program of the first stage.

    Attributes:
        rows, tokens: BLOCK_M and BLOCK_T.
        warps, stages: of the launch; with 2 stages a block is copied while another is used.
        token_axis: which side of the scores the tokens are on, see `_mla_split`.
        per_sm: programs that are resident on one multiprocessor.
        within_page: only for pages that are multiples of its tokens.
        direct: with one split it writes the op's results itself. Where rounding them to 16 bits
            spilled registers it writes a float32 partial instead, as with several splits.
        gluon: module of the Gluon kernel, where it is not the plain one.
        fills: only where a block of it is left for every multiprocessor.
    """

    rows: int
    tokens: int
    warps: int
    stages: int
    token_axis: int = 1
    per_sm: int = 1
    within_page: bool = False
    direct: bool = True
    gluon: str | None = None
    fills: bool = False


# By rows, and of equal rows the preferred one first.
TILES: dict[str, tuple[Tile, ...]] = {
    "sm_80": (
        Tile(16, 32, 4, 2, per_sm=2),
        Tile(32, 32, 8, 2),
        Tile(64, 32, 8, 2, direct=False),
    ),
    "sm_86": (
        Tile(16, 16, 4, 2, per_sm=2),
        Tile(32, 16, 8, 2),
        Tile(64, 16, 8, 2, direct=False),
    ),
    "sm_90": (
        Tile(16, 64, 4, 1, token_axis=0, per_sm=2, gluon="_mla_split_sm90_narrow"),
        Tile(16, 64, 4, 2, token_axis=0, within_page=True),
        Tile(16, 64, 8, 2, token_axis=0),
        Tile(32, 64, 8, 2, token_axis=0),
        Tile(64, 128, 8, 1, gluon="_mla_split_sm90", fills=True),
        Tile(64, 64, 8, 1, gluon="_mla_split_sm90"),
        Tile(64, 64, 8, 2, within_page=True),
        Tile(64, 32, 8, 2),
    ),
    "sm_100": (Tile(64, 32, 8, 2, direct=False),),
    "gfx942": (Tile(16, 16, 4, 2, per_sm=2), Tile(32, 16, 4, 1)),
}

# For a cache in the fp8 format. Its codes come to registers and not by cp.async; tiles of 64 rows
# on mma.sync (80 to 280 B) and tcgen05 (170 B) spilled over that, and sm_90's swapped forms (20 to
# 400 B). So fewer rows run on 64 there, and more rows take several tiles elsewhere.
TILES_FP8: dict[str, tuple[Tile, ...]] = {
    "sm_80": (Tile(16, 32, 8, 2), Tile(32, 32, 8, 2)),
    "sm_86": (Tile(16, 16, 8, 2), Tile(32, 16, 8, 2)),
    "sm_90": (Tile(64, 64, 8, 2, within_page=True), Tile(64, 32, 8, 2)),
    "sm_100": (Tile(32, 32, 8, 2),),
    "gfx942": (Tile(16, 16, 4, 2), Tile(32, 16, 4, 1)),
}

# Architectures that each table is for, as the ahead-of-time compiler names them.
ARCHES_OF = {
    "sm_80": ("sm_80",),
    "sm_86": ("sm_86", "sm_89", "sm_120"),
    "sm_90": ("sm_90a",),
    "sm_100": ("sm_100a",),
    "gfx942": ("gfx942",),
}


def table_of(gpu: Target) -> str:
    """The key of `TILES` for a GPU."""
    if gpu.vendor == "hip":
        return "gfx942"
    if 100 <= gpu.capability < 120:
        return "sm_100"
    if gpu.capability == 90:
        return "sm_90"
    return "sm_80" if gpu.shared_bytes >= 160 * 1024 else "sm_86"


def tile_of(
    gpu: Target, rows: int, page: int, tokens: int | None, *, gluon: bool, fp8: bool = False
) -> Tile:
    """The first tile that takes all query rows at once, or the first of the largest ones.

    Args:
        gpu: that the launch is for.
        rows: S * H.
        page: tokens per page.
        tokens: that the page tables can hold, or None where the tile must not depend on them.
        gluon: whether the Gluon kernels can run the call.
        fp8: the format of the cache.
    """

    def idles(tile: Tile) -> bool:
        if not tile.fills or tokens is None:
            return False
        return -(-rows // tile.rows) * -(-tokens // tile.tokens) < gpu.multiprocessors

    tiles = [
        tile
        for tile in (TILES_FP8 if fp8 else TILES)[table_of(gpu)]
        if (gluon or not tile.gluon)
        and not (tile.within_page and page % tile.tokens)
        and not idles(tile)
    ]
    largest = max(tile.rows for tile in tiles)
    return next(tile for tile in tiles if tile.rows >= min(rows, largest))
