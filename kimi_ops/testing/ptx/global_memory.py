"""Global memory: torch CPU tensors and module variables, by virtual address.

Source: PTX ISA 8.7, sections 5.1.4 (global), 5.1.3 (const), 9.7.13.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from kimi_ops.testing.ptx.counters import SECTOR_BYTES, by_warp
from kimi_ops.testing.ptx.errors import OutOfBounds, Uninitialised
from kimi_ops.testing.ptx.memory import (
    GLOBAL_WINDOW,
    Update,
    aligned,
    in_bounds,
    one_by_one,
    rows_of,
    uninitialised,
)
from kimi_ops.testing.ptx.races import GlobalClocks, GlobalRaces
from kimi_ops.testing.ptx.types import BITS, Array

if TYPE_CHECKING:
    from kimi_ops.testing.ptx.binding import Site

# Buffers this far apart, each after a zone that belongs to none.
_STRIDE_BITS = 38
_RED_ZONE = 1 << 20


class Buffer:
    """One global buffer.

    Args:
        name: for reports.
        data: bytes, shared with whoever owns them.
        base: virtual address of byte 0.
        low, high: bytes that belong to the launch.
        initialised: False for memory that the launch must write before it reads.
    """

    def __init__(
        self, name: str, data: Array, base: int, low: int, high: int, *, initialised: bool
    ) -> None:
        self.name, self.data, self.base, self.low, self.high = name, data, base, low, high
        self.flags = None if initialised else np.zeros(len(data), np.uint8)
        self.touched = np.zeros((2, len(data) // SECTOR_BYTES + 1), bool)
        self.races: GlobalRaces | None = None


class GlobalMemory:
    """All buffers of a launch, by virtual address.

    Attributes:
        granule: bytes per race stamp; set before the first access.
        check_races: whether to look for races between CTAs.
        synchronising: whether atomics order what surrounds them.
    """

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.clocks = GlobalClocks()
        self.granule = 4
        self.check_races = True
        self.cta_of: Array = np.zeros(0, np.int64)
        self._storages: dict[int, Buffer] = {}

    def add_bytes(self, name: str, data: Array) -> int:
        """Registers initialised bytes (a module variable); returns the address."""
        base = GLOBAL_WINDOW + len(self.buffers) * (1 << _STRIDE_BITS) + _RED_ZONE
        self.buffers.append(Buffer(name, data, base, 0, len(data), initialised=True))
        return base

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
            base = GLOBAL_WINDOW + len(self.buffers) * (1 << _STRIDE_BITS) + _RED_ZONE
            buffer = Buffer(name, data, base, offset, offset + span, initialised=True)
            self.buffers.append(buffer)
            if key:
                self._storages[key] = buffer
        buffer.low, buffer.high = min(buffer.low, offset), max(buffer.high, offset + span)
        if not initialised:
            if buffer.flags is None:
                buffer.flags = np.ones(len(buffer.data), np.uint8)
            flags = torch.from_numpy(buffer.flags)
            width = tensor.element_size()
            # Of a strided tensor the gaps are no one's to write.
            shape = (*tensor.shape, width)
            stride = (*(s * width for s in tensor.stride()), 1)
            flags.as_strided(shape, stride, offset).zero_()
        return buffer.base + offset

    def _find(self, site: Site, lanes: Array, address: Array) -> list[tuple[Buffer, Array | None]]:
        """Buffers of the addresses, each with the positions that lie in it (None: all)."""
        number = (address - GLOBAL_WINDOW) >> _STRIDE_BITS
        first = int(number[0]) if len(number) else 0
        if len(number) and (number == first).all():
            groups: list[tuple[int, Array | None]] = [(first, None)]
        else:
            groups = [(int(n), np.flatnonzero(number == n)) for n in np.unique(number)]
        for n, where in groups:
            if not 0 <= n < len(self.buffers):
                at = 0 if where is None else int(where[0])
                raise site.fail(
                    OutOfBounds, f"address {int(address[at]):#x} is in no buffer", lanes[at]
                )
        return [(self.buffers[n], where) for n, where in groups]

    def _cells(self, buffer: Buffer, offset: Array, size: int) -> Array:
        if buffer.races is None:
            buffer.races = GlobalRaces(len(buffer.data) // self.granule + 1, self.clocks)
        first = offset // self.granule
        count = max(1, size // self.granule)
        cells: Array = first[:, None] + np.arange(count) if count > 1 else first[:, None]
        return cells

    def _count(self, site: Site, lanes: Array, buffer: Buffer, offset: Array, size: int) -> None:
        rows = by_warp(offset, lanes, len(self.cta_of))
        sectors, ideal = site.sectors.count(rows, size)
        site.traffic.global_sectors += sectors
        site.traffic.global_sectors_ideal += ideal

    def read(
        self, site: Site, lanes: Array, address: Array, unit: int, count: int, *, plain: bool = True
    ) -> Array:
        """Reads ``count`` numbers per lane; ``plain=False`` for one that synchronises."""
        size = unit * count
        aligned(site, lanes, address, size, "global")
        result = np.empty((len(lanes), count), BITS[unit])
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
            if self.check_races and plain:
                cells = self._cells(buffer, offset, size)
                assert buffer.races is not None
                buffer.races.on_read(
                    self.cta_of[who], cells, site.race(buffer.name, who, offset - buffer.low)
                )
            self._count(site, who, buffer, offset, size)
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
        for buffer, where in self._find(site, lanes, address):
            who = lanes if where is None else lanes[where]
            offset = (address if where is None else address[where]) - buffer.base
            values = data if where is None else data[where]
            in_bounds(site, who, offset, size, buffer.low, buffer.high, buffer.name)
            index = offset // size
            report = site.race(buffer.name, who, offset - buffer.low)
            if self.check_races and plain:
                cells = self._cells(buffer, offset, size)
                assert buffer.races is not None
                buffer.races.on_write(self.cta_of[who], cells, report)
            self._count(site, who, buffer, offset, size)
            buffer.touched[1, offset // SECTOR_BYTES] = True
            target = rows_of(buffer.data, unit, count)
            target[index] = values
            lost = (target[index] != values).any(axis=1)
            if self.check_races and lost.any():
                raise report(
                    int(np.flatnonzero(lost)[0]), "two threads write different values at once"
                )
            if buffer.flags is not None:
                rows_of(buffer.flags, size if size < 8 else 8, max(1, size // 8))[index] = (
                    int.from_bytes(b"\1" * min(size, 8), "little")
                )
        site.traffic.global_store_bytes += len(lanes) * size

    def update(
        self, site: Site, lanes: Array, address: Array, unit: int, function: Update
    ) -> Array:
        """Atomics: old values [k]. ``site.acquires`` and ``site.releases`` say what they order."""
        aligned(site, lanes, address, unit, "global")
        result = np.empty(len(lanes), BITS[unit])
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
                ctas = self.cta_of[who]
                cells = self._cells(buffer, offset, unit)
                assert buffer.races is not None
                if site.acquires or site.releases:
                    pairs = dict.fromkeys(
                        zip(ctas.tolist(), address[positions].tolist(), strict=True)
                    )
                    for cta, at_address in pairs:
                        self.clocks.synchronise(
                            cta, at_address, acquire=site.acquires, release=site.releases
                        )
                buffer.races.on_atomic(
                    ctas, cells, site.race(buffer.name, who, offset - buffer.low)
                )
            self._count(site, who, buffer, offset, unit)
            buffer.touched[:, offset // SECTOR_BYTES] = True
            one_by_one(rows_of(buffer.data, unit, 1)[:, 0], index, positions, function, result)
        site.traffic.atomics += len(lanes)
        return result
