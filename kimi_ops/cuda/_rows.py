"""How the row norms share a row among warps; `csrc/cuda/rows.cuh`."""

from __future__ import annotations

# 16-byte vectors of a row up to -> warps that share it: four vectors a thread stay in registers.
_WARPS = {128: 1, 512: 4}
_MOST_WARPS = 8


def warps_of_row(vectors: int) -> int:
    """How many warps share a row that is that many 16-byte vectors long."""
    return next((warps for most, warps in _WARPS.items() if vectors <= most), _MOST_WARPS)


def rows_of_block(warps: int) -> int:
    """How many rows a thread block has: several where a row is one warp's."""
    return 4 if warps == 1 else 1
