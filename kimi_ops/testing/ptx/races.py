"""Races: which accesses no synchronisation orders.

Shared memory: every warp has a vector clock over the warps of its CTA. An access is stamped with
its warp's own clock; a later access by another warp is ordered after it if that warp has seen the
stamp. Barriers and mbarriers join clocks. Stamps are kept per granule, the smallest width at which
the kernel touches shared memory, so that neighbours never share one.

Global memory: the same between CTAs, with sparse clocks that atomics of release and acquire order
advance.

Limits: races between warps of one CTA through global memory are not looked for; memory that
several CTAs have read may be written in the same launch only where every reader is ordered before,
which is reported as a race since the readers are not told apart.

Source: PTX ISA 8.7, chapter 8 (memory consistency model), sections 8.8 (synchronizes) and 8.9
(causality order); Lamport, CACM 1978; FastTrack, PLDI 2009.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kimi_ops.testing.ptx.types import Array

Report = Callable[[int, str], Exception]
_WARP_BITS = 8


class SharedRaces:
    """Clocks and stamps of the shared memory of a batch of CTAs.

    Args:
        ctas, warps: CTAs in the batch, warps in each.
        granules: per CTA.
        warp_of: [lanes] warp within the CTA.
        cta_of: [lanes] CTA within the batch.
    """

    def __init__(self, ctas: int, warps: int, granules: int, cta_of: Array, warp_of: Array) -> None:
        self.warps, self.granules = warps, granules
        self.cta_of, self.warp_of = cta_of, warp_of
        self.clock = np.zeros((ctas, warps, warps), np.int32)
        own = np.arange(warps)
        self.clock[:, own, own] = 1
        self.written = np.zeros(ctas * granules, np.int32)
        self.written_line = np.zeros(ctas * granules, np.int32)
        self.by_atomic = np.zeros(ctas * granules, bool)
        self.read = np.zeros((warps, ctas * granules), np.int32)
        self.read_line = np.zeros(ctas * granules, np.int32)
        self._row = (cta_of * warps + warp_of) * warps
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

    def join_all(self) -> None:
        """A barrier of all warps in every CTA of the batch."""
        self.clock[:] = self.clock.max(axis=1, keepdims=True)
        own = np.arange(self.warps)
        self.clock[:, own, own] += 1
        self.restamp()

    def _unordered(self, stamps: Array, lanes: Array) -> Array:
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
        late = self._unordered(self.written[cells], lanes)
        if late.any():
            row, column = np.argwhere(late)[0]
            cell = cells[row, column]
            raise fail(
                int(row),
                f"read, not ordered after the write by warp {self.written[cell] & 255} "
                f"at PTX line {self.written_line[cell]}",
            )
        self.read[self.warp_of[lanes][:, None], cells] = self.now[lanes][:, None]
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
        late = self._unordered(self.written[cells], lanes)
        if same is not None:
            late &= ~same
        if atomic:
            late &= ~self.by_atomic[cells]
        if late.any():
            row, column = np.argwhere(late)[0]
            cell = cells[row, column]
            raise fail(
                int(row),
                f"write, not ordered after the write by warp {self.written[cell] & 255} "
                f"at PTX line {self.written_line[cell]}",
            )
        own = self.warp_of[lanes]
        for warp in range(self.warps):
            seen = self.clock.reshape(-1)[self._row[lanes] + warp]
            late = (self.read[warp][cells] > seen[:, None]) & (own != warp)[:, None]
            if same is not None:
                late &= ~same
            if late.any():
                row, column = np.argwhere(late)[0]
                raise fail(
                    int(row),
                    f"write, not ordered after the read by warp {warp} "
                    f"at PTX line {self.read_line[cells[row, column]]}",
                )
        self.written[cells] = self.stamp[lanes][:, None]
        self.written_line[cells] = line
        self.by_atomic[cells] = atomic


class GlobalClocks:
    """Happens-before between CTAs: sparse vector clocks, joined by atomics at an address."""

    def __init__(self) -> None:
        self._seen: dict[int, dict[int, int]] = {}
        self._released: dict[int, dict[int, int]] = {}
        self.epoch: dict[int, int] = {}

    def synchronise(self, cta: int, address: int, *, acquire: bool, release: bool) -> None:
        """One atomic access by a CTA at an address."""
        seen = self._seen.setdefault(cta, {})
        if acquire:
            for other, epoch in self._released.get(address, {}).items():
                seen[other] = max(seen.get(other, -1), epoch)
        if release:
            released = self._released.setdefault(address, {})
            epoch = self.epoch.get(cta, 0)
            for other, reached in [*seen.items(), (cta, epoch)]:
                released[other] = max(released.get(other, -1), reached)
            self.epoch[cta] = epoch + 1

    def ordered(self, cta: int, other: int, epoch: int) -> bool:
        """Whether ``cta`` has seen what ``other`` did in its ``epoch``."""
        return self._seen.get(cta, {}).get(other, -1) >= epoch


_SEVERAL = -2


class GlobalRaces:
    """Last accesses of one buffer, per granule: CTA + 1, 0 for none, -2 for several readers."""

    def __init__(self, granules: int, clocks: GlobalClocks) -> None:
        self.clocks = clocks
        self.writer = np.zeros(granules, np.int32)
        self.writer_epoch = np.zeros(granules, np.int32)
        self.reader = np.zeros(granules, np.int32)
        self.reader_epoch = np.zeros(granules, np.int32)
        self.atomic = np.zeros(granules, np.int32)
        self.atomic_epoch = np.zeros(granules, np.int32)

    def _check(
        self, last: Array, epochs: Array, ctas: Array, cells: Array, what: str, fail: Report
    ) -> None:
        late = (last[cells] != 0) & (last[cells] != ctas[:, None] + 1)
        if not late.any():
            return
        for row, column in np.argwhere(late):
            cell = cells[row, column]
            other = int(last[cell]) - 1
            if other < 0:
                raise fail(int(row), f"{what} by several CTAs")
            if not self.clocks.ordered(int(ctas[row]), other, int(epochs[cell])):
                raise fail(int(row), f"{what} by CTA number {other}")

    def _epochs(self, ctas: Array) -> Array | int:
        if not self.clocks.epoch:
            return 0
        return np.array([self.clocks.epoch.get(int(c), 0) for c in ctas])[:, None]

    def on_read(self, ctas: Array, cells: Array, fail: Report) -> None:
        """Checks and records a plain read of granules [k, n] by CTAs [k]."""
        self._check(
            self.writer, self.writer_epoch, ctas, cells, "read, not ordered after a write", fail
        )
        self._check(
            self.atomic, self.atomic_epoch, ctas, cells, "read, not ordered after an atomic", fail
        )
        before = self.reader[cells]
        own = ctas[:, None] + 1
        self.reader[cells] = np.where((before == 0) | (before == own), own, _SEVERAL)
        collided = self.reader[cells] != own
        if collided.any():
            self.reader[cells[collided]] = _SEVERAL
        self.reader_epoch[cells] = self._epochs(ctas)

    def on_write(self, ctas: Array, cells: Array, fail: Report) -> None:
        """Checks and records a plain write."""
        for last, epochs, what in (
            (self.writer, self.writer_epoch, "write, not ordered after a write"),
            (self.atomic, self.atomic_epoch, "write, not ordered after an atomic"),
            (self.reader, self.reader_epoch, "write, not ordered after a read"),
        ):
            self._check(last, epochs, ctas, cells, what, fail)
        own = np.broadcast_to(ctas[:, None] + 1, cells.shape)
        self.writer[cells] = own
        self.writer_epoch[cells] = self._epochs(ctas)
        collided = self.writer[cells] != own
        if collided.any():
            row, column = np.argwhere(collided)[0]
            other = int(self.writer[cells[row, column]]) - 1
            raise fail(int(row), f"write, at the same time as a write by CTA number {other}")

    def on_atomic(self, ctas: Array, cells: Array, fail: Report) -> None:
        """Checks and records an atomic access."""
        self._check(
            self.writer, self.writer_epoch, ctas, cells, "atomic, not ordered after a write", fail
        )
        self._check(
            self.reader, self.reader_epoch, ctas, cells, "atomic, not ordered after a read", fail
        )
        # The last CTA stands for all before it: who has seen its release has seen theirs.
        self.atomic[cells] = ctas[:, None] + 1
        self.atomic_epoch[cells] = self._epochs(ctas)
