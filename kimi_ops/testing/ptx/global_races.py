"""Races through global memory, between CTAs and between the warps of one.

Two accesses of a granule race if one of them writes, nothing orders them (`global_clocks`), and
they are not both strong with scopes that reach each other. Per granule the last write and the last
read are kept as stamps; earlier ones that the last does not stand for (two warps read, then one
writes) go to a log, or, where nothing could order them anyway, into a flag.

Not reported: two warps of one CTA that write the same value, as replicated layouts of Triton and
flags do; accesses of one warp by different lanes.

Source: as `global_clocks`; FastTrack, PLDI 2009.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kimi_ops.testing.ptx.global_clocks import AGENT_SHIFT, INSTRUCTIONS, GlobalClocks, Order
from kimi_ops.testing.ptx.types import Array

Report = Callable[[int, str], Exception]
# Earlier accesses of a granule: in the log; weak ones, strong ones of CTAs that nothing can order.
_LOGGED, _WEAK, _STRONG = 1, 2, 4
_LOG_STEP = 1 << 20


class _Log:
    """Accesses that a granule's last one does not stand for: (granule, stamp), sorted on demand."""

    def __init__(self) -> None:
        self._cells = self._stamps = np.zeros(0, np.int64)
        self._new: list[tuple[Array, Array]] = []
        self._new_count = 0

    def add(self, cells: Array, stamps: Array) -> None:
        """Adds accesses [m]."""
        self._new.append((cells.astype(np.int64), stamps))
        self._new_count += len(cells)
        if self._new_count > _LOG_STEP + len(self._cells):
            self._sort()

    def _sort(self) -> None:
        cells = np.concatenate([self._cells, *(c for c, _ in self._new)])
        stamps = np.concatenate([self._stamps, *(s for _, s in self._new)])
        order = np.lexsort((stamps, cells))
        cells, stamps = cells[order], stamps[order]
        last = np.ones(len(cells), bool)  # of one agent the latest stands for all
        last[:-1] = (cells[1:] != cells[:-1]) | ((stamps[1:] ^ stamps[:-1]) >> AGENT_SHIFT != 0)
        self._cells, self._stamps = cells[last], stamps[last]
        self._new, self._new_count = [], 0

    def find(self, cells: Array) -> tuple[Array, Array]:
        """(positions in ``cells``, stamps) of all accesses of the granules [m]."""
        if self._new:
            self._sort()
        low = np.searchsorted(self._cells, cells, "left")
        count = np.searchsorted(self._cells, cells, "right") - low
        position = np.repeat(np.arange(len(cells)), count)
        start = np.repeat(low - np.cumsum(count) + count, count)
        return position, self._stamps[start + np.arange(len(position))]


class _Last:
    """The last accesses of one kind, "read" or "write", of all granules of a buffer."""

    def __init__(self, kind: str, granules: int, clocks: GlobalClocks) -> None:
        self.kind, self.clocks = kind, clocks
        self.stamp = np.zeros(granules, np.int64)
        self.earlier = np.zeros(granules, np.uint8)
        self.log = _Log()

    def check(
        self, what: str, own: Array, lanes: Array, cells: Array, order: Order, fail: Report,
        same: Array | None = None,
    ) -> None:  # fmt: skip
        """Raises where an access of granules [k, n] by lanes [k] races with one of these."""
        stamps = self.stamp[cells]
        late = self.clocks.unordered(own, lanes, stamps)
        self._raise(late, what, own, stamps, order, fail, same)
        earlier = self.earlier[cells]
        if not earlier.any():
            return
        rows, columns = np.nonzero(earlier & (_WEAK if order.strong else _WEAK | _STRONG))
        if len(rows):
            raise fail(int(rows[0]), f"{what}, not ordered after {self.kind}s by several CTAs")
        rows, columns = np.nonzero(earlier & _LOGGED)
        position, stamps = self.log.find(cells[rows, columns])
        rows = rows[position]
        late = self.clocks.unordered(own[rows], lanes[rows], stamps[:, None])
        self._raise(
            late, what, own[rows], stamps[:, None], order,
            lambda row, message: fail(int(rows[row]), message),
            None if same is None else same[rows],
        )  # fmt: skip

    def _raise(
        self, late: Array, what: str, own: Array, stamps: Array, order: Order, fail: Report,
        same: Array | None,
    ) -> None:  # fmt: skip
        if not late.any():
            return
        clocks = self.clocks
        near = clocks.cta_of(stamps) == clocks.cta_of(own)
        if order.strong:
            instruction = stamps & INSTRUCTIONS
            apart = (clocks.narrow[instruction] | order.narrow) & ~near
            late = late & (~clocks.strong[instruction] | apart)
        if same is not None:
            late = late & ~(same[:, None] & near)
        if late.any():
            row, column = np.argwhere(late)[0]
            stamp = int(stamps[row, column])
            kind = "an atomic" if clocks.kind(stamp) else f"a {self.kind}"
            raise fail(int(row), f"{what}, not ordered after {kind} by {clocks.describe(stamp)}")

    def keep(self, own: Array, lanes: Array, cells: Array) -> None:
        """Records accesses; what they do not stand for stays on record as earlier ones."""
        before = self.stamp[cells]
        if before.any():
            self._evict(self.clocks.unordered(own, lanes, before), own, cells, before)
        self.stamp[cells] = own
        # Of several lanes that meet in one step one has left its stamp.
        got = self.stamp[cells]
        lost = (got ^ own) >> AGENT_SHIFT != 0
        if lost.any():
            self._evict(lost, got, cells, np.broadcast_to(own, cells.shape))

    def _evict(self, which: Array, now: Array, cells: Array, stamps: Array) -> None:
        if not which.any():
            return
        cells, stamps = cells[which], stamps[which]
        if self.clocks.synchronises:
            self.earlier[cells] |= _LOGGED
            self.log.add(cells, stamps)
            return
        present = np.broadcast_to(now, which.shape)[which]
        near = self.clocks.cta_of(stamps) == self.clocks.cta_of(present)
        strong = self.clocks.strong[stamps & INSTRUCTIONS]
        for flag, those in ((_WEAK, ~near & ~strong), (_STRONG, ~near & strong)):
            flags = self.earlier[cells[those]]
            self.earlier[cells[those]] = flags | flag
        # Once several CTAs are in it, who they are makes no difference any more.
        near &= self.earlier[cells] & _WEAK == 0
        self.earlier[cells[near]] |= _LOGGED
        self.log.add(cells[near], stamps[near])

    def replace(self, own: Array, cells: Array) -> None:
        """Records accesses that are ordered after all before them."""
        self.stamp[cells] = own
        self.earlier[cells] = 0

    def clear(self, cells: Array) -> None:
        """Forgets the accesses of granules: a later one stands for them."""
        self.stamp[cells] = 0
        self.earlier[cells] = 0


class GlobalRaces:
    """The last accesses of one buffer, per granule."""

    def __init__(self, granules: int, clocks: GlobalClocks) -> None:
        self.clocks = clocks
        self._writes = _Last("write", granules, clocks)
        self._reads = _Last("read", granules, clocks)

    def on_read(self, own: Array, lanes: Array, cells: Array, order: Order, fail: Report) -> None:
        """Checks and records a read of granules [k, n] by lanes [k] with stamps [k, 1]."""
        self._writes.check("read", own, lanes, cells, order, fail)
        self._reads.keep(own, lanes, cells)

    def on_write(
        self, own: Array, lanes: Array, cells: Array, order: Order, fail: Report, same: Array
    ) -> None:
        """Checks and records a write; ``same`` [k] marks lanes that leave the value as it is."""
        self._writes.check("write", own, lanes, cells, order, fail, same)
        self._reads.check("write", own, lanes, cells, order, fail, same)
        if order.strong:
            self._writes.keep(own, lanes, cells)
            self._require_reach("write", own, cells, order, fail)
            return
        self._writes.replace(own, cells)
        self._reads.clear(cells)
        self._require_alone("write", self._writes.stamp[cells], own, fail)

    def on_atomic(self, own: Array, lanes: Array, cells: Array, order: Order, fail: Report) -> None:
        """Checks and records an atomic access, which reads and writes."""
        self._writes.check("atomic", own, lanes, cells, order, fail)
        self._reads.check("atomic", own, lanes, cells, order, fail)
        self._writes.keep(own, lanes, cells)
        self._require_reach("atomic", own, cells, order, fail)

    def _require_reach(
        self, what: str, own: Array, cells: Array, order: Order, fail: Report
    ) -> None:
        """Of strong accesses in one step: a CTA scope does not reach those of another CTA."""
        if order.narrow:
            self._require_alone(what, self._writes.stamp[cells], own, fail)

    def _require_alone(self, what: str, got: Array, own: Array, fail: Report) -> None:
        lost = self.clocks.cta_of(got) != self.clocks.cta_of(own)
        if lost.any():
            row, column = np.argwhere(lost)[0]
            other = self.clocks.describe(int(got[row, column]))
            raise fail(int(row), f"{what}, at the same time as one by {other}")
