"""The tiles of kernels that go through the rows of a tensor ``[..., D]``, and what they share."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Tile(NamedTuple):
    """Rows and columns of a program, and its warps."""

    rows: int
    columns: int
    warps: int


# Columns up to -> tile. A whole row stays in registers, so that it is read once; a thread holds 16
# elements (32 from 2,048 columns on), which in 16-bit dtypes are 16-byte loads. Short rows share a
# program, which otherwise would leave most of its lanes idle.
_NORM_TILES = {128: Tile(16, 128, 4), 512: Tile(4, 512, 4), 2048: Tile(1, 2048, 4)}
_WIDEST = Tile(1, 8192, 8)  # wider rows are read twice, the second time from L2


def norm_tile(columns: int) -> Tile:
    """The tile of a kernel that needs whole rows."""
    return next((tile for most, tile in _NORM_TILES.items() if columns <= most), _WIDEST)


def norm_candidates(columns: int, element_bytes: int) -> tuple[Tile, ...]:
    """Tiles for `kimi_ops.kernels._tiles`: whole rows (to 8,192), 8 to 64 values a thread."""
    width = min(_WIDEST.columns, max(64, triton.next_power_of_2(columns)))
    return tuple(
        Tile(rows, width, warps)
        for warps in (1, 2, 4, 8, 16)
        for rows in (1, 2, 4, 8, 16)
        if 8 <= rows * width // (32 * warps) <= 64
    )


@triton.jit
def row_offsets(offs_t, inner, stride_outer, stride_inner):
    """int64 offsets of rows ``offs_t``, in elements (see `Rows`)."""
    wide = offs_t.to(tl.int64)
    return wide // inner * stride_outer + wide % inner * stride_inner


@triton.jit
def _add_pairs(a, a_rest, b, b_rest):
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back) + (a_rest + b_rest)


@triton.jit
def rms_factor(squares, columns, eps, PRECISE: tl.constexpr):
    """1 / sqrt(mean + eps) of rows ``[BLOCK_T, BLOCK_D]`` of squares as a sum ``[BLOCK_T, 1]``.

    The second part is below the last place of the first. An error of the factor is one of the whole
    row, all to one side: in float32, where nothing rounds afterwards, the factor has to be better
    than float32, and so has the sum that it comes from. Otherwise the second part is 0, as it is
    for sums that are infinite, NaN or 0.
    """
    if PRECISE:
        total, rest = tl.reduce((squares, tl.zeros_like(squares)), 1, _add_pairs)
        count = tl.cast(columns, tl.float32)
        mean = tl.div_rn(total, count)
        rest = tl.div_rn(tl.fma(-mean, count, total) + rest, count)
        m = mean + eps
        back = m - mean
        rest += (mean - (m - back)) + (eps - back)
        factor = tl.div_rn(tl.full(m.shape, 1.0, tl.float32), tl.sqrt_rn(m))
        square = factor * factor
        off = tl.fma(-m, square, 1.0) - (m * tl.fma(factor, factor, -square) + rest * square)
        # off is 1 - (m + rest) factor^2, a few units in the last place.
        second = tl.where(tl.abs(off) < 1e-5, 0.5 * factor * off, 0.0)
        return factor[:, None], second[:, None]
    mean = tl.sum(squares, 1) / columns
    factor = tl.rsqrt(mean + eps)[:, None]
    return factor, tl.zeros_like(factor)
