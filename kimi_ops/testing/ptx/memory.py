"""What the memories of a launch share: windows, checks, atomics.

Every access goes through one of three classes (`GlobalMemory`, `SharedMemory`, `LocalMemory`) with
the same methods, each over the active lanes of many warps at once:

- ``read(site, lanes, address, unit, count)`` -> [k, count] of unsigned ``unit``-byte numbers;
- ``write(site, lanes, address, data)``: data [k, count] of unsigned numbers;
- ``update(site, lanes, address, unit, function)``: atomics, one lane after the other per address.

Checks: bounds, alignment, initialisation, races. Addresses are laid out by the emulator: shared and
local variables start at 0 of their windows, global buffers lie far apart, so that no overrun of one
reaches another.

Source: PTX ISA, "State Spaces", "Generic Addressing".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from kimi_ops.testing.ptx.errors import Misaligned, OutOfBounds, Race
from kimi_ops.testing.ptx.types import BITS, Array

if TYPE_CHECKING:
    from kimi_ops.testing.ptx.binding import Site

SHARED_WINDOW = 1 << 33
LOCAL_WINDOW = 1 << 34
WINDOW_BYTES = 1 << 24
GLOBAL_WINDOW = 1 << 40
# Global buffers are this far apart.
STRIDE_BITS = 38

Update = Callable[[Array, Array], Array]  # (old values [k], which lanes [k]) -> new values [k]


def aligned(site: Site, lanes: Array, address: Array, size: int, name: str) -> None:
    """Every address a multiple of ``size``, a power of two."""
    wrong = address & (size - 1)
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise site.fail(
            Misaligned, f"{size}-byte access at {name} address {int(address[at]):#x}", lanes[at]
        )


def in_bounds(
    site: Site, lanes: Array, offset: Array, size: int, low: int, high: int, name: str
) -> None:
    """Every access within bytes [low, high)."""
    if len(offset) and (int(offset.min()) < low or int(offset.max()) > high - size):
        bad = np.flatnonzero((offset < low) | (offset > high - size))
        raise site.fail(
            OutOfBounds,
            f"{size} bytes at {name} + {int(offset[bad[0]]) - low} of {high - low} bytes "
            f"({len(bad)} threads)",
            lanes[bad[0]],
        )


def shared_addresses(address: Array) -> Array:
    """Shared or generic addresses [k] of shared memory as offsets in the CTA's own."""
    generic = (address >= SHARED_WINDOW) & (address < SHARED_WINDOW + WINDOW_BYTES)
    return np.where(generic, address - SHARED_WINDOW, address)


def rows_of(array: Array, unit: int, count: int) -> Array:
    """Bytes as aligned rows of ``count`` unsigned numbers."""
    width = unit * count
    return array[: len(array) // width * width].view(BITS[unit]).reshape(-1, count)


def same_rows(rows: Array, others: Any) -> Array:
    """Which rows [k] of ``rows`` [k, count] equal those of others, [k, count] or a scalar.

    Column by column: numpy is slow along an axis of one to four.
    """
    same = rows == others
    equal: Array = same[:, 0]
    for column in same.T[1:]:
        equal = equal & column
    return equal


def uninitialised(flags: Array, index: Array, size: int) -> Array:
    """Which accesses of ``size`` bytes, at multiples ``index`` of it, have a byte not yet set."""
    unit = min(size, 8)
    whole = BITS[unit].type(int.from_bytes(b"\1" * unit, "little"))
    return ~same_rows(rows_of(flags, unit, size // unit)[index], whole)


def one_by_one(
    memory: Array, index: Array, positions: Array, function: Update, result: Array
) -> None:
    """Applies atomics in rounds, in each at most one per memory cell, in the order of lanes."""
    left = np.arange(len(index))
    while len(left):
        _, first = np.unique(index[left], return_index=True)
        now = left[first]
        old = memory[index[now]]
        result[positions[now]] = old
        memory[index[now]] = function(old, positions[now])
        left = np.delete(left, first)


def race_report(
    site: Any, name: str, lanes: Array, offset: Array
) -> Callable[[int, str], Exception]:
    """How a race at position ``i`` of an access is reported."""

    def report(position: int, what: str) -> Exception:
        error: Exception = site.fail(
            Race, f"race on {name} + {int(offset[position])}: {what}", lanes[position]
        )
        return error

    return report
