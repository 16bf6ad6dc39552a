"""Special registers.

Source: PTX ISA, "Special Registers".
"""

from __future__ import annotations

import numpy as np

from kimi_ops.testing.ptx.types import WARP, Array


def special_registers(
    grid: tuple[int, int, int], block: tuple[int, int, int], thread: Array, warp: Array
) -> dict[str, Array]:
    """Name -> uint32 [lanes], of those that are the same in every CTA; a cluster is one CTA.

    Args:
        grid, block: sizes of the launch.
        thread, warp: [lanes] number within the CTA.
    """
    lane = np.arange(len(thread)) % WARP
    bit = np.uint32(1) << lane.astype(np.uint32)
    values: dict[str, Array | int] = {
        "%laneid": lane,
        "%warpid": warp,
        "%lanemask_eq": bit,
        "%lanemask_lt": bit - 1,
        "%lanemask_le": bit | (bit - 1),
        "%lanemask_gt": ~(bit | (bit - 1)),
        "%lanemask_ge": ~(bit - 1),
        "%cluster_ctarank": 0,
        "%cluster_nctarank": 1,
    }
    tid = (thread % block[0], thread // block[0] % block[1], thread // (block[0] * block[1]))
    for axis, letter in enumerate("xyz"):
        values[f"%tid.{letter}"] = tid[axis]
        values[f"%ntid.{letter}"] = block[axis]
        values[f"%nctaid.{letter}"] = grid[axis]
        values[f"%ctaid.{letter}"] = 0
        values[f"%cluster_ctaid.{letter}"] = 0
        values[f"%cluster_nctaid.{letter}"] = 1
    return {
        name: np.array(np.broadcast_to(np.asarray(value), thread.shape), np.uint32)
        for name, value in values.items()
    }
