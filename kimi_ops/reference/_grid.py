"""Where each patch of a packed batch of pictures and clips lies."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Per patch, each ``[L]`` int64: its entry's (t, h, w), and its frame, row and column there.

    ``inside`` is False for a patch past the last entry; its other values are then those of a
    1 x 1 x 1 entry.
    """

    inside: Tensor
    t: Tensor
    h: Tensor
    w: Tensor
    frame: Tensor
    row: Tensor
    column: Tensor


def locate(grid_thws: Tensor, length: int) -> Place:
    """Places of ``length`` patches in entries of (t, h, w) patches, in frame, row, column order."""
    grid = torch.cat((grid_thws.long(), grid_thws.new_ones((1, 3), dtype=torch.long)))
    ends = grid[:-1].prod(1).cumsum(0)
    index = torch.arange(length, device=grid.device)
    entry = torch.searchsorted(ends, index, right=True)
    start = torch.cat((ends.new_zeros(1), ends))[entry]
    inside = entry < len(ends)
    t, h, w = grid[entry].unbind(1)
    index = (index - start).masked_fill(~inside, 0)
    return Place(inside, t, h, w, index // (h * w), index // w % h, index % w)
