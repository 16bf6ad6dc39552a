"""Atomics.

Threads that meet at one address are served in the order of their lanes. Source: PTX ISA,
"Parallel Synchronization and Communication Instructions": atom, red.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kimi_ops.testing.ptx import rounding
from kimi_ops.testing.ptx.binding import Active, Binder, Step, put_lanes
from kimi_ops.testing.ptx.families.data import Spaces
from kimi_ops.testing.ptx.registry import instruction
from kimi_ops.testing.ptx.types import BITS, TYPES, Array, ScalarType

_OPERATIONS = "add min max inc dec exch cas and or xor"
_TYPES = "b16 b32 b64 u32 u64 s32 s64 f16 bf16 f16x2 bf16x2 f32 f64"
_MODIFIERS = (
    f"{_OPERATIONS} global shared shared::cta shared::cluster relaxed acquire release acq_rel cta "
    "cluster gpu sys noftz v2 v4 L2::cache_hint"
)
_PARTS = {"f16x2": TYPES["f16"], "bf16x2": TYPES["bf16"]}


def _float_add(scalar: ScalarType) -> Callable[[Array, Array], Array]:
    part = _PARTS.get(scalar.name, scalar)

    def add(old: Array, value: Array) -> Array:
        if scalar.name in ("f32", "f64"):
            total = old.view(scalar.dtype) + value.view(scalar.dtype)
            return rounding.canonical(total).view(old.dtype)
        x, y = (
            rounding.decode(np.ascontiguousarray(v).view(part.dtype), part).astype(np.float64)
            for v in (old, value)
        )
        return rounding.encode(rounding.odd_sum(x, y), part).view(old.dtype)

    return add


def combine(b: Binder, operation: str, scalar: ScalarType) -> Callable[[Array, Array], Array]:
    """(old, operand) -> new, all as unsigned numbers."""
    if scalar.kind in "fx":
        if operation == "add":
            return _float_add(scalar)
        if operation == "exch" or scalar.name not in ("f16", "bf16"):
            raise b.unsupported(f"{operation} of {scalar.name}")
        largest = operation == "max"
        if operation not in ("min", "max"):
            raise b.unsupported(f"{operation} of {scalar.name}")

        def extreme(old: Array, value: Array) -> Array:
            x, y = (rounding.decode(v.view(scalar.dtype), scalar) for v in (old, value))
            least = rounding.minimum(x, y, nan=False, largest=largest)
            return rounding.encode_f32(least, scalar).view(old.dtype)

        return extreme

    def typed(function: Callable[[Array, Array], Any]) -> Callable[[Array, Array], Array]:
        def apply(old: Array, value: Array) -> Array:
            out = function(old.view(scalar.dtype), value.view(scalar.dtype))
            return np.asarray(out).astype(scalar.dtype).view(old.dtype)

        return apply

    one = scalar.dtype.type(1)
    zero = scalar.dtype.type(0)
    return {
        "add": typed(np.add),
        "min": typed(np.minimum),
        "max": typed(np.maximum),
        "and": typed(np.bitwise_and),
        "or": typed(np.bitwise_or),
        "xor": typed(np.bitwise_xor),
        "exch": typed(lambda old, value: value),
        "inc": typed(lambda old, value: np.where(old >= value, zero, old + one)),
        "dec": typed(lambda old, value: np.where((old == 0) | (old > value), value, old - one)),
    }[operation]


@instruction(
    "atom",
    family="memory",
    section="Parallel Synchronization and Communication Instructions: atom",
    types=_TYPES,
    modifiers=_MODIFIERS,
)
def atom(b: Binder) -> Step:
    """d = old value, memory = old op b."""
    return _atomic(b, has_result=True)


@instruction(
    "red",
    family="memory",
    section="Parallel Synchronization and Communication Instructions: red",
    types=_TYPES,
    modifiers=_MODIFIERS,
    results=0,
)
def red(b: Binder) -> Step:
    """memory = old op b."""
    return _atomic(b, has_result=False)


def _atomic(b: Binder, *, has_result: bool) -> Step:
    scalar = b.type
    operations = [m for m in b.mods if m in _OPERATIONS.split()]
    if len(operations) != 1:
        raise b.unsupported("atomic without one operation")
    operation = operations[0]
    if b.mods & {"v2", "v4"} and (operation != "add" or has_result):
        raise b.unsupported("vector atomics other than red.add")
    first = 1 if has_result else 0
    d = b.dst(0, scalar) if has_result else None
    addresses, spaces = b.address(first), Spaces(b)
    unsigned = BITS[scalar.size]
    sources = [_bits(x, unsigned, b) for x in b.sources(first + 1, scalar)]
    swap = _bits(b.src(first + 2, scalar), unsigned, b) if operation == "cas" else None
    apply = None if operation == "cas" else combine(b, operation, scalar)

    def step(active: Active) -> None:
        lanes = active.lanes
        where = addresses(active)
        for part, source in enumerate(sources):
            value = source[lanes]

            def function(old: Array, which: Array, value: Array = value) -> Array:
                if apply is not None:
                    return apply(old, value[which])
                assert swap is not None
                return np.where(old == value[which], swap[lanes][which], old)

            old = np.empty(len(lanes), unsigned)
            for memory, at, positions in spaces.parts(lanes, where + part * scalar.size):
                picked = np.arange(len(lanes)) if positions is None else positions
                old[picked] = memory.update(
                    b.site,
                    lanes[picked],
                    at,
                    scalar.size,
                    lambda o, which, picked=picked, f=function: f(o, picked[which]),
                )
            if d is not None:
                put_lanes(d, old.view(scalar.dtype), active)

    return step


def _bits(x: Any, unsigned: np.dtype[Any], b: Binder) -> Array:
    """A source as unsigned [lanes]."""
    if np.ndim(x):
        array: Array = x.view(unsigned)
        return array
    return np.full(b.machine.lanes, np.asarray(x).view(unsigned))
