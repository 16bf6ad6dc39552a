"""The two proxies through which shared memory is reached, and reads that go on after their issue.

Loads, stores and ``cp.async`` use the generic proxy; bulk copies and ``wgmma`` the async proxy.
What the generic proxy wrote the async proxy sees only past a ``fence.proxy.async`` that is ordered
after the write and before the use, whichever thread executes it. An asynchronous read holds its
source from issue to wait: a write in between, by whom ever, is a report.

An instruction that reads shared memory asynchronously uses, of `SharedMemory`:

    read = shared.async_read_begin(site, lanes, cells)   # when it is issued
    shared.async_read_end(read, lanes)                   # when a wait says that the read is over

``lanes`` [k] are one lane per warp that issues (or waits), numbered over the batch; ``cells`` are
granules numbered over the batch, in any order and shape, as ``shared.cells(place, size)`` makes
them of places ``shared.base[lane] + address`` that are multiples of the granule. Begin checks that
the source is written, that no copy into it is in flight, and that every warp in ``lanes`` is
ordered and proxy-fenced after who wrote it. From the end on the source counts as read by the warps
that waited, so that an overwrite must be ordered after their wait. An `AsyncRead` that nobody ends
before its CTA exits is a report too (`AsyncReads.finish`).

What is not asked for: a proxy fence between a generic read and an asynchronous overwrite that is
ordered after it, which no compiler emits; a fence of each thread, rather than of each warp.

Source: PTX ISA, "Memory Consistency Model: Proxies", "Async proxy",
"Parallel Synchronization and Communication Instructions: membar, fence".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kimi_ops.testing.ptx.errors import MissingFence, MissingWait, Race, Uninitialised
from kimi_ops.testing.ptx.memory import uninitialised
from kimi_ops.testing.ptx.types import Array

if TYPE_CHECKING:
    from kimi_ops.testing.ptx.binding import Site
    from kimi_ops.testing.ptx.shared_memory import SharedMemory


@dataclass(eq=False)
class AsyncRead:
    """One asynchronous read of shared memory in flight.

    Attributes:
        site: the instruction that issued it.
        lanes: [k] one lane per issuing warp.
        cells: [n] granules, ascending, each once.
    """

    site: Site
    lanes: Array
    cells: Array


class AsyncReads:
    """All asynchronous reads of a batch that are in flight."""

    def __init__(self, shared: SharedMemory) -> None:
        self.shared = shared
        self.reset()

    def reset(self) -> None:
        """Forgets everything, for a new batch."""
        self.reads: dict[int, AsyncRead] = {}
        self._held: Array | None = None

    def begin(self, site: Site, lanes: Array, cells: Array) -> AsyncRead:
        """Starts a read (see the module).

        Raises:
            Uninitialised, MissingWait, Race, MissingFence: what the source is not ready for.
        """
        shared = self.shared
        lanes, cells = np.atleast_1d(np.asarray(lanes)), np.unique(cells)
        first = int(lanes[0])
        shared.require_landed(site, lanes, np.broadcast_to(cells, (len(lanes), len(cells))))
        if shared.check_initialised:
            bad = uninitialised(shared.flags, cells, shared.granule)
            if bad.any():
                raise site.fail(
                    Uninitialised,
                    f"asynchronous read of {self._name(cells[bad.argmax()])}, never written",
                    first,
                )
        if shared.check_races:
            self._require_ordered(site, lanes, cells)
            require_fenced(shared, site, lanes, cells, "read")
        if self._held is None:
            self._held = np.zeros(len(shared.data) // shared.granule, np.int32)
        self._held[cells] += 1
        read = AsyncRead(site, lanes, cells)
        self.reads[id(read)] = read
        return read

    def _name(self, cell: int) -> str:
        return f"shared memory + {self.shared.address_of(int(cell))}"

    def _require_ordered(self, site: Site, lanes: Array, cells: Array) -> None:
        races = self.shared.races
        stamps = np.broadcast_to(races.written[cells], (len(lanes), len(cells)))
        late = races.unordered(stamps, lanes)
        if late.any():
            row, column = np.argwhere(late)[0]
            cell = cells[column]
            raise site.fail(
                Race,
                f"race on {self._name(cell)}: asynchronous read, not ordered after the write by "
                f"{races.actor(int(stamps[row, column]))} at PTX line {races.written_line[cell]}",
                int(lanes[row]),
            )

    def end(self, read: AsyncRead, lanes: Array) -> None:
        """A wait of the lanes' warps says that the read is over."""
        assert self._held is not None
        if self.reads.pop(id(read), None) is not None:
            self._held[read.cells] -= 1
        races = self.shared.races
        lanes = np.atleast_1d(np.asarray(lanes))
        races.read[races.warp_of[lanes][:, None], read.cells] = races.now[lanes][:, None]
        races.read_line[read.cells] = read.site.line

    def end_together(self, read: AsyncRead, cta: int, warpgroup: int, warps: Array) -> None:
        """The end of a read by a warpgroup (its number in the CTA), known to ``warps`` of the CTA.

        Whoever is ordered after any of them may overwrite the source.
        """
        assert self._held is not None
        del self.reads[id(read)]
        self._held[read.cells] -= 1
        self.shared.races.read_together(cta, warpgroup, warps, read.cells, read.site.line)

    def require_free(self, site: Site, lanes: Array, cells: Array) -> None:
        """A write to granules [k, n] by lanes [k] must not meet a read in flight."""
        if not self.reads:
            return
        assert self._held is not None
        bad = self._held[cells] != 0
        if not bad.any():
            return
        row, column = np.argwhere(bad)[0]
        cell = int(cells[row, column])
        reads = [read for read in self.reads.values() if cell in read.cells]
        raise site.fail(
            Race,
            f"race on {self._name(cell)}: write, while the asynchronous read issued at PTX line "
            f"{reads[0].site.line} ({reads[0].site.ins.opcode}) is in flight",
            int(lanes[row]),
        )

    def finish(self, done: Array) -> None:
        """The CTAs ``done`` [bool] have exited.

        Raises:
            MissingWait: one of their reads is in flight.
        """
        for read in self.reads.values():
            cta = int(self.shared.races.cta_of[read.lanes[0]])
            if done[cta]:
                raise read.site.fail(
                    MissingWait,
                    f"{self._name(read.cells[0])} is freed while an asynchronous read of it is in "
                    "flight: the CTA exits without a wait for it",
                    int(read.lanes[0]),
                )


def require_fenced(shared: SharedMemory, site: Site, lanes: Array, cells: Array, use: str) -> None:
    """Generic writes to granules [n] must be proxy-fenced before an asynchronous ``use`` by lanes.

    Raises:
        MissingFence: names the write.
    """
    races = shared.races
    stamps = np.broadcast_to(races.written[cells], (len(lanes), len(cells)))
    late = races.unfenced(stamps, lanes)
    if late.any():
        row, column = np.argwhere(late)[0]
        cell = int(cells[column])
        raise site.fail(
            MissingFence,
            f"asynchronous {use} of shared memory + {shared.address_of(cell)} without a "
            f"fence.proxy.async after the write by {races.actor(int(stamps[row, column]))} at PTX "
            f"line {races.written_line[cell]}",
            int(lanes[row]),
        )
