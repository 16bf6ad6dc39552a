"""Races: which accesses no synchronisation orders.

Shared memory: every warp has a vector clock over the actors of its CTA: the warps, and for each
mbarrier the copies that complete on it. An access is stamped with its actor's own clock; a later
access by another warp is ordered after it if that warp has seen the stamp. A second clock of each
warp holds what it has seen proxy-fenced (`proxies`). Barriers and mbarriers join clocks. Stamps are
kept per granule, the smallest width at which the kernel touches shared memory, so that neighbours
never share one.

Global memory has its own detector (`global_races`), which uses these clocks within a CTA.

Source: PTX ISA, "Memory Consistency Model"; Lamport, CACM 1978; FastTrack, PLDI 2009.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kimi_ops.testing.ptx.types import Array

Report = Callable[[int, str], Exception]
_WARP_BITS = 8
_NEVER = (1 << 23) - 1


class SharedRaces:
    """Clocks and stamps of the shared memory of a batch of CTAs.

    Args:
        ctas, warps: CTAs in the batch, warps in each.
        granules: per CTA.
        warp_of: [lanes] warp within the CTA.
        cta_of: [lanes] CTA within the batch.
        others: actors that are no warps: per mbarrier one for bulk copies, then one for cp.async.
        readers: actors behind those that only read: the warpgroups, for wgmma.
    """

    def __init__(
        self,
        ctas: int,
        warps: int,
        granules: int,
        cta_of: Array,
        warp_of: Array,
        others: int = 0,
        readers: int = 0,
    ) -> None:
        self.warps, self.granules = warps, granules
        self.actors = warps + others + readers
        self._readers = np.array([*range(warps), *range(warps + others, self.actors)])
        self.cta_of, self.warp_of = cta_of, warp_of
        # [:, :, :actors] what a warp has seen, [:, :, actors:] what of it is proxy-fenced.
        self.clock = np.zeros((ctas, warps, 2 * self.actors), np.int32)
        own = np.arange(warps)
        self.clock[:, own, own] = 1
        self.written = np.zeros(ctas * granules, np.int32)
        self.written_line = np.zeros(ctas * granules, np.int32)
        self.by_atomic = np.zeros(ctas * granules, bool)
        self.read = np.zeros((warps + readers, ctas * granules), np.int32)
        self.read_line = np.zeros(ctas * granules, np.int32)
        self.barriers = np.zeros((ctas, warps), np.int32)
        self._row = (cta_of * warps + warp_of) * 2 * self.actors
        self._generic = np.ones(1 << _WARP_BITS, bool)
        self._generic[warps : self.actors : 2] = False
        self.restamp()

    def restamp(self) -> None:
        """Takes over changed clocks into the stamps of lanes."""
        own = np.arange(self.warps)
        self.now = self.clock[:, own, own][self.cta_of, self.warp_of]
        self.stamp = (self.now << _WARP_BITS) | self.warp_of

    def join(self, cta: int, arrived: Array, waiting: Array) -> None:
        """A barrier in one CTA: ``waiting`` warps [bool] see all that the ``arrived`` ones did."""
        seen = self.clock[cta, arrived].max(axis=0)
        self.clock[cta, waiting] = np.maximum(self.clock[cta, waiting], seen)
        own = np.flatnonzero(arrived)
        self.clock[cta, own, own] += 1
        self.barriers[cta, arrived] += 1

    def join_all(self) -> None:
        """A barrier of all warps in every CTA of the batch."""
        self.clock[:] = self.clock.max(axis=1, keepdims=True)
        own = np.arange(self.warps)
        self.clock[:, own, own] += 1
        self.barriers += 1
        self.restamp()

    def release(self, cta: int, warp: int) -> Array:
        """What a warp has done and seen so far, to hand on; call `restamp` at the end."""
        clock: Array = self.clock[cta, warp].copy()
        self.clock[cta, warp, warp] += 1
        return clock

    def acquire(self, cta: int, warp: int, clock: Array) -> None:
        """A warp sees what a clock holds."""
        np.maximum(self.clock[cta, warp], clock, out=self.clock[cta, warp])

    def fence_proxy(self, warps: Array) -> None:
        """Warps (numbered over the batch) fence all that they have seen for the async proxy."""
        clock = self.clock.reshape(-1, 2 * self.actors)
        clock[warps, self.actors :] = clock[warps, : self.actors]
        clock[warps, warps % self.warps] += 1
        self.restamp()

    @staticmethod
    def landed(actor: int, time: int) -> int:
        """The stamp of a copy that has landed at a time of its actor."""
        return time << _WARP_BITS | actor

    @staticmethod
    def in_flight(actor: int) -> int:
        """The stamp of a copy that has not: later than anything that a warp has seen."""
        return _NEVER << _WARP_BITS | actor

    def actor(self, stamp: int) -> str:
        """Who left a stamp, for reports."""
        number = stamp & ((1 << _WARP_BITS) - 1)
        if number < self.warps:
            return f"warp {number}"
        return "a warpgroup's wgmma" if number in self._readers else "an asynchronous copy"

    def unfenced(self, stamps: Array, lanes: Array) -> Array:
        """Which generic writes, stamped [k, n], the warps of lanes [k] know of no fence after."""
        who = stamps & ((1 << _WARP_BITS) - 1)
        late: Array = self._generic[who] & (stamps != 0)
        fenced = self.clock.reshape(-1)[self._row[lanes][:, None] + self.actors + who]
        late &= (stamps >> _WARP_BITS) > fenced
        return late

    def unlanded(self, stamps: Array, lanes: Array) -> Array:
        """Which of the writes are copies whose completion the warps have not waited for."""
        late: Array = (stamps & ((1 << _WARP_BITS) - 1)) >= self.warps
        if late.any():
            late = late & self.unordered(stamps, lanes)
        return late

    def unordered(self, stamps: Array, lanes: Array) -> Array:
        """Whether accesses stamped [k, n] are not ordered before the lanes' [k] next access."""
        late = (stamps & ((1 << _WARP_BITS) - 1)) != self.warp_of[lanes][:, None]
        late &= stamps != 0
        if not late.any():
            return late
        seen = self.clock.reshape(-1)[
            self._row[lanes][:, None] + (stamps & ((1 << _WARP_BITS) - 1))
        ]
        late &= (stamps >> _WARP_BITS) > seen
        return late

    def on_read(self, lanes: Array, cells: Array, line: int, fail: Report) -> None:
        """Checks and records a read of granules [k, n] (numbered over the batch) by lanes [k]."""
        late = self.unordered(self.written[cells], lanes)
        if late.any():
            row, column = np.argwhere(late)[0]
            cell = cells[row, column]
            raise fail(
                int(row),
                f"read, not ordered after the write by {self.actor(int(self.written[cell]))} "
                f"at PTX line {self.written_line[cell]}",
            )
        self.read[self.warp_of[lanes][:, None], cells] = self.now[lanes][:, None]
        self.read_line[cells] = line

    def read_together(self, cta: int, reader: int, warps: Array, cells: Array, line: int) -> None:
        """A read of granules [n] by an actor that only reads, over as warps of the CTA know."""
        actor = self._readers[self.warps + reader]
        now = int(self.clock[cta, :, actor].max()) + 1
        self.clock[cta, warps, actor] = now
        self.read[self.warps + reader, cells] = now
        self.read_line[cells] = line

    def on_write(
        self,
        lanes: Array,
        cells: Array,
        line: int,
        fail: Report,
        *,
        same: Array | None = None,
        atomic: bool = False,
    ) -> None:
        """Checks and records a write; ``same`` [k, n] marks granules whose value stays.

        Two warps that store the same value are no race to report: replicated layouts of Triton do
        so. Atomics do not race with each other.
        """
        late = self.unordered(self.written[cells], lanes)
        if same is not None:
            late &= ~same
        if atomic:
            late &= ~self.by_atomic[cells]
        if late.any():
            row, column = np.argwhere(late)[0]
            cell = cells[row, column]
            raise fail(
                int(row),
                f"write, not ordered after the write by {self.actor(int(self.written[cell]))} "
                f"at PTX line {self.written_line[cell]}",
            )
        seen = self.clock.reshape(-1)[self._row[lanes] + self._readers[:, None]]
        # Whatever a warp has read itself, it has seen.
        seen[self.warp_of[lanes], np.arange(len(lanes))] = np.iinfo(seen.dtype).max
        late = self.read.take(cells, axis=1) > seen[:, :, None]  # [readers, k, n]
        if same is not None:
            late &= ~same
        if late.any():
            reader, row, column = np.argwhere(late)[0]
            raise fail(
                int(row),
                f"write, not ordered after the read by {self.actor(int(self._readers[reader]))} "
                f"at PTX line {self.read_line[cells[row, column]]}",
            )
        self.written[cells] = self.stamp[lanes][:, None]
        self.written_line[cells] = line
        self.by_atomic[cells] = atomic
