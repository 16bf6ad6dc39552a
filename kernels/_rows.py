"""Rows of a tensor ``[..., D]`` with any strides, and the tiles of kernels that go through rows."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """Where the rows of a tensor are: row ``i`` starts ``i // inner * stride_outer + i % inner *
    stride_inner`` elements behind the first one; its elements are ``stride_d`` apart."""

    count: int
    inner: int
    stride_outer: int
    stride_inner: int
    stride_d: int


def rows_of(x: Tensor) -> Rows | None:
    """The rows of ``x`` ``[..., D]``; None where two strides cannot say where they are."""
    sizes, strides = [1], [0]  # leading dimensions, joined where one stride serves both
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if sizes[-1] == 1:
            sizes[-1], strides[-1] = size, stride
        elif strides[-1] == size * stride:
            sizes[-1], strides[-1] = sizes[-1] * size, stride
        else:
            sizes.append(size)
            strides.append(stride)
    if len(sizes) > 2:
        return None
    inner, stride_inner = sizes[-1], strides[-1]
    outer, stride_outer = (sizes[0], strides[0]) if len(sizes) == 2 else (1, 0)
    return Rows(outer * inner, inner, stride_outer, stride_inner, x.stride(-1))


def or_packed(x: Tensor) -> tuple[Tensor, Rows]:
    """A tensor with its rows: ``x`` itself, or a packed copy where its rows have no two strides."""
    rows = rows_of(x)
    if rows is None:
        x = x.contiguous()
        rows = rows_of(x)
    assert rows is not None
    return x, rows


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
