"""Tiles of `moe_route`'s matrix product."""

from __future__ import annotations

from typing import NamedTuple

import triton

from kimi_ops.kernels._tiles import TileChoice


class Tile(NamedTuple):
    """A program of the matrix product: experts, tokens and columns of a step, warps, stages."""

    E: int
    T: int
    D: int
    warps: int
    stages: int


def narrow(release: str) -> tuple[Tile, Tile]:
    """For up to 64 tokens, of 16-bit operands and of others, with a release of Triton.

    One program selects for all of its tokens, on one SM: with 16 its chain is longer, with 4 the
    gate goes through L2 twice as often. 8 columns are too few for wgmma, and bound by memory
    anyway; a warp multiplies 16 experts. Long rows of a step, since a program has few steps.
    Float32 is multiplied without tensor cores, from registers; right, not fast.
    """
    if release.startswith("3.4."):  # no product of less than 16 columns; later ones pad
        # Two rows a warp when selecting, as with 8 columns: 4 warps spilled.
        return Tile(E=64, T=16, D=256, warps=8, stages=2), Tile(E=32, T=16, D=32, warps=8, stages=2)
    return Tile(E=64, T=8, D=256, warps=4, stages=2), Tile(E=32, T=8, D=32, warps=4, stages=2)


NARROW, NARROW_FLOAT32 = narrow(triton.__version__)
NARROW_PARTS = 8
# 96 KiB: fits the 99 KiB of sm_86, 89 and 120; the other one the 64 KiB of gfx942.
WIDE = Tile(E=128, T=64, D=64, warps=4, stages=4)
WIDE_64K = Tile(E=128, T=64, D=64, warps=4, stages=2)
WIDE_FLOAT32 = Tile(E=32, T=32, D=32, warps=4, stages=2)
PARTS = 8  # at most, and in batch-invariant mode


def _narrow_candidates(experts: int, columns: int, tokens: int) -> tuple[Tile, ...]:
    """8 tokens at least, as there are counters for 8 groups; a warp multiplies 16 experts."""
    shapes = (32, 8, 256, 2), (64, 8, 128, 4), (64, 8, 256, 4), (64, 8, 512, 4), (128, 8, 128, 8)
    shapes += (64, 16, 128, 4), (64, 16, 256, 4)
    return tuple(Tile(*shape, stages) for shape in shapes for stages in (2, 3))


def _wide_candidates(experts: int, columns: int, tokens: int) -> tuple[Tile, ...]:
    shapes = (64, 64, 64, 4), (64, 64, 128, 4), (128, 64, 64, 4), (128, 64, 64, 8), (64, 128, 64, 4)
    shapes += (128, 128, 64, 8), (128, 64, 128, 8)
    return tuple(Tile(*shape, stages) for shape in shapes for stages in (2, 3, 4))


# Of 16-bit operands, with 5 to 64 tokens and with more.
_ROW = ("experts", "columns")
TILES = TileChoice("moe_route", _narrow_candidates, row=_ROW, batch="tokens")
TILES_WIDE = TileChoice("moe_route.wide", _wide_candidates, row=_ROW, batch="tokens")
