"""Global memory: torch CPU tensors and module variables, by virtual address.

Source: PTX ISA, "Global State Space", "Constant State Space".
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
import torch

from kimi_ops.testing.ptx.counters import LINE_BYTES, SECTOR_BYTES, by_warp
from kimi_ops.testing.ptx.errors import OutOfBounds, Uninitialised
from kimi_ops.testing.ptx.global_clocks import GlobalClocks, Order, order_of
from kimi_ops.testing.ptx.global_races import GlobalRaces
from kimi_ops.testing.ptx.memory import (
    GLOBAL_WINDOW,
    STRIDE_BITS,
    Update,
    aligned,
    in_bounds,
    one_by_one,
    rows_of,
    same_rows,
    uninitialised,
)
from kimi_ops.testing.ptx.types import BITS, Array
from kimi_ops.testing.ptx.written import Written, element_flags

if TYPE_CHECKING:
    from kimi_ops.testing.ptx.binding import Site
    from kimi_ops.testing.ptx.machine import Machine

# Each after a zone that belongs to none.
_RED_ZONE = 1 << 20
# No two buffers have the same address for millions of launches, so that an address kept from an
# earlier launch is recognised.
_SLOTS = 1 << 24
_slots = itertools.count()
# Slot -> whose it was, of the latest buffers.
_HISTORY: OrderedDict[int, str] = OrderedDict()
_HISTORY_LENGTH = 1024


class Buffer:
    """One global buffer.

    Args:
        name: for reports.
        data: bytes, shared with whoever owns them.
        low, high: bytes that belong to the launch.
        initialised: False for memory that the launch must write before it reads.

    Attributes:
        base: virtual address of byte 0.
        kept: which bytes hold values is known from earlier launches, and for later ones.
    """

    def __init__(self, name: str, data: Array, low: int, high: int, *, initialised: bool) -> None:
        self.name, self.data, self.low, self.high = name, data, low, high
        self.base = 0
        self.flags = None if initialised else np.zeros(len(data), np.uint8)
        self.kept = False
        self.touched = np.zeros((2, len(data) // SECTOR_BYTES + 1), bool)
        self.races: GlobalRaces | None = None


class GlobalMemory:
    """All buffers of a launch, by virtual address.

    Args:
        kernel: its name, for reports of later launches.

    Attributes:
        granule: bytes per race stamp; set before the first access.
        check_races: whether to look for races.
        written: None, or which bytes of tensors hold values since earlier launches.
    """

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.buffers: list[Buffer] = []
        self.clocks: GlobalClocks | None = None
        self.granule = 4
        self.check_races = True
        self.cta_of: Array = np.zeros(0, np.int64)
        self.written: Written | None = None
        self._storages: dict[int, Buffer] = {}
        self._by_slot: dict[int, Buffer] = {}
        self._orders: dict[int, Order] = {}

    def begin_batch(self, machine: Machine) -> None:
        """Takes over the clocks and the CTA numbers of a batch that is about to run."""
        launch = machine.launch
        self.cta_of = machine.cta_number
        if self.clocks is None:
            gx, gy, gz = launch.grid
            self.clocks = GlobalClocks(launch.program.code, gx * gy * gz, machine.warps)
        self.clocks.begin(machine.shared.races, machine.cta_number)

    def _order(self, site: Site) -> Order:
        order = self._orders.get(site.index)
        if order is None:
            order = self._orders[site.index] = order_of(tuple(site.ins.parts))
        return order

    def fence(self, site: Site, lanes: Array) -> None:
        """A fence of threads."""
        assert self.clocks is not None
        self.clocks.fence(lanes, self._order(site))

    def _add(self, buffer: Buffer) -> int:
        """Gives a buffer its address."""
        slot = next(_slots) % _SLOTS
        buffer.base = GLOBAL_WINDOW + slot * (1 << STRIDE_BITS) + _RED_ZONE
        self.buffers.append(buffer)
        self._by_slot[slot] = buffer
        _HISTORY[slot] = f"{buffer.name} of an earlier launch of {self.kernel}"
        if len(_HISTORY) > _HISTORY_LENGTH:
            _HISTORY.popitem(last=False)
        return buffer.base

    def add_bytes(self, name: str, data: Array) -> int:
        """Registers initialised bytes (a module variable); returns the address."""
        return self._add(Buffer(name, data, 0, len(data), initialised=True))

    def add_tensor(self, name: str, tensor: torch.Tensor, *, initialised: bool) -> int:
        """Registers what a CPU tensor spans; returns its address. Views of one storage share it."""
        storage = tensor.untyped_storage()
        offset = int(tensor.storage_offset()) * tensor.element_size()
        span = 0
        if tensor.numel():
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            span = (last + 1) * tensor.element_size()
        key = storage.data_ptr()
        buffer = self._storages.get(key) if key else None
        if buffer is None:
            data = np.zeros(0, np.uint8)
            if storage.nbytes():
                data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            buffer = Buffer(name, data, offset, offset + span, initialised=True)
            if self.written is not None:
                buffer.flags = self.written.flags(tensor)
                buffer.kept = buffer.flags is not None
            self._add(buffer)
            if key:
                self._storages[key] = buffer
        buffer.low, buffer.high = min(buffer.low, offset), max(buffer.high, offset + span)
        if not initialised:
            if buffer.flags is None:
                buffer.flags = np.ones(len(buffer.data), np.uint8)
            # Of a strided tensor the gaps are no one's to write.
            element_flags(buffer.flags, tensor).zero_()
        return buffer.base + offset

    def _find(self, site: Site, lanes: Array, address: Array) -> list[tuple[Buffer, Array | None]]:
        """Buffers of the addresses, each with the positions that lie in it (None: all)."""
        number = (address - GLOBAL_WINDOW) >> STRIDE_BITS
        first = int(number[0]) if len(number) else 0
        if len(number) and (number == first).all():
            groups: list[tuple[int, Array | None]] = [(first, None)]
        else:
            groups = [(int(n), np.flatnonzero(number == n)) for n in np.unique(number)]
        for n, where in groups:
            if n not in self._by_slot:
                at = 0 if where is None else int(where[0])
                note = ""
                if n in _HISTORY:
                    offset = int(address[at]) - GLOBAL_WINDOW - (n << STRIDE_BITS) - _RED_ZONE
                    note = f" of this launch; it is byte {offset} of {_HISTORY[n]}"
                raise site.fail(
                    OutOfBounds, f"address {int(address[at]):#x} is in no buffer{note}", lanes[at]
                )
        return [(self._by_slot[n], where) for n, where in groups]

    def _cells(self, buffer: Buffer, offset: Array, size: int) -> Array:
        if buffer.races is None:
            assert self.clocks is not None
            buffer.races = GlobalRaces(len(buffer.data) // self.granule + 1, self.clocks)
        first = offset // self.granule
        count = max(1, size // self.granule)
        cells: Array = first[:, None] + np.arange(count) if count > 1 else first[:, None]
        return cells

    def _count(
        self,
        site: Site,
        lanes: Array,
        buffer: Buffer,
        offset: Array,
        size: int,
        *,
        load: bool = False,
        atomic: bool = False,
    ) -> None:
        if site.bulk:
            # One copy, not the lanes of a warp; it goes past L1.
            sectors, lines = len(np.unique(offset // SECTOR_BYTES)), 0
            ideal = -(-len(offset) * size // SECTOR_BYTES)
        else:
            rows = by_warp(offset, lanes, len(self.cta_of))
            sectors, ideal, lines = site.sectors.count(rows, size)
        traffic = site.traffic
        traffic.global_sectors += sectors
        traffic.global_sectors_ideal += ideal
        traffic.l1_lines += lines
        if atomic:
            traffic.atomic_sectors += sectors
        if load and site.ins.parts[0] != "cp":
            traffic.l1_wavefronts += -(-sectors * SECTOR_BYTES // LINE_BYTES)
        asked = None
        if load or atomic:
            recorder = site.machine.recorder
            asked = recorder.loaded(site, lanes, buffer.base, offset, buffer.touched)
        traffic.l2_sectors += sectors if asked is None or atomic else asked

    def read(
        self, site: Site, lanes: Array, address: Array, unit: int, count: int, *, plain: bool = True
    ) -> Array:
        """Reads ``count`` numbers per lane."""
        size = unit * count
        aligned(site, lanes, address, size, "global")
        result = np.empty((len(lanes), count), BITS[unit])
        order, clocks = self._order(site), self.clocks
        assert clocks is not None
        if order.strong:
            clocks.access(lanes, address, order, reads=True, writes=False)
        for buffer, where in self._find(site, lanes, address):
            who = lanes if where is None else lanes[where]
            offset = (address if where is None else address[where]) - buffer.base
            in_bounds(site, who, offset, size, buffer.low, buffer.high, buffer.name)
            index = offset // size
            if buffer.flags is not None:
                bad = uninitialised(buffer.flags, index, size)
                if bad.any():
                    at = int(np.flatnonzero(bad)[0])
                    raise site.fail(
                        Uninitialised,
                        f"read of {buffer.name} + {int(offset[at]) - buffer.low}, never written",
                        who[at],
                    )
            if self.check_races:
                cells = self._cells(buffer, offset, size)
                assert buffer.races is not None
                report = site.race(buffer.name, who, offset - buffer.low)
                buffer.races.on_read(clocks.stamps(who, site.index), who, cells, order, report)
            self._count(site, who, buffer, offset, size, load=True)
            buffer.touched[0, offset // SECTOR_BYTES] = True
            values = rows_of(buffer.data, unit, count)[index]
            if where is None:
                result = values
            else:
                result[where] = values
        site.traffic.global_load_bytes += len(lanes) * size
        return result

    def write(
        self, site: Site, lanes: Array, address: Array, data: Array, *, plain: bool = True
    ) -> None:
        """Writes data [k, count]."""
        unit, count = data.dtype.itemsize, data.shape[1]
        size = unit * count
        aligned(site, lanes, address, size, "global")
        order, clocks = self._order(site), self.clocks
        assert clocks is not None
        for buffer, where in self._find(site, lanes, address):
            who = lanes if where is None else lanes[where]
            offset = (address if where is None else address[where]) - buffer.base
            values = data if where is None else data[where]
            in_bounds(site, who, offset, size, buffer.low, buffer.high, buffer.name)
            index = offset // size
            report = site.race(buffer.name, who, offset - buffer.low)
            target = rows_of(buffer.data, unit, count)
            if self.check_races:
                cells = self._cells(buffer, offset, size)
                assert buffer.races is not None
                own, same = clocks.stamps(who, site.index), same_rows(target[index], values)
                buffer.races.on_write(own, who, cells, order, report, same)
            self._count(site, who, buffer, offset, size)
            buffer.touched[1, offset // SECTOR_BYTES] = True
            target[index] = values
            lost = ~same_rows(target[index], values)
            if self.check_races and lost.any():
                raise report(
                    int(np.flatnonzero(lost)[0]), "two threads write different values at once"
                )
            if buffer.flags is not None:
                rows_of(buffer.flags, size if size < 8 else 8, max(1, size // 8))[index] = (
                    int.from_bytes(b"\1" * min(size, 8), "little")
                )
        if order.strong:
            clocks.access(lanes, address, order, reads=False, writes=True)
        site.traffic.global_store_bytes += len(lanes) * size

    def update(
        self, site: Site, lanes: Array, address: Array, unit: int, function: Update
    ) -> Array:
        """Atomics: old values [k]."""
        aligned(site, lanes, address, unit, "global")
        result = np.empty(len(lanes), BITS[unit])
        order, clocks = self._order(site), self.clocks
        assert clocks is not None
        own = clocks.stamps(lanes, site.index)
        if order.strong:
            clocks.access(lanes, address, order, reads=True, writes=True)
        for buffer, where in self._find(site, lanes, address):
            positions = np.arange(len(lanes)) if where is None else where
            who = lanes[positions]
            offset = address[positions] - buffer.base
            in_bounds(site, who, offset, unit, buffer.low, buffer.high, buffer.name)
            index = offset // unit
            if buffer.flags is not None and uninitialised(buffer.flags, index, unit).any():
                at = int(np.flatnonzero(uninitialised(buffer.flags, index, unit))[0])
                raise site.fail(
                    Uninitialised,
                    f"atomic on {buffer.name} + {int(offset[at]) - buffer.low}, never written",
                    who[at],
                )
            if self.check_races:
                cells = self._cells(buffer, offset, unit)
                assert buffer.races is not None
                report = site.race(buffer.name, who, offset - buffer.low)
                buffer.races.on_atomic(own[positions], who, cells, order, report)
            self._count(site, who, buffer, offset, unit, atomic=True)
            buffer.touched[:, offset // SECTOR_BYTES] = True
            one_by_one(rows_of(buffer.data, unit, 1)[:, 0], index, positions, function, result)
        site.traffic.atomics += len(lanes)
        return result
