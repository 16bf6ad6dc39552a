"""Moves, loads, stores and addresses.

Source: PTX ISA, "Data Movement and Conversion Instructions".
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kimi_ops.testing.ptx.binding import Active, Binder, Step, put, put_lanes
from kimi_ops.testing.ptx.errors import OutOfBounds
from kimi_ops.testing.ptx.memory import GLOBAL_WINDOW, LOCAL_WINDOW, SHARED_WINDOW, WINDOW_BYTES
from kimi_ops.testing.ptx.registry import BIT_TYPES, INTEGERS, MEMORY_TYPES, instruction
from kimi_ops.testing.ptx.syntax import Address, Name, Vector
from kimi_ops.testing.ptx.types import BITS, TYPES, Array, ScalarType

U64 = TYPES["u64"]
_SPACES = "global shared shared::cta shared::cluster local const param param::entry param::func"
_CACHE = (
    "ca cg cs lu cv wb wt nc L1::evict_first L1::evict_last L1::evict_normal L1::no_allocate "
    "L1::evict_unchanged L2::evict_first L2::evict_last L2::evict_normal L2::64B L2::128B L2::256B "
    "L2::cache_hint"
)
_ORDER = "weak relaxed acquire release volatile cta cluster gpu sys"


@instruction(
    "mov",
    family="move",
    section="Data Movement and Conversion Instructions: mov",
    types=f"{BIT_TYPES} {INTEGERS} f32 f64 pred",
    order="pure",
)
def mov(b: Binder) -> Step:
    """d = a, also of addresses, special registers, and to and from vectors."""
    scalar = b.type
    target, source = b.ins.operands
    if isinstance(target, Vector):
        return _unpack(b, scalar)
    if isinstance(source, Vector):
        return _pack(b, scalar)
    if scalar.kind == "p":
        p = b.predicate(1)
        return b.compute(lambda: np.asarray(p()), b.dst(0, scalar))
    d, x = b.dst(0, scalar), b.src(1, scalar)

    def step(active: Active) -> None:
        if active.full:
            d[...] = x
        else:
            np.copyto(d, x, where=active.mask)

    return step


def _unpack(b: Binder, scalar: ScalarType) -> Step:
    items = b.items(0)
    part = TYPES[f"b{8 * scalar.size // len(items)}"]
    x = b.src(1, scalar)
    results = [b.dst(item, part) for item in items]

    def step(active: Active) -> None:
        source = np.array(x)
        for i, d in enumerate(results):
            shifted = source.view(BITS[scalar.size]) >> BITS[scalar.size].type(8 * part.size * i)
            put(d, shifted.astype(part.dtype), active)

    return step


def _pack(b: Binder, scalar: ScalarType) -> Step:
    items = b.items(1)
    part = TYPES[f"b{8 * scalar.size // len(items)}"]
    d = b.dst(0, scalar)
    parts = [b.src(item, part) for item in items]
    wide = BITS[scalar.size]

    def joined() -> Array:
        value = np.asarray(parts[0]).astype(wide)
        for i, x in enumerate(parts[1:], 1):
            value = value | (np.asarray(x).astype(wide) << wide.type(8 * part.size * i))
        return value

    return b.compute(joined, d)


class Spaces:
    """Sends an access to the memory that its space, or a generic address, stands for.

    Args:
        b: of an instruction whose modifiers name the space, or none for a generic address.
    """

    def __init__(self, b: Binder) -> None:
        spaces = {m.split("::")[0] for m in b.mods} & {
            "global",
            "shared",
            "local",
            "const",
            "param",
        }
        self.space = next(iter(spaces), "generic")
        machine = b.machine
        self.shared, self.local = machine.shared, machine.local
        self.memory = machine.launch.memory
        self.site = b.site
        # Volatile and ordered accesses are synchronisation, not data: they do not race.
        self.plain = not b.mods & {"relaxed", "acquire", "release", "volatile"}

    def parts(self, lanes: Array, address: Array) -> list[tuple[Any, Array, Array | None]]:
        """(memory, addresses in it, positions or None for all) of an access."""
        if self.space in ("global", "const"):
            return [(self.memory, address, None)]
        if self.space == "shared":
            return [(self.shared, address, None)]
        if self.space in ("local", "param"):
            return [(self.local, address, None)]
        out: list[tuple[Any, Array, Array | None]] = []
        taken = np.zeros(len(address), bool)
        for window, memory in ((SHARED_WINDOW, self.shared), (LOCAL_WINDOW, self.local)):
            inside = (address >= window) & (address < window + WINDOW_BYTES)
            if inside.all():
                return [(memory, address - window, None)]
            if inside.any():
                where = np.flatnonzero(inside)
                out.append((memory, address[where] - window, where))
                taken |= inside
        low = ~taken & (address < GLOBAL_WINDOW)
        if low.any():
            at = int(low.argmax())
            raise self.site.fail(
                OutOfBounds, f"generic address {int(address[at]):#x} is in no window", lanes[at]
            )
        if not out:
            return [(self.memory, address, None)]
        if not taken.all():
            where = np.flatnonzero(~taken)
            out.append((self.memory, address[where], where))
        return out

    def read(self, lanes: Array, address: Array, unit: int, count: int) -> Array:
        """[k, count] numbers."""
        result = np.empty((len(lanes), count), BITS[unit])
        for memory, at, where in self.parts(lanes, address):
            who = lanes if where is None else lanes[where]
            values = memory.read(self.site, who, at, unit, count, plain=self.plain)
            if where is None:
                return np.asarray(values)
            result[where] = values
        return result

    def write(self, lanes: Array, address: Array, data: Array) -> None:
        """Writes [k, count] numbers."""
        for memory, at, where in self.parts(lanes, address):
            if where is None:
                memory.write(self.site, lanes, at, data, plain=self.plain)
            else:
                memory.write(self.site, lanes[where], at, data[where], plain=self.plain)


@instruction(
    "ld ldu",
    family="memory",
    section="Data Movement and Conversion Instructions: ld, ldu",
    types=MEMORY_TYPES,
    modifiers=f"{_SPACES} {_CACHE} {_ORDER} v2 v4 v8",
    order="access",
)
def ld(b: Binder) -> Step:
    """Loads one value or a vector."""
    scalar = b.type
    address_operand = b.ins.operands[1]
    if not isinstance(address_operand, Address):
        raise b.unsupported(f"address {address_operand}")
    base = address_operand.base
    if isinstance(base, Name) and base.name in b.machine.launch.params:
        return _entry_parameter(b, b.machine.launch.params[base.name], address_operand.offset)
    results = b.results(0, scalar, wide=True)
    addresses, spaces = b.address(1), Spaces(b)
    unit, count = scalar.size, len(results)

    def step(active: Active) -> None:
        lanes = b.lanes_of(active)
        where = addresses(active)
        if spaces.space == "global":
            b.require_one_buffer(where)
        values = spaces.read(lanes, where, unit, count)
        for i, d in enumerate(results):
            column = np.ascontiguousarray(values[:, i]).view(scalar.dtype)
            put_lanes(d, column.reshape(*b.shape[:-1], -1), active)

    return step


def _entry_parameter(b: Binder, data: bytes, offset: int) -> Step:
    results = b.results(0, b.type, wide=True)
    size = b.type.size
    if offset < 0 or offset + size * len(results) > len(data):
        raise b.unsupported(f"bytes {offset} to {offset + size * len(results)} of a parameter")
    values = np.frombuffer(data[offset : offset + size * len(results)], b.type.dtype)

    def step(active: Active) -> None:
        for d, value in zip(results, values, strict=True):
            put(d, value, active)

    return step


@instruction(
    "st",
    family="memory",
    section="Data Movement and Conversion Instructions: st",
    types=MEMORY_TYPES,
    modifiers=f"{_SPACES} {_CACHE} {_ORDER} v2 v4 v8",
    results=0,
    order="access",
)
def st(b: Binder) -> Step:
    """Stores one value or a vector."""
    sources = b.sources(1, b.type, wide=True)
    addresses, spaces = b.address(0), Spaces(b)
    unsigned = BITS[b.type.size]
    sources = [np.broadcast_to(np.asarray(x).view(unsigned), b.shape) for x in sources]

    def step(active: Active) -> None:
        lanes = b.lanes_of(active)
        where = addresses(active)
        b.require_apart(lanes, where, shared=spaces.space == "shared")
        if spaces.space == "global":
            b.require_one_buffer(where)
        data = np.empty((*b.shape[:-1], active.count, len(sources)), unsigned)
        for i, x in enumerate(sources):
            data[..., i] = x if active.count == x.shape[-1] else x[..., active.lanes]
        data = data.reshape(-1, len(sources))
        spaces.write(lanes, where, data)

    return step


@instruction(
    "cvta",
    family="move",
    section="Data Movement and Conversion Instructions: cvta",
    types="u32 u64",
    modifiers="to global shared shared::cta shared::cluster local const param",
    order="pure",
)
def cvta(b: Binder) -> Step:
    """Address of a space to generic, or back with ``.to``."""
    d, x = b.dst(0, b.type), b.src(1, b.type)
    spaces = {m.split("::")[0] for m in b.mods} - {"to"}
    window = SHARED_WINDOW if "shared" in spaces else LOCAL_WINDOW if "local" in spaces else 0
    if "to" in b.mods:
        return b.compute(lambda: x - b.type.dtype.type(window), d)
    return b.compute(lambda: x + b.type.dtype.type(window), d)


@instruction(
    "isspacep",
    family="move",
    section="Data Movement and Conversion Instructions: isspacep",
    modifiers="global shared shared::cta shared::cluster local const",
    order="pure",
)
def isspacep(b: Binder) -> Step:
    """Whether a generic address is in a space."""
    d, x = b.dst(0, TYPES["pred"]), b.src(1, U64)
    (space,) = {m.split("::")[0] for m in b.mods}
    if space == "const":
        raise b.unsupported("telling .const from .global")
    if space == "global":
        return b.compute(lambda: np.asarray(x) >= np.uint64(GLOBAL_WINDOW), d)
    window = SHARED_WINDOW if space == "shared" else LOCAL_WINDOW
    return b.compute(lambda: (x >= np.uint64(window)) & (x < np.uint64(window + WINDOW_BYTES)), d)


@instruction(
    "prefetch prefetchu applypriority createpolicy",
    family="memory",
    section="Data Movement and Conversion Instructions: prefetch, prefetchu",
    types="b64",
    modifiers=f"global local L1 L2 fractional {_CACHE}",
    results=0,
)
def cache_hint(b: Binder) -> Step:
    """Hints to the caches: no effect on values; a policy is any number."""
    if b.entry.opcode == "createpolicy":
        d = b.dst(0, TYPES["b64"])
        return b.compute(lambda: np.uint64(0), d)
    return lambda active: None
