"""Finds the picture or clip of each patch on the device, so that mixed sizes need no host sync."""

from __future__ import annotations

import triton
import triton.language as tl

# Entries that one step of the search looks at; most calls have fewer in all.
ENTRIES_PER_STEP = 16


@triton.jit
def locate(index, grid_ptr, num_entries, PER_FRAME: tl.constexpr, STEP: tl.constexpr):
    """The entry that each patch (or, with ``PER_FRAME``, each position of one frame) belongs to.

    Args:
        index: int32 ``[N]``, patches in the order of the packed batch. With ``PER_FRAME`` an
            entry counts h w patches, whatever t is.
        grid_ptr: ``[num_entries, 3]`` (t, h, w), contiguous.

    Returns:
        int32 ``[N]`` each: (found, t, h, w, place within the entry, first patch of the entry among
        all frames). ``found`` is 0 past the last entry; t, h and w are then 1, the others 0.
    """
    found = tl.zeros_like(index)
    t = tl.zeros_like(index)
    h = tl.zeros_like(index)
    w = tl.zeros_like(index)
    place = tl.zeros_like(index)
    first = tl.zeros_like(index)
    seen = 0  # patches of the entries before this step, as index counts them
    patches = 0  # of all their frames
    for start in range(0, num_entries, STEP):
        offs_e = start + tl.arange(0, STEP)  # [STEP]
        mask_e = offs_e < num_entries
        t_e = tl.load(grid_ptr + offs_e * 3, mask=mask_e, other=0).to(tl.int32)
        h_e = tl.load(grid_ptr + offs_e * 3 + 1, mask=mask_e, other=0).to(tl.int32)
        w_e = tl.load(grid_ptr + offs_e * 3 + 2, mask=mask_e, other=0).to(tl.int32)
        all_e = t_e * h_e * w_e
        size_e = h_e * w_e if PER_FRAME else all_e
        end_e = seen + tl.cumsum(size_e, 0)
        first_e = patches + tl.cumsum(all_e, 0) - all_e
        inside = (index[:, None] >= (end_e - size_e)[None, :]) & (index[:, None] < end_e[None, :])
        hit = inside.to(tl.int32)  # [N, STEP], one 1 in a row at most
        found += tl.sum(hit, 1)
        t += tl.sum(hit * t_e[None, :], 1)
        h += tl.sum(hit * h_e[None, :], 1)
        w += tl.sum(hit * w_e[None, :], 1)
        place += tl.sum(hit * (index[:, None] - (end_e - size_e)[None, :]), 1)
        first += tl.sum(hit * first_e[None, :], 1)
        seen += tl.sum(size_e, 0)
        patches += tl.sum(all_e, 0)
    t = tl.where(found != 0, t, 1)
    h = tl.where(found != 0, h, 1)
    w = tl.where(found != 0, w, 1)
    return found, t, h, w, place, first
