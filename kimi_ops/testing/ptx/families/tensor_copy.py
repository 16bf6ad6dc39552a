"""Bulk copies of tiles by tensor map (TMA).

Source: PTX ISA, "Data Movement and Conversion Instructions", "Tensors": copies of
tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np

from kimi_ops.testing.ptx.binding import Active, Binder, Step
from kimi_ops.testing.ptx.errors import PtxError
from kimi_ops.testing.ptx.families.bulk_copy import (
    REDUCTIONS,
    SHARED,
    Mover,
    reduction,
    shared_chunks,
    to_shared,
)
from kimi_ops.testing.ptx.memory import shared_addresses
from kimi_ops.testing.ptx.registry import instruction
from kimi_ops.testing.ptx.syntax import Address
from kimi_ops.testing.ptx.tensor_maps import ELEMENT_TYPES, Layout
from kimi_ops.testing.ptx.tiles import Box
from kimi_ops.testing.ptx.types import TYPES, Array

_RANKS = "1d 2d 3d 4d 5d"
# Of the shared side of a tensor copy.
_ALIGNMENT = 128


def _boxes(
    b: Binder, mover: Mover, operand: int
) -> Callable[[Active], Iterator[tuple[int, Layout, Box]]]:
    """Per active lane (lane, descriptor, tile) of an operand ``[map, {coordinates}]``."""
    addresses = b.address(operand)
    item = b.ins.operands[operand]
    coords = item.coords if isinstance(item, Address) else ()
    (rank,) = b.mods & set(_RANKS.split())
    if len(coords) != int(rank[0]):
        raise b.unsupported(f"{len(coords)} coordinates in a copy of .{rank}")
    values = [b.src(c, TYPES["s32"]) for c in coords]

    def boxes(active: Active) -> Iterator[tuple[int, Layout, Box]]:
        lanes, at = active.lanes.tolist(), addresses(active).tolist()
        places = [np.broadcast_to(v, active.mask.shape)[active.lanes].tolist() for v in values]
        for lane, address, *place in zip(lanes, at, *places, strict=True):
            layout = mover.layout(lane, address)
            if len(layout.dims) != len(place):
                raise b.site.fail(
                    PtxError, f"copy of .{rank} by a tensor map of {len(layout.dims)} dimensions",
                    lane,
                )  # fmt: skip
            yield lane, layout, layout.box_at(tuple(place))

    return boxes


def _tile(b: Binder, lane: int, layout: Layout, box: Box, start: int) -> Array:
    """Shared addresses [n] of a tile's 16-byte chunks, in the tile's order."""
    size = len(box.rows) * box.row_bytes
    return layout.swizzled(shared_chunks(b, lane, start, size, _ALIGNMENT))


@instruction(
    "cp.async.bulk.tensor",
    family="async copy",
    section="Data Movement and Conversion Instructions: cp.async.bulk.tensor",
    modifiers=f"{_RANKS} {SHARED} global tile mbarrier::complete_tx::bytes bulk_group "
    "L2::cache_hint",
    results=0,
)
def tensor(b: Binder) -> Step:
    """Copies a tile to shared memory, ending at mbarrier c; or from it, in the bulk group."""
    loads, mover, bulk = to_shared(b), Mover(b), b.machine.async_units.bulk
    boxes = _boxes(b, mover, 1 if loads else 0)
    shared = b.address(0 if loads else 1)
    barrier = b.address(2) if loads else None

    def load(active: Active) -> None:
        assert barrier is not None
        starts, bars = shared_addresses(shared(active)), shared_addresses(barrier(active))
        for (lane, layout, box), start, at in zip(
            boxes(active), starts.tolist(), bars.tolist(), strict=True
        ):
            bar = b.machine.async_units.mbarriers.find(b.site, lane, at)
            data = mover.load(lane, box)
            bulk.load(b.site, lane, bar, _tile(b, lane, layout, box, start), data)

    def store(active: Active) -> None:
        starts = shared_addresses(shared(active))
        for (lane, layout, box), start in zip(boxes(active), starts.tolist(), strict=True):
            write = functools.partial(mover.write, lane, box)
            bulk.store(b.site, lane, _tile(b, lane, layout, box, start), write)

    return load if loads else store


@instruction(
    "cp.reduce.async.bulk.tensor",
    family="async copy",
    section="Data Movement and Conversion Instructions: cp.reduce.async.bulk.tensor",
    modifiers=f"{_RANKS} {SHARED} global tile bulk_group {REDUCTIONS} L2::cache_hint",
    results=0,
)
def tensor_reduce(b: Binder) -> Step:
    """Combines a tile of shared memory into the tensor, in the bulk group."""
    if to_shared(b):
        raise b.unsupported("a reduction in shared memory")
    mover, operation = Mover(b), reduction(b)
    boxes, shared = _boxes(b, mover, 0), b.address(1)

    def step(active: Active) -> None:
        starts = shared_addresses(shared(active))
        for (lane, layout, box), start in zip(boxes(active), starts.tolist(), strict=True):
            scalar = TYPES[ELEMENT_TYPES[layout.elemtype][0]]
            write = functools.partial(mover.reduce, lane, box, operation=operation, scalar=scalar)
            b.machine.async_units.bulk.store(
                b.site, lane, _tile(b, lane, layout, box, start), write
            )

    return step


@instruction(
    "cp.async.bulk.prefetch.tensor",
    family="async copy",
    section="Data Movement and Conversion Instructions: cp.async.bulk.prefetch.tensor",
    modifiers=f"{_RANKS} L2 global tile L2::cache_hint",
    results=0,
)
def tensor_prefetch(b: Binder) -> Step:
    """Fetches a tile to L2: no effect on values, but the descriptor must be right."""
    boxes = _boxes(b, Mover(b), 0)

    def step(active: Active) -> None:
        for _ in boxes(active):
            pass

    return step
