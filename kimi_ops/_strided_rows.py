"""Rows of a tensor ``[..., D]`` with any strides, as the launchers of every language pass them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """Where the rows of a tensor are: row ``i`` starts ``i // inner * stride_outer + i % inner *
    stride_inner`` elements behind the first one; its elements are ``stride_d`` apart."""

    total: int
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
    if x.numel() == 0:
        return x, Rows(0, 1, 0, 0, 1)
    if x.is_contiguous():  # what `rows_of` would find, in a third of the time
        columns = x.shape[-1]
        total = x.numel() // columns
        return x, Rows(total, total, 0, columns if total > 1 else 0, 1)
    rows = rows_of(x)
    if rows is None:
        x = x.contiguous()
        rows = rows_of(x)
    assert rows is not None
    return x, rows
