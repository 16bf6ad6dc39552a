"""Copies to shared memory that are in flight.

A copy reads its source when it is issued and lands when its thread waits for it; until then nothing
may touch its destination. Source: PTX ISA,
"Data Movement and Conversion Instructions: Asynchronous copy".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kimi_ops.testing.ptx.errors import MissingWait
from kimi_ops.testing.ptx.memory import rows_of
from kimi_ops.testing.ptx.types import BITS, Array

if TYPE_CHECKING:
    from kimi_ops.testing.ptx.binding import Active, Site
    from kimi_ops.testing.ptx.machine import Machine
    from kimi_ops.testing.ptx.mbarrier_objects import Mbarrier


@dataclass
class _Copies:
    """Copies issued by one instruction: per lane the place, the group and the data [k, words]."""

    lanes: Array
    index: Array
    cells: Array
    group: Array
    data: Array
    size: int
    site: Site

    @property
    def line(self) -> int:
        """Of the instruction in the PTX text."""
        return self.site.line

    def only(self, which: Array) -> _Copies:
        """Some of them."""
        return _Copies(
            self.lanes[which],
            self.index[which],
            self.cells[which],
            self.group[which],
            self.data[which],
            self.size,
            self.site,
        )


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
        index, group = place // size, self.group[lanes]
        for one, part in site.split(len(lanes)):
            self._copies.append(
                _Copies(lanes[part], index[part], cells[part], group[part], data[part], size, one)
            )

    def hand_over(self, site: Site, lane: int, bar: Mbarrier, *, counted: bool) -> None:
        """A thread's copies so far will arrive at an mbarrier; ``counted`` for ``.noinc``.

        Who waits for that phase may use what they copy; a wait for their groups no longer counts.
        """
        shared = self.machine.shared
        places, line = [np.zeros(0, np.int64)], site.line
        for copies in self._copies:
            mine = copies.lanes == lane
            if mine.any():
                self._place(copies, mine)
                places.append(copies.cells[mine].reshape(-1))
                line = copies.line
        self._copies = [left for c in self._copies if len((left := c.only(c.lanes != lane)).lanes)]
        cells = np.concatenate(places)
        if len(cells):
            shared.unpend(cells)
        self.machine.async_units.bulk.arrive_later(site, lane, bar, cells, line, counted=counted)

    def finish(self, done: Array) -> None:
        """The CTAs ``done`` [bool] have exited.

        Raises:
            MissingWait: a copy of theirs that nobody has waited for.
        """
        for copies in self._copies:
            late = done[self.machine.cta_of[copies.lanes]]
            if late.any():
                raise copies.site.fail(
                    MissingWait,
                    "shared memory is freed while a copy into it is in flight: the thread exits "
                    "without a wait for it",
                    int(copies.lanes[late.argmax()]),
                )

    def _place(self, copies: _Copies, which: Array) -> None:
        shared, size = self.machine.shared, copies.size
        unit = min(size, 8)
        words = np.ascontiguousarray(copies.data[which]).view(BITS[unit])
        rows_of(shared.data, unit, size // unit)[copies.index[which]] = words
        shared.set_flags(copies.index[which], size)

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
                self._place(copies, done)
                shared.land(copies.lanes[done], copies.cells[done], copies.line)
            if not done.all():
                left.append(copies.only(~done))
        self._copies = left
