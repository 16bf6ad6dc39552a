"""Exchange within a warp.

The lanes that a member mask names must execute the instruction together; lanes that have exited
are not waited for, and reading one is an error. Source: PTX ISA,
"Data Movement and Conversion Instructions: shfl.sync", "Parallel Synchronization and
Communication Instructions".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kimi_ops.testing.ptx import rounding
from kimi_ops.testing.ptx.binding import Active, Binder, Step, put, put_lanes
from kimi_ops.testing.ptx.errors import Divergence
from kimi_ops.testing.ptx.registry import instruction
from kimi_ops.testing.ptx.types import TYPES, WARP, Array

B32, U32, PRED = TYPES["b32"], TYPES["u32"], TYPES["pred"]
_LANES = np.arange(WARP)


class Members:
    """The member mask of a collective: checks it, and says who takes part.

    Args:
        operand: index of the mask.
        alike: whether all lanes of a warp must give the same mask.
    """

    def __init__(self, b: Binder, operand: int) -> None:
        self.b = b
        self.mask = b.src(operand, U32)

    def rows(self, active: Active) -> Array:
        """Masks of the lanes, uint32 [warps, 32]; of inactive lanes 0.

        Raises:
            Divergence: a lane outside its own mask.
            NotConverged: named lanes that are elsewhere.
        """
        machine = self.b.machine
        given = np.broadcast_to(self.mask, (machine.lanes,)).reshape(-1, WARP)
        rows = np.where(active.mask.reshape(-1, WARP), given, np.uint32(0))
        alone = active.mask.reshape(-1, WARP) & ((rows >> _LANES.astype(np.uint32)) & 1 == 0)
        if alone.any():
            raise self.b.site.fail(
                Divergence,
                "a thread executes a warp collective whose member mask leaves it out",
                int(alone.reshape(-1).argmax()),
            )
        members = np.bitwise_or.reduce(rows, axis=1)
        what = f"divergent {self.b.entry.opcode}"
        machine.converged(active, members, what)
        return rows


def _sources(mode: str, other: Any, clamp: Any) -> tuple[Array, Array]:
    """(the lane that each lane reads, whether it is in range), both [..., 32]."""
    c, by = np.asarray(clamp).astype(np.int64), np.asarray(other).astype(np.int64) & 31
    segment, limit = (c >> 8) & 31, c & 31
    highest = (_LANES & segment) | (limit & ~segment)
    if mode == "up":
        source = _LANES - by
    elif mode == "down":
        source = _LANES + by
    elif mode == "bfly":
        source = _LANES ^ by
    else:
        source = (_LANES & segment) | (by & ~segment & 31)
    valid = source >= highest if mode == "up" else source <= highest
    return np.where(valid, source, _LANES), valid


def _fixed_sources(mode: str, other: Any, clamp: Any, mask: Any) -> tuple[Array, Array] | None:
    """`_sources` of constant operands with a mask of all lanes: then nothing can fail."""
    if np.ndim(other) or np.ndim(clamp) or np.ndim(mask) or mask != 0xFFFFFFFF:
        return None
    return _sources(mode, other, clamp)


@instruction(
    "shfl.sync",
    family="warp",
    section="Data Movement and Conversion Instructions: shfl.sync",
    types="b32",
    modifiers="up down bfly idx",
    order="lanes",
)
def shfl(b: Binder) -> Step:
    """Value of another lane of the segment; p says whether that lane is in range."""
    d, p, x = b.dst(0, B32), b.second(0), b.src(1, B32)
    other, clamp = b.src(2, U32), b.src(3, U32)
    members = Members(b, 4)
    (mode,) = b.mods
    shape = (b.machine.lanes,)
    b.tracks = True
    known_d, known_x = b.flag(0), b.flag(1)
    required = [(b.ins.operands[i], b.flag(i)) for i in (2, 3, 4)]

    fixed = _fixed_sources(mode, other, clamp, members.mask)
    if known_d is not None or any(flag is not None for _, flag in required):
        fixed = None

    def step(active: Active) -> None:
        if fixed is not None and active.whole:
            source, valid = fixed
            full = np.broadcast_to(x, b.shape).reshape(-1, WARP)
            put(d, full.take(source, 1).reshape(b.shape), active)
            if p is not None:
                put(p, np.tile(valid, b.machine.lanes // WARP), active)
            return
        for operand, flag in required:
            if flag is not None:
                b.machine.require(flag, active.mask, str(operand), b.site.index)
        members.rows(active)
        source, valid = _sources(
            mode,
            np.broadcast_to(other, shape).reshape(-1, WARP),
            np.broadcast_to(clamp, shape).reshape(-1, WARP),
        )
        rows = active.mask.reshape(-1, WARP)
        absent = rows & ~np.take_along_axis(rows, source, axis=1)
        if absent.any():
            raise b.site.fail(
                Divergence,
                "shfl.sync reads a lane that does not take part",
                int(absent.reshape(-1).argmax()),
            )
        values = np.broadcast_to(x, shape).reshape(-1, WARP)
        values = np.take_along_axis(values, source, axis=1)
        if known_d is not None:
            # What is unknown in a lane is unknown where it arrives; many lanes never use it.
            known = np.ones(shape, bool) if known_x is None else known_x
            known = np.take_along_axis(known.reshape(-1, WARP), source, axis=1)
            np.copyto(known_d, known.reshape(-1), where=active.mask)
        put(d, values.reshape(-1), active)
        if p is not None:
            put(p, valid.reshape(-1), active)

    return step


@instruction(
    "vote.sync",
    family="warp",
    section="Parallel Synchronization and Communication Instructions: vote.sync",
    types="pred b32",
    modifiers="all any uni ballot",
)
def vote(b: Binder) -> Step:
    """Whether a predicate holds in all or any member lanes, is uniform, or its bits."""
    ballot = "ballot" in b.mods
    d = b.dst(0, B32 if ballot else PRED)
    predicate, members = b.predicate(1), Members(b, 2)
    shape = (b.machine.lanes,)

    def step(active: Active) -> None:
        masks = members.rows(active)
        true = np.broadcast_to(predicate(), shape) & active.mask
        bits = np.packbits(true, bitorder="little").view(np.uint32)[:, None] & masks
        if ballot:
            result = bits
        elif "all" in b.mods:
            result = bits == masks & active.bits[:, None]
        elif "any" in b.mods:
            result = bits != 0
        else:
            result = (bits == 0) | (bits == masks & active.bits[:, None])
        put(d, np.ascontiguousarray(result).reshape(-1), active)

    return step


@instruction(
    "activemask",
    family="warp",
    section="Parallel Synchronization and Communication Instructions: activemask",
    types="b32",
)
def activemask(b: Binder) -> Step:
    """Bits of the lanes that execute this together."""
    d = b.dst(0, B32)

    def step(active: Active) -> None:
        put(d, np.repeat(active.bits, WARP), active)

    return step


_REDUCTIONS: dict[str, tuple[Any, Callable[[np.dtype[Any]], Any]]] = {
    "add": (np.add, lambda t: 0),
    "min": (np.minimum, lambda t: np.iinfo(t).max),
    "max": (np.maximum, lambda t: np.iinfo(t).min),
    "and": (np.bitwise_and, lambda t: np.iinfo(np.uint32).max),
    "or": (np.bitwise_or, lambda t: 0),
    "xor": (np.bitwise_xor, lambda t: 0),
}


@instruction(
    "redux.sync",
    family="warp",
    section="Parallel Synchronization and Communication Instructions: redux.sync",
    types="u32 s32 b32",
    modifiers="add min max and or xor",
)
def redux(b: Binder) -> Step:
    """Reduction over the member lanes, to all of them."""
    d, x = b.dst(0, b.type), b.src(1, b.type)
    members = Members(b, 2)
    (name,) = b.mods
    function, identity = _REDUCTIONS[name]
    neutral = b.type.dtype.type(identity(b.type.dtype))

    def step(active: Active) -> None:
        masks = members.rows(active)
        values = np.broadcast_to(x, (b.machine.lanes,)).reshape(-1, WARP)
        result = np.full(values.shape, neutral)
        for mask in np.unique(masks[masks != 0]):
            takes = (mask >> _LANES.astype(np.uint32)) & 1 != 0
            takes = takes & active.mask.reshape(-1, WARP)
            total = function.reduce(np.where(takes, values, neutral), axis=1, dtype=b.type.dtype)
            result = np.where(masks == mask, total[:, None], result)
        put(d, result.reshape(-1), active)

    return step


@instruction(
    "redux.sync",
    family="warp",
    section="Parallel Synchronization and Communication Instructions: redux.sync",
    types="f32",
    modifiers="min max abs NaN",
)
def redux_float(b: Binder) -> Step:
    """Smallest or largest float of the member lanes (sm_100a)."""
    d, x = b.dst(0, b.type), b.src(1, b.type)
    members = Members(b, 2)

    def step(active: Active) -> None:
        masks = members.rows(active)
        values = np.broadcast_to(x, (b.machine.lanes,)).reshape(-1, WARP)
        values = np.abs(values) if "abs" in b.mods else values
        result = np.empty(b.machine.lanes, np.float32)
        flat = masks.reshape(-1)
        for lane in active.lanes:
            row = lane // WARP
            takes = _LANES[((flat[lane] >> _LANES.astype(np.uint32)) & 1) != 0]
            takes = takes[active.mask.reshape(-1, WARP)[row, takes]]
            total = values[row, takes[0]]
            for other in takes[1:]:
                total = rounding.minimum(
                    total, values[row, other], nan="NaN" in b.mods, largest="max" in b.mods
                )
            result[lane] = total
        put(d, result, active)

    return step


@instruction(
    "match.any.sync match.all.sync",
    family="warp",
    section="Parallel Synchronization and Communication Instructions: match.sync",
    types="b32 b64",
)
def match(b: Binder) -> Step:
    """Member lanes that hold the same value; ``.all`` only if all do."""
    d, p, x = b.dst(0, B32), b.second(0), b.src(1, b.type)
    members = Members(b, 2)
    every = ".all" in b.entry.opcode

    def step(active: Active) -> None:
        masks = members.rows(active)
        values = np.broadcast_to(x, (b.machine.lanes,)).reshape(-1, WARP)
        same = values[:, :, None] == values[:, None, :]
        bits = (same.astype(np.uint32) << _LANES.astype(np.uint32)).sum(axis=2, dtype=np.uint32)
        bits &= masks & active.bits[:, None]
        if every:
            whole = bits == (masks & active.bits[:, None])
            bits = np.where(whole, bits, np.uint32(0))
            if p is not None:
                put(p, whole.reshape(-1), active)
        put(d, bits.reshape(-1), active)

    return step


@instruction(
    "elect.sync",
    family="warp",
    section="Parallel Synchronization and Communication Instructions: elect.sync",
)
def elect(b: Binder) -> Step:
    """Elects the lowest member lane: d its number, p true in it."""
    d, p = b.dst(0, B32), b.second(0)
    members = Members(b, 1)

    def step(active: Active) -> None:
        masks = members.rows(active) & active.bits[:, None]
        lowest = np.bitwise_count((masks & (~masks + np.uint32(1))) - np.uint32(1))
        lowest = lowest.astype(np.uint32)
        put(d, lowest.reshape(-1), active)
        if p is not None:
            put(p, (lowest == _LANES).reshape(-1), active)

    return step


@instruction(
    "bar.warp.sync",
    family="warp",
    section="Parallel Synchronization and Communication Instructions: bar.warp.sync",
    results=0,
)
def warp_sync(b: Binder) -> Step:
    """The named lanes wait for each other."""
    members = Members(b, 0)

    def step(active: Active) -> None:
        members.rows(active)

    return step


__all__ = ["Members", "put_lanes"]
