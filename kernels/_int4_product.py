"""Which form multiplies a block of tokens with int4 weights, and with which tiles.

Tokens in a block: 1, 2, 4, 8 separated (`_int4_few`), 16, 32, 64 blocked (`_int4_many`); where
`_int4_many_plan` says so, 8, 16, 32 and on sm_90 64 of `_int4_many_gluon`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kimi_ops import _target
from kimi_ops._batch_invariant import is_batch_invariant
from kimi_ops.kernels import _gluon
from kimi_ops.kernels._int4_few import separated
from kimi_ops.kernels._int4_many import blocked

_INVARIANT_TOKENS = 16


class Tile(NamedTuple):
    """A program's share of a product.

    Attributes:
        tokens: in a block.
        groups: separated: of a token that the accumulator keeps apart; blocked: in a step along K.
        steps: separated: such tiles per load of scales, so that the scales of a row fill a sector.
        rows: of the weights, twice (gate and up, or neighbours).
        warps, stages: of the launch.
        registers: most per thread, or 0: the compiler's choice. Without a number ptxas aims at 168
            and spills a word or two, though shared memory allows 4 programs per SM anyway.
        gluon: of `_int4_many_gluon`.
    """

    tokens: int
    groups: int
    steps: int
    rows: int
    warps: int
    stages: int
    registers: int = 0
    gluon: bool = False

    @property
    def separated(self) -> bool:
        return self.tokens <= 8 and not self.gluon

    @property
    def options(self) -> dict[str, int]:
        """Of a launch with this tile."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options | {"maxnreg": self.registers} if self.registers else options


# Separated: tokens * groups columns are the N of the matrix instruction, 8 at least. Two warps, so
# that sm_90 and sm_100 use mma.sync too: accumulators are read every few products, which their own
# instructions answer with a wait. 3 stages of 16 or 8 KiB of codes keep 24 to 48 KiB per program in
# flight. 64 rows share x better, but are too few programs at 1 token, and spill at 8. With 4 tokens
# 4 steps spill; with 2 a row's scales fill half a sector.
# Blocked: two warps here as well. Four would get wgmma on sm_90, with the weights in registers, and
# Triton 3.7.1 lets the next step along K write those while three of the four products of a step may
# still be reading them: the PTX is undefined, and right only where K has one step.
_TILES = {
    tile.tokens: tile
    for tile in (
        Tile(tokens=1, groups=8, steps=2, rows=32, warps=2, stages=3, registers=248),
        Tile(tokens=2, groups=4, steps=4, rows=32, warps=2, stages=3, registers=248),
        Tile(tokens=4, groups=4, steps=2, rows=32, warps=2, stages=3, registers=248),
        Tile(tokens=8, groups=2, steps=4, rows=32, warps=2, stages=3, registers=248),
        Tile(tokens=16, groups=4, steps=1, rows=64, warps=2, stages=3),
        Tile(tokens=32, groups=4, steps=1, rows=32, warps=2, stages=3),
        Tile(tokens=64, groups=2, steps=1, rows=32, warps=2, stages=3),
    )
}
# 99 KiB of shared memory hold twice as many programs of half the stage.
_TILES_SMALL_SHARED = _TILES | {
    n: tile._replace(steps=tile.steps // 2) for n, tile in _TILES.items() if n <= 8
}
# AMD's matrix instruction has at least 16 columns.
_TILES_AMD = {n: tile._replace(registers=0) for n, tile in _TILES.items()} | {
    n: _TILES[n]._replace(groups=16 // n, steps=1, registers=0) for n in (1, 2, 4)
}
# Later versions than 3.4 pad a product of fewer columns.
LEAST_COLUMNS = 16 if triton.__version__.startswith("3.4.") else 8
if LEAST_COLUMNS == 16:
    _TILES = _TILES_SMALL_SHARED = _TILES_AMD
# Gluon: 4 warps, which are a warpgroup; a stage is 8 KiB of codes and 256 B per token, and their
# number a power of two. With mma.sync 64 tokens spill (sm_80), with wgmma 128. Without a number of
# registers ptxas aims at 80 for 16 tokens on sm_100 and sm_120 and spills, where shared memory
# allows no more programs than 144 do.
_TILES_WGMMA = {
    n: Tile(tokens=n, groups=4, steps=1, rows=64, warps=4, stages=4, gluon=True)
    for n in (8, 16, 32, 64)
}
_TILES_MMA_SYNC = {
    n: tile._replace(registers=144 * (n == 16)) for n, tile in _TILES_WGMMA.items() if n < 64
}


_GPUS = {
    f"sm_{number}{'a' * (number in (90, 100))}": _target.Target("cuda", number, 1, kib << 10)
    for number, kib in ((80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99))
} | {"gfx942": _target.Target("hip", 942, 1, 64 << 10)}


def tiles(device: torch.device) -> dict[int, Tile]:
    """All tiles for a GPU, by tokens in a block."""
    gpu = _target.target(device)
    if gpu.vendor != "cuda":
        return _TILES_AMD
    return _TILES if gpu.shared_bytes >= 160 << 10 else _TILES_SMALL_SHARED


def gluon_tiles(device: torch.device) -> dict[int, Tile]:
    """Tiles of `_int4_many_gluon` for a GPU, by tokens in a block."""
    return _TILES_WGMMA if _target.target(device).capability == 90 else _TILES_MMA_SYNC


def tile_for(
    device: torch.device,
    tokens: int,
    slots: int,
    experts: int,
    *,
    gluon: bool = False,
    most: int = 64,
) -> Tile:
    """The tile for ``slots`` (token, expert) pairs of ``tokens`` tokens over ``experts`` experts.

    A block should hold what an expert gets under even routing, mean plus four standard deviations,
    and need not hold more than all tokens. ``gluon``: whether the call is such as
    `_int4_many_gluon` is for; there a block costs by its size, and a second block of an expert
    finds the weights in L2, so that one and a half deviations are enough. ``most``: tokens of a
    block at most. In batch-invariant mode the answer is always the same.
    """
    known = tiles(device)
    if gluon:
        known = {n: tile for n, tile in known.items() if n < 8} | gluon_tiles(device)
    if is_batch_invariant():
        return known[_INVARIANT_TOKENS]
    mean = slots / max(experts, 1)
    likely = max(2, math.ceil(mean + 4 * math.sqrt(mean)))
    if gluon and likely > 8:
        likely = max(8, math.ceil(mean + 1.5 * math.sqrt(mean)))
    wanted = min(tokens, likely, most, max(known))
    return known[1 << max(wanted - 1, 0).bit_length()]


def compiled_tiles() -> Iterator[tuple[Tile, tuple[str, ...], _target.Target]]:
    """Every tile with the architectures that use it, and one of their GPUs; for static cases."""
    groups: dict[tuple[Tile, bool], list[tuple[str, _target.Target]]] = {}
    gluon = _gluon.compiles()
    for arch, gpu in _GPUS.items():
        with _target.targeting(gpu):
            device = torch.device("meta")
            used = list(tiles(device).values())
            if gluon and gpu.vendor == "cuda":
                used += gluon_tiles(device).values()
            for tile in used:
                wgmma = tile.gluon and gpu.capability == 90
                groups.setdefault((tile, wgmma), []).append((arch, gpu))
    for (tile, _), members in groups.items():
        vendors = {gpu.vendor for _, gpu in members}
        for vendor in sorted(vendors):
            chosen = [(arch, gpu) for arch, gpu in members if gpu.vendor == vendor]
            yield tile, tuple(arch for arch, _ in chosen), chosen[0][1]


@triton.jit
def product(
    units_ptr,  # int16, at the expert
    scale_ptr,
    rows_a,  # [BN] int64
    rows_b,
    stride_units_n,
    stride_scale_n,
    x_ptr,  # rearranged
    bias_ptr,
    slots_ptr,  # at the block; None: they are 0, 1, 2, ..
    count,
    slots_per_row,
    groups,
    shift,
    TOKENS: tl.constexpr,
    GS: tl.constexpr,
    TILES: tl.constexpr,
    SEPARATED: tl.constexpr,
    EVEN: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """W x^T of two sets of rows for ``count`` slots: two float32 [BN, TOKENS].

    The row of x that belongs to a slot is slot // slots_per_row. Columns from ``count`` on repeat
    the last one.
    """
    if SEPARATED:
        column = tl.arange(0, TOKENS * GS) // GS
    else:
        column = tl.arange(0, TOKENS)
    column = tl.minimum(column, count - 1)
    if slots_ptr is not None:
        column = tl.load(slots_ptr + column)
    x_rows = column.to(tl.int64) // slots_per_row
    if SEPARATED:
        a, b = separated(
            units_ptr, scale_ptr, rows_a, rows_b, stride_units_n, stride_scale_n, x_ptr, bias_ptr,
            x_rows, groups, shift, TOKENS, GS, TILES, EVEN, ASSEMBLY,
        )  # fmt: skip
    else:
        a, b = blocked(
            units_ptr, scale_ptr, rows_a, rows_b, stride_units_n, stride_scale_n, x_ptr,
            x_rows, groups, shift, GS, EVEN, ASSEMBLY,
        )  # fmt: skip
    return a, b
