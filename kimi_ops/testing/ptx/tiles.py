"""The global side of a bulk copy: which bytes it reads or writes, and what stands for the others.

Source: PTX ISA, "Tiled Mode" (bounding boxes, out-of-bound accesses).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kimi_ops.testing.ptx.types import Array

# Shared memory moves in chunks of this many bytes, which no swizzle breaks.
CHUNK = 16


@dataclass(frozen=True)
class Box:
    """The global side of a tile: rows of equal length, of which parts lie in the tensor.

    Attributes:
        rows: [r] global addresses of their first byte.
        inside: [r] whether the row lies in the tensor at all.
        first, last: bytes [first, last) of a row lie in the tensor.
        row_bytes, element_bytes: of a row, of an element.
        fill: bits of an element outside.
    """

    rows: Array
    inside: Array
    first: int
    last: int
    row_bytes: int
    element_bytes: int
    fill: int

    @property
    def unit(self) -> int:
        """Bytes of the largest aligned pieces, up to 16, that the inner part is made of."""
        bits = int(np.bitwise_or.reduce(self.rows)) | self.first | self.last | CHUNK
        return bits & -bits

    def pieces(self, unit: int) -> tuple[Array, Array]:
        """(global addresses [n] of the pieces in the tensor, their places [n] in the tile)."""
        within = np.arange(self.first, self.last, unit)
        at = (self.rows[:, None] + within)[self.inside].reshape(-1)
        starts = np.arange(len(self.rows)) * self.row_bytes
        return at, (starts[:, None] + within)[self.inside].reshape(-1)

    def blank(self) -> Array:
        """A tile, uint8 [r * row_bytes], of elements outside the tensor."""
        count = len(self.rows) * self.row_bytes // self.element_bytes
        element = np.array([self.fill], np.uint64).view(np.uint8)[: self.element_bytes]
        return np.tile(element, count)


def bulk_row(address: int, size: int) -> Box:
    """``size`` contiguous bytes as a tile of one row."""
    return Box(np.array([address]), np.ones(1, bool), 0, size, size, 1, 0)
