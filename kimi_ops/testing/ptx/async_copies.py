"""Copies to shared memory that are in flight.

A copy reads its source when it is issued and lands when its thread waits for it; until then nothing
may touch its destination. Source: PTX ISA 8.7, section 9.7.9.25 (asynchronous copies).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kimi_ops.testing.ptx.memory import rows_of
from kimi_ops.testing.ptx.types import BITS, Array

if TYPE_CHECKING:
    from kimi_ops.testing.ptx.binding import Active, Site
    from kimi_ops.testing.ptx.machine import Machine


@dataclass
class _Copies:
    """Copies issued by one instruction: per lane the place, the group and the data [k, words]."""

    lanes: Array
    index: Array
    cells: Array
    group: Array
    data: Array
    size: int
    line: int


class AsyncCopies:
    """All copies of a batch, with the groups that threads commit them to."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.reset()

    def reset(self) -> None:
        """Forgets everything, for a new batch."""
        self.group = np.zeros(self.machine.lanes, np.int64)
        self._copies: list[_Copies] = []

    def issue(self, site: Site, lanes: Array, address: Array, data: Array) -> None:
        """Starts copies of data [k, words of 4 bytes] to shared addresses [k]."""
        shared = self.machine.shared
        size = 4 * data.shape[1]
        place = shared.start_write(site, lanes, address, size)
        cells = shared.cells(place, size)
        shared.pend(cells, site.line)
        self._copies.append(
            _Copies(lanes, place // size, cells, self.group[lanes], data, size, site.line)
        )

    def commit(self, active: Active) -> None:
        """Closes the open group of the active lanes."""
        self.group[active.lanes] += 1

    def wait(self, active: Active, pending: int) -> None:
        """Lets all but the last ``pending`` committed groups of the active lanes land."""
        shared = self.machine.shared
        limit = self.group - pending
        left = []
        for copies in self._copies:
            done = active.mask[copies.lanes] & (copies.group < limit[copies.lanes])
            if done.any():
                unit = min(copies.size, 8)
                target = rows_of(shared.data, unit, copies.size // unit)
                words = np.ascontiguousarray(copies.data[done]).view(BITS[unit])
                target[copies.index[done]] = words
                shared.set_flags(copies.index[done], copies.size)
                shared.land(copies.lanes[done], copies.cells[done], copies.line)
            if not done.all():
                keep = ~done
                left.append(
                    _Copies(
                        copies.lanes[keep],
                        copies.index[keep],
                        copies.cells[keep],
                        copies.group[keep],
                        copies.data[keep],
                        copies.size,
                        copies.line,
                    )
                )
        self._copies = left
