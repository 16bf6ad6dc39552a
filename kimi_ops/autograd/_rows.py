"""Sums of rows that go to the same place, in the same order every time."""

from __future__ import annotations

from torch import Tensor


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """``total[index[i]] += rows[i]``, in place; ``total [n, D]``, ``index [L]``, ``rows [L, D]``.

    Each of torch's two ways is deterministic on one kind of device alone.
    """
    if total.is_cuda:
        total.index_put_((index,), rows, accumulate=True)
    else:
        total.index_add_(0, index, rows)
