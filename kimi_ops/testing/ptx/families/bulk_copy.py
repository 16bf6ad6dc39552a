"""Bulk copies between global and shared memory, contiguous or by tensor map (TMA).

Source: PTX ISA, "Data Movement and Conversion Instructions": bulk copies and their groups.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np

from kimi_ops.testing.ptx.binding import Active, Binder, Step
from kimi_ops.testing.ptx.errors import Misaligned, OutOfBounds, PtxError
from kimi_ops.testing.ptx.families.atomics import combine
from kimi_ops.testing.ptx.memory import shared_addresses
from kimi_ops.testing.ptx.registry import instruction
from kimi_ops.testing.ptx.tensor_maps import MAP_BYTES, Layout
from kimi_ops.testing.ptx.tiles import CHUNK, Box, bulk_row
from kimi_ops.testing.ptx.types import BITS, TYPES, Array, ScalarType

SHARED = "shared::cta shared::cluster"
REDUCTIONS = "add min max inc dec and or xor"
_decode = functools.lru_cache(maxsize=256)(Layout.decode)


class Mover:
    """Moves tiles between global memory and arrays for one instruction."""

    def __init__(self, b: Binder) -> None:
        self.b, self.site = b, b.site
        self.memory, self.units = b.machine.launch.memory, b.machine.async_units

    def load(self, lane: int, box: Box) -> Array:
        """The bytes of a tile, [n, 16]."""
        tile = box.blank()
        unit = box.unit
        at, places = box.pieces(unit)
        if len(at):
            lanes, width = np.full(len(at), lane), min(unit, 8)
            words = self.memory.read(self.site, lanes, at, width, unit // width)
            tile.reshape(-1, unit)[places // unit] = np.ascontiguousarray(words).view(np.uint8)
        return tile.reshape(-1, CHUNK)

    def write(self, lane: int, box: Box, data: Array) -> None:
        """Writes what of a tile [n, 16] lies in the tensor."""
        unit = box.unit
        at, places = box.pieces(unit)
        if len(at):
            pieces = np.ascontiguousarray(data).reshape(-1, unit)[places // unit]
            words = np.ascontiguousarray(pieces).view(BITS[min(unit, 8)])
            lanes = np.full(len(at), lane)
            self.memory.write(self.site, lanes, at, words)

    def reduce(self, lane: int, box: Box, data: Array, operation: str, scalar: ScalarType) -> None:
        """Combines what of a tile lies in the tensor with what is there, element by element."""
        at, places = box.pieces(scalar.size)
        if len(at):
            function = combine(self.b, operation, scalar)
            values = np.ascontiguousarray(data).reshape(-1, scalar.size)[places // scalar.size]
            values = np.ascontiguousarray(values).view(BITS[scalar.size])[:, 0]
            lanes = np.full(len(at), lane)
            self.memory.update(
                self.site,
                lanes,
                at,
                scalar.size,
                lambda old, which: function(old, values[which]),
            )

    def layout(self, lane: int, address: int) -> Layout:
        """The descriptor at a global address, decoded and checked."""
        if address % 64:
            raise self.site.fail(
                Misaligned, f"tensor map at {address:#x}, not a multiple of 64", lane
            )
        self.units.maps.require(self.site, lane, address, self.b.machine.shared.races)
        lanes, at = np.full(MAP_BYTES // 8, lane), address + np.arange(0, MAP_BYTES, 8)
        # Descriptors have a cache of their own: they are no traffic of the copy.
        before = replace(self.site.traffic)
        words = self.memory.read(self.site, lanes, at, 8, 1)
        self.site.traffic = before
        try:
            return _decode(np.ascontiguousarray(words).tobytes())
        except PtxError as error:
            raise self.site.fail(type(error), error.message, lane) from None


def shared_chunks(b: Binder, lane: int, start: int, size: int, align: int) -> Array:
    """Shared addresses [n] of ``size`` bytes from ``start``, checked."""
    limit = b.machine.shared.size
    if start % align:
        raise b.site.fail(
            Misaligned, f"bulk copy at shared memory + {start}, not a multiple of {align}", lane
        )
    if start < 0 or start + size > limit:
        raise b.site.fail(
            OutOfBounds, f"{size} bytes at shared memory + {start} of {limit} bytes", lane
        )
    return start + np.arange(0, size, CHUNK)


def _require_row(b: Binder, lane: int, address: int, size: int) -> None:
    if address % CHUNK or size % CHUNK or not size:
        raise b.site.fail(
            Misaligned,
            f"bulk copy of {size} bytes at global address {address:#x}: both must be multiples of "
            "16, and the size not 0",
            lane,
        )


def to_shared(b: Binder) -> bool:
    """Whether a copy goes to shared memory; other directions than the two are refused."""
    parts = [p.split("::")[0] for p in b.ins.parts if p.split("::")[0] in ("shared", "global")]
    loads = parts == ["shared", "global"] and "mbarrier::complete_tx::bytes" in b.mods
    if not loads and not (parts == ["global", "shared"] and "bulk_group" in b.mods):
        raise b.unsupported("a bulk copy of this direction and completion")
    return loads


@instruction(
    "cp.async.bulk",
    family="async copy",
    section="Data Movement and Conversion Instructions: cp.async.bulk",
    modifiers=f"{SHARED} global mbarrier::complete_tx::bytes bulk_group L2::cache_hint",
    results=0,
)
def bulk(b: Binder) -> Step:
    """Copies c bytes to shared memory, ending at mbarrier d; or from it, in the bulk group."""
    loads, mover = to_shared(b), Mover(b)
    to, source, amount = b.address(0), b.address(1), b.src(2, TYPES["u32"])
    units = b.machine.async_units
    barrier = b.address(3) if loads else None

    def load(active: Active) -> None:
        assert barrier is not None
        at = shared_addresses(to(active)), source(active), shared_addresses(barrier(active))
        sizes = np.broadcast_to(amount, active.mask.shape)[active.lanes]
        for lane, start, origin, bar_at, size in zip(
            active.lanes.tolist(), *(x.tolist() for x in at), sizes.tolist(), strict=True
        ):
            _require_row(b, lane, origin, size)
            bar = units.mbarriers.find(b.site, lane, bar_at)
            data = mover.load(lane, bulk_row(origin, size))
            units.bulk.load(b.site, lane, bar, shared_chunks(b, lane, start, size, CHUNK), data)

    def store(active: Active) -> None:
        at = to(active), shared_addresses(source(active))
        sizes = np.broadcast_to(amount, active.mask.shape)[active.lanes]
        for lane, target, start, size in zip(
            active.lanes.tolist(), *(x.tolist() for x in at), sizes.tolist(), strict=True
        ):
            _require_row(b, lane, target, size)
            box = bulk_row(target, size)
            units.bulk.store(
                b.site,
                lane,
                shared_chunks(b, lane, start, size, CHUNK),
                functools.partial(mover.write, lane, box),
            )

    return load if loads else store


@instruction(
    "cp.reduce.async.bulk",
    family="async copy",
    section="Data Movement and Conversion Instructions: cp.reduce.async.bulk",
    types="f16 bf16 b32 u32 s32 b64 u64 s64 f32 f64",
    modifiers=f"{SHARED} global bulk_group noftz {REDUCTIONS} L2::cache_hint",
    results=0,
)
def bulk_reduce(b: Binder) -> Step:
    """Combines c bytes of shared memory into global memory, in the bulk group."""
    if to_shared(b):
        raise b.unsupported("a reduction in shared memory")
    operation = reduction(b)
    mover, scalar = Mover(b), b.type
    combine(b, operation, scalar)
    to, source, amount = b.address(0), b.address(1), b.src(2, TYPES["u32"])

    def step(active: Active) -> None:
        at = to(active), shared_addresses(source(active))
        sizes = np.broadcast_to(amount, active.mask.shape)[active.lanes]
        for lane, target, start, size in zip(
            active.lanes.tolist(), *(x.tolist() for x in at), sizes.tolist(), strict=True
        ):
            _require_row(b, lane, target, size)
            box = bulk_row(target, size)
            b.machine.async_units.bulk.store(
                b.site,
                lane,
                shared_chunks(b, lane, start, size, CHUNK),
                functools.partial(mover.reduce, lane, box, operation=operation, scalar=scalar),
            )

    return step


def reduction(b: Binder) -> str:
    """The one operation of a reducing copy."""
    operations = [m for m in b.mods if m in REDUCTIONS.split()]
    if len(operations) != 1:
        raise b.unsupported("a reduction without one operation")
    return operations[0]


@instruction(
    "cp.async.bulk.prefetch",
    family="async copy",
    section="Data Movement and Conversion Instructions: cp.async.bulk.prefetch",
    modifiers="L2 global L2::cache_hint",
    results=0,
)
def prefetch(b: Binder) -> Step:
    """Fetches c bytes to L2: no effect on values."""
    source, amount = b.address(0), b.src(1, TYPES["u32"])

    def step(active: Active) -> None:
        sizes = np.broadcast_to(amount, active.mask.shape)[active.lanes]
        for lane, address, size in zip(
            active.lanes.tolist(), source(active).tolist(), sizes.tolist(), strict=True
        ):
            _require_row(b, lane, address, size)

    return step


@instruction(
    "cp.async.bulk.commit_group",
    family="async copy",
    section="Data Movement and Conversion Instructions: cp.async.bulk.commit_group",
    results=0,
)
def commit(b: Binder) -> Step:
    """Closes the thread's bulk group."""
    return b.machine.async_units.bulk.commit


@instruction(
    "cp.async.bulk.wait_group",
    family="async copy",
    section="Data Movement and Conversion Instructions: cp.async.bulk.wait_group",
    modifiers="read",
    results=0,
)
def wait_group(b: Binder) -> Step:
    """Waits until at most n bulk groups of the thread are in flight, or ``.read`` their source."""
    pending, read_only = b.integer(0), "read" in b.mods
    bulk = b.machine.async_units.bulk
    return lambda active: bulk.wait(active, pending, read_only=read_only)
