"""Bulk copies in flight, and copies by cp.async that an mbarrier waits for.

A copy to shared memory reads its source when it is issued and lands as late as it can: when nothing
else can run, or at random with a seed. Its bytes then count at its mbarrier, and whoever waits for
that phase may use them; until then they are no one's. A copy from shared memory holds its source
from issue to ``wait_group.read`` and reaches global memory when it is waited for, at the latest
when its CTA exits.

What is not looked for: accesses of global memory by the own CTA that race with a copy in flight.

Source: PTX ISA, "Completion Mechanisms for Asynchronous Copy Operations",
"Bulk Copy".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kimi_ops.testing.ptx.errors import MbarrierError, MissingWait
from kimi_ops.testing.ptx.mbarrier_objects import LARGEST_COUNT, Mbarrier
from kimi_ops.testing.ptx.proxies import AsyncRead, require_fenced
from kimi_ops.testing.ptx.tiles import CHUNK
from kimi_ops.testing.ptx.types import Array

if TYPE_CHECKING:
    from kimi_ops.testing.ptx.binding import Active, Site
    from kimi_ops.testing.ptx.machine import Machine

_LINE_BYTES = 128


@dataclass(eq=False)
class _Landing:
    """What will complete on an mbarrier: bytes of a bulk copy, or the arrival of a cp.async."""

    bar: Mbarrier
    site: Site
    lane: int
    cells: Array
    actor: int
    size: int = 0
    arrivals: int = 0


@dataclass(eq=False)
class _Store:
    """A copy from shared memory: the read that it holds, and what writes its destination."""

    lane: int
    group: int
    read: AsyncRead | None
    write: Callable[[], None]


class BulkCopies:
    """All bulk copies of a batch."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.reset()

    def reset(self) -> None:
        """Forgets everything, for a new batch."""
        self.group = np.zeros(self.machine.lanes, np.int64)
        self._landings: list[_Landing] = []
        self._stores: list[_Store] = []
        # Of each mbarrier, the last bulk copy and the time at which it has landed.
        self._last: dict[int, tuple[Mbarrier, int, Site, int]] = {}

    # To shared memory

    def load(self, site: Site, lane: int, bar: Mbarrier, addresses: Array, data: Array) -> None:
        """Starts a copy of data [n, 16] bytes to shared addresses [n], which ends at ``bar``."""
        machine, shared = self.machine, self.machine.shared
        machine.async_units.mbarriers.require_published(site, lane, bar)
        lanes = np.array([lane])
        places = shared.base[lane] + addresses
        cells = shared.cells(places, CHUNK).reshape(1, -1)
        shared.require_landed(site, lanes, cells)
        shared.require_no_mbarrier(site, lanes, cells)
        shared.async_reads.require_free(site, lanes, cells)
        if shared.check_races:
            require_fenced(shared, site, lanes, cells[0], "overwrite")
            start = np.array([int(addresses.min())])
            report = site.race("shared memory from", lanes, start)
            shared.races.on_write(lanes, cells, site.line, report)
        shared.put_chunks(places, data)
        self._pend(bar, site, lane, cells[0], bar.copies.number, size=data.size)
        site.traffic.bulk_load_bytes += data.size
        count_lines(site, addresses)

    def _pend(
        self, bar: Mbarrier, site: Site, lane: int, cells: Array, actor: int, *, size: int = 0,
        arrivals: int = 0,
    ) -> None:  # fmt: skip
        races = self.machine.shared.races
        races.written[cells] = races.in_flight(actor)
        races.written_line[cells] = site.line
        self._landings.append(_Landing(bar, site, lane, cells, actor, size, arrivals))

    def arrive_later(
        self, site: Site, lane: int, bar: Mbarrier, cells: Array, line: int, *, counted: bool
    ) -> None:
        """A thread's copies by cp.async to granules will arrive at an mbarrier when they land.

        Args:
            line: PTX line of the copies.
            counted: ``.noinc``: the arrival is one of those that the phase expects already.
        """
        if not counted:
            bar.pending += 1
            if bar.pending > LARGEST_COUNT:
                raise site.fail(MbarrierError, f"too many pending arrivals: {bar.state}", lane)
        self._pend(bar, site, lane, cells, bar.copies.number + 1, arrivals=1)
        self.machine.shared.races.written_line[cells] = line

    def in_flight(self, bar: Mbarrier) -> bool:
        """Whether something will still complete on an mbarrier."""
        return any(landing.bar is bar for landing in self._landings)

    def progress(self) -> bool:
        """All copies land; whether there were any."""
        landings, self._landings = self._landings, []
        for landing in landings:
            self._land(landing)
        return bool(landings)

    def nudge(self) -> None:
        """With a random schedule, some copies land."""
        random = self.machine.launch.random
        if random is None or not self._landings:
            return
        now = random.random(len(self._landings)) < 0.5
        landings = self._landings
        self._landings = [landing for landing, go in zip(landings, now, strict=True) if not go]
        for landing, go in zip(landings, now, strict=True):
            if go:
                self._land(landing)

    def _land(self, landing: _Landing) -> None:
        machine, bar = self.machine, landing.bar
        time = bar.copies.time + 1
        races = machine.shared.races
        races.written[landing.cells] = races.landed(landing.actor, time)
        mbarriers = machine.async_units.mbarriers
        if landing.arrivals > bar.pending:
            raise landing.site.fail(MbarrierError, f"a copy arrives, but {bar.state}", landing.lane)
        mbarriers.expect(landing.site, landing.lane, bar, -landing.size)
        bar.pending -= landing.arrivals
        bar.open[landing.actor] = time
        self._last[id(bar)] = (bar, time, landing.site, landing.lane)
        mbarriers.settle(bar)

    # From shared memory

    def store(
        self, site: Site, lane: int, addresses: Array, write: Callable[[Array], None]
    ) -> None:
        """Starts a copy of 16-byte chunks at shared addresses [n]; ``write`` gets them [n, 16]."""
        shared = self.machine.shared
        places = shared.base[lane] + addresses
        cells = shared.cells(places, CHUNK)
        shared.require_no_mbarrier(site, np.array([lane]), cells.reshape(1, -1))
        read = shared.async_read_begin(site, np.array([lane]), cells)
        data = shared.take_chunks(places)
        self._stores.append(_Store(lane, int(self.group[lane]), read, lambda: write(data)))
        site.traffic.bulk_store_bytes += data.size

    def commit(self, active: Active) -> None:
        """Closes the open bulk group of the active lanes."""
        self.group[active.lanes] += 1

    def wait(self, active: Active, pending: int, *, read_only: bool) -> None:
        """Waits for all but the last ``pending`` bulk groups of the active lanes.

        Args:
            read_only: for their sources only.
        """
        left = []
        for store in self._stores:
            if active.mask[store.lane] and store.group < self.group[store.lane] - pending:
                if store.read is not None:
                    self.machine.shared.async_read_end(store.read, np.array([store.lane]))
                    store.read = None
                if not read_only:
                    store.write()
                    continue
            left.append(store)
        self._stores = left

    # Exit

    def finish(self, done: Array) -> None:
        """The CTAs ``done`` [bool] have exited.

        Raises:
            MissingWait: a copy to or from their shared memory that nobody has waited for.
        """
        cta_of = self.machine.cta_of
        late = [(x.site, x.lane) for x in self._landings if done[cta_of[x.lane]]]
        for bar, time, site, lane in self._last.values():
            if done[cta_of[lane]] and bar.acquired < time:
                late.append((site, lane))
        for site, lane in late:
            raise site.fail(
                MissingWait,
                "shared memory is freed while a copy into it is in flight: the CTA exits and "
                "nobody has waited for the phase of its mbarrier",
                lane,
            )
        self.machine.shared.async_reads.finish(done)
        for store in self._stores:
            if done[cta_of[store.lane]]:
                store.write()
        self._stores = [s for s in self._stores if not done[cta_of[s.lane]]]


def count_lines(site: Site, addresses: Array) -> None:
    """Counts a bulk copy's accesses of shared memory: one wavefront per 128-byte line."""
    lines = len(np.unique(addresses // _LINE_BYTES))
    site.traffic.shared_wavefronts += lines
    site.traffic.shared_wavefronts_ideal += -(-len(addresses) * CHUNK // _LINE_BYTES)
