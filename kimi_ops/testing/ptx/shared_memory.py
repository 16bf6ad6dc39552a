"""Shared memory of a batch of CTAs, and the local memory of its threads.

Source: PTX ISA, "Local State Space", "Shared State Space".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kimi_ops.testing.ptx.counters import by_warp
from kimi_ops.testing.ptx.errors import MbarrierError, MissingWait, Uninitialised
from kimi_ops.testing.ptx.memory import (
    Update,
    aligned,
    in_bounds,
    one_by_one,
    rows_of,
    same_rows,
    uninitialised,
)
from kimi_ops.testing.ptx.proxies import AsyncRead, AsyncReads
from kimi_ops.testing.ptx.races import SharedRaces
from kimi_ops.testing.ptx.types import BITS, Array

if TYPE_CHECKING:
    from kimi_ops.testing.ptx.binding import Site


class SharedMemory:
    """Shared memory of a batch of CTAs.

    Args:
        ctas, warps: in the batch; warps per CTA.
        size: bytes per CTA.
        granule: bytes per race stamp.
        mbarriers: that a CTA may have.
        warpgroups: in a CTA, where the kernel has wgmma.
    """

    def __init__(
        self,
        ctas: int,
        warps: int,
        size: int,
        granule: int,
        cta_of: Array,
        warp_of: Array,
        mbarriers: int = 0,
        warpgroups: int = 0,
    ) -> None:
        self.size = size
        self.stride = -(-size // 128) * 128
        self.granule = granule
        self.ctas = ctas
        self.base = cta_of.astype(np.int64) * self.stride
        self.data = np.zeros(ctas * self.stride, np.uint8)
        self.flags = np.zeros(ctas * self.stride, np.uint8)
        self.pending: Array | None
        self.check_races = True
        self.check_initialised = True
        granules = self.stride // granule
        self._shape = (ctas, warps, granules, cta_of, warp_of, 2 * mbarriers, warpgroups)
        self.async_reads = AsyncReads(self)
        self.reset()

    def reset(self) -> None:
        """Forgets everything, for a new batch."""
        self.data[:] = 0xAA
        self.flags[:] = 0
        self.pending = None
        self.races = SharedRaces(*self._shape)
        self.async_reads.reset()
        # Whether any copy lands by an mbarrier: most kernels need not look.
        self.lands_by_mbarrier = False
        self._mbarriers: Array | None = None

    def async_read_begin(self, site: Site, lanes: Array, cells: Array) -> AsyncRead:
        """Starts an asynchronous read of granules by the warps of lanes [k]; see `proxies`."""
        return self.async_reads.begin(site, lanes, cells)

    def async_read_end(self, read: AsyncRead, lanes: Array) -> None:
        """The warps of lanes [k] have waited for the read; see `proxies`."""
        self.async_reads.end(read, lanes)

    def address_of(self, cell: int) -> int:
        """Address in its CTA of a granule numbered over the batch."""
        return cell * self.granule % self.stride

    def place(self, site: Site, lanes: Array, address: Array, size: int) -> Array:
        """Checks and counts accesses of ``size`` bytes; returns places [k] in the batch."""
        aligned(site, lanes, address, size, "shared")
        in_bounds(site, lanes, address, size, 0, self.size, "shared memory")
        rows = by_warp(address, lanes, len(self.base))
        wavefronts, ideal = site.wavefronts.count(rows, size)
        site.traffic.shared_wavefronts += wavefronts
        site.traffic.shared_wavefronts_ideal += ideal
        place: Array = self.base[lanes] + address
        return place

    def cells(self, place: Array, size: int) -> Array:
        """Granules [k, n] of accesses of ``size`` bytes at places [k]."""
        count = max(1, size // self.granule)
        first = (place // self.granule)[:, None]
        return first + np.arange(count) if count > 1 else first

    def require_landed(self, site: Site, lanes: Array, cells: Array) -> None:
        """Granules [k, n] must not be the destination of a copy that lanes [k] have not waited for.

        Raises:
            MissingWait: names the copy.
        """
        if self.pending is not None:
            bad = self.pending[cells] != 0
            if bad.any():
                row, column = np.argwhere(bad)[0]
                cell = int(cells[row, column])
                raise self._missing_wait(site, lanes[row], cell, int(self.pending[cell]))
        if self.lands_by_mbarrier:
            late = self.races.unlanded(self.races.written[cells], lanes)
            if late.any():
                row, column = np.argwhere(late)[0]
                cell = int(cells[row, column])
                line = int(self.races.written_line[cell])
                raise self._missing_wait(site, lanes[row], cell, line)

    def hold_mbarrier(self, cells: Array, *, held: bool) -> None:
        """Says that granules are, or are no more, an mbarrier."""
        if self._mbarriers is None:
            self._mbarriers = np.zeros(len(self.data) // self.granule, bool)
        self._mbarriers[cells] = held

    def require_no_mbarrier(self, site: Site, lanes: Array, cells: Array) -> None:
        """Granules [k, n] must not be those of a live mbarrier.

        Raises:
            MbarrierError: they are (PTX ISA, "mbarrier": undefined behaviour).
        """
        if self._mbarriers is None:
            return
        bad = self._mbarriers[cells]
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise site.fail(
                MbarrierError,
                f"ordinary access to the mbarrier at shared memory + "
                f"{self.address_of(int(cells[row, column]))}",
                lanes[row],
            )

    def put_chunks(self, places: Array, data: Array) -> None:
        """Puts data [n, 16] bytes at places [n], multiples of 16, and marks them as written."""
        words = np.ascontiguousarray(data).view(np.uint64)
        rows_of(self.data, 8, 2)[places // 16] = words
        self.set_flags(places // 16, 16)

    def take_chunks(self, places: Array) -> Array:
        """The bytes [n, 16] at places [n], multiples of 16."""
        chunks: Array = self.data.reshape(-1, 16)[places // 16]
        return chunks

    def _missing_wait(self, site: Site, lane: int, cell: int, line: int) -> MissingWait:
        error = site.fail(
            MissingWait,
            f"shared memory + {self.address_of(cell)} is used while an asynchronous copy into it, "
            f"issued at PTX line {line}, is in flight",
            lane,
        )
        assert isinstance(error, MissingWait)
        return error

    def read(
        self, site: Site, lanes: Array, address: Array, unit: int, count: int, *, plain: bool = True
    ) -> Array:
        """Reads ``count`` numbers per lane at addresses [k] in the shared window."""
        size = unit * count
        place = self.place(site, lanes, address, size)
        index = place // size
        cells = self.cells(place, size)
        self.require_no_mbarrier(site, lanes, cells)
        self.require_landed(site, lanes, cells)
        if self.check_initialised:
            bad = uninitialised(self.flags, index, size)
            if bad.any():
                at = int(np.flatnonzero(bad)[0])
                raise site.fail(
                    Uninitialised,
                    f"read of shared memory + {int(address[at])}, never written",
                    lanes[at],
                )
        if self.check_races and plain:
            self.races.on_read(lanes, cells, site.line, site.race("shared memory", lanes, address))
        site.traffic.shared_load_bytes += len(lanes) * size
        values: Array = rows_of(self.data, unit, count)[index]
        return values

    def write(
        self, site: Site, lanes: Array, address: Array, data: Array, *, plain: bool = True
    ) -> None:
        """Writes data [k, count]."""
        unit, count = data.dtype.itemsize, data.shape[1]
        size = unit * count
        place = self.place(site, lanes, address, size)
        index = place // size
        cells = self.cells(place, size)
        self.require_no_mbarrier(site, lanes, cells)
        self.require_landed(site, lanes, cells)
        self.async_reads.require_free(site, lanes, cells)
        rows = rows_of(self.data, unit, count)
        report = site.race("shared memory", lanes, address)
        if self.check_races and plain:
            same = np.broadcast_to(same_rows(rows[index], data)[:, None], cells.shape)
            self.races.on_write(lanes, cells, site.line, report, same=same)
        rows[index] = data
        lost = ~same_rows(rows[index], data)
        if self.check_races and lost.any():
            raise report(int(np.flatnonzero(lost)[0]), "two threads write different values at once")
        self.set_flags(index, size)
        site.traffic.shared_store_bytes += len(lanes) * size

    def start_write(self, site: Site, lanes: Array, address: Array, size: int) -> Array:
        """Checks a write that lands later; returns places [k] in the batch's memory."""
        place = self.place(site, lanes, address, size)
        cells = self.cells(place, size)
        self.require_no_mbarrier(site, lanes, cells)
        self.require_landed(site, lanes, cells)
        self.async_reads.require_free(site, lanes, cells)
        if self.check_races:
            self.races.on_write(lanes, cells, site.line, site.race("shared memory", lanes, address))
        site.traffic.shared_store_bytes += len(lanes) * size
        return place

    def pend(self, cells: Array, line: int) -> None:
        """Marks granules as the destination of a copy in flight, issued at a PTX line."""
        if self.pending is None:
            self.pending = np.zeros(len(self.data) // self.granule, np.int32)
        self.pending[cells] = line

    def unpend(self, cells: Array) -> None:
        """Takes the mark of a copy in flight from granules."""
        assert self.pending is not None
        self.pending[cells] = 0

    def land(self, lanes: Array, cells: Array, line: int) -> None:
        """A copy arrives: from now on it is a write of the lanes that waited for it."""
        self.unpend(cells)
        self.races.written[cells] = self.races.stamp[lanes][:, None]
        self.races.written_line[cells] = line

    def set_flags(self, index: Array, size: int) -> None:
        """Marks accesses of ``size`` bytes, at multiples ``index`` of it, as initialised."""
        unit = min(size, 8)
        rows_of(self.flags, unit, size // unit)[index] = int.from_bytes(b"\1" * unit, "little")

    def update(
        self, site: Site, lanes: Array, address: Array, unit: int, function: Update
    ) -> Array:
        """Atomics in shared memory: old values [k]."""
        place = self.place(site, lanes, address, unit)
        index = place // unit
        cells = self.cells(place, unit)
        self.require_no_mbarrier(site, lanes, cells)
        self.require_landed(site, lanes, cells)
        self.async_reads.require_free(site, lanes, cells)
        bad = uninitialised(self.flags, index, unit)
        if self.check_initialised and bad.any():
            at = int(np.flatnonzero(bad)[0])
            raise site.fail(
                Uninitialised,
                f"atomic on shared memory + {int(address[at])}, never written",
                lanes[at],
            )
        if self.check_races:
            report = site.race("shared memory", lanes, address)
            self.races.on_write(lanes, cells, site.line, report, atomic=True)
        result = np.empty(len(lanes), BITS[unit])
        one_by_one(
            rows_of(self.data, unit, 1)[:, 0], index, np.arange(len(lanes)), function, result
        )
        site.traffic.atomics += len(lanes)
        return result


class LocalMemory:
    """Memory of each thread: `.local` variables and the parameters of inlined calls."""

    def __init__(self, lanes: int, size: int) -> None:
        self.size = size
        self.stride = -(-size // 16) * 16
        self.data = np.zeros(lanes * self.stride, np.uint8)
        self.flags = np.zeros(lanes * self.stride, np.uint8)

    def _index(self, site: Site, lanes: Array, address: Array, size: int) -> Array:
        aligned(site, lanes, address, size, "local")
        in_bounds(site, lanes, address, size, 0, self.size, "local memory")
        index: Array = (lanes * self.stride + address) // size
        return index

    def read(
        self, site: Site, lanes: Array, address: Array, unit: int, count: int, *, plain: bool = True
    ) -> Array:
        """Reads ``count`` numbers per lane."""
        index = self._index(site, lanes, address, unit * count)
        bad = uninitialised(self.flags, index, unit * count)
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            raise site.fail(
                Uninitialised,
                f"read of local memory + {int(address[at])}, never written",
                lanes[at],
            )
        values: Array = rows_of(self.data, unit, count)[index]
        return values

    def write(
        self, site: Site, lanes: Array, address: Array, data: Array, *, plain: bool = True
    ) -> None:
        """Writes data [k, count]."""
        unit, count = data.dtype.itemsize, data.shape[1]
        size = unit * count
        index = self._index(site, lanes, address, size)
        rows_of(self.data, unit, count)[index] = data
        rows_of(self.flags, min(size, 8), max(1, size // 8))[index] = int.from_bytes(
            b"\1" * min(size, 8), "little"
        )
