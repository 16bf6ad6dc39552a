"""Asynchronous matrix products of a warpgroup, and its registers (sm_90a).

D is [64, N], A [64, K], B [N, K], with K of 32 bytes. Warp w of the four holds rows 16 w ... of D:
with g = lane // 4 and t = lane % 4, element i is row g + 8 (i // 2 % 2), column
8 (i // 4) + 2 t + i % 2. A and B are read as `wgmma_operands` has it; what holds from issue to wait
is in `wgmma`.

Products are exact and summed in float32, in no stated order, then added to D; integers exactly.
The hardware keeps fewer bits of the sums of 8-bit floats than that.

Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions"
("wgmma.mma_async", "Register Fragments", "wgmma.fence", "wgmma.commit_group",
"wgmma.wait_group"), "Miscellaneous Instructions: setmaxnreg".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from kimi_ops.testing.ptx import rounding
from kimi_ops.testing.ptx.binding import Active, Binder, Step
from kimi_ops.testing.ptx.descriptors import CHUNK
from kimi_ops.testing.ptx.registry import instruction
from kimi_ops.testing.ptx.syntax import Vector
from kimi_ops.testing.ptx.types import TYPES, WARP, Array
from kimi_ops.testing.ptx.uses import names
from kimi_ops.testing.ptx.wgmma import GROUP, Groups
from kimi_ops.testing.ptx.wgmma_operands import (
    K_BYTES,
    LANES,
    ROWS,
    KnownRegisters,
    RegisterOperand,
    SharedOperand,
    uniform,
)

if TYPE_CHECKING:
    from kimi_ops.testing.ptx.machine import Machine

_EIGHT = range(8, 257, 8)
# 8-bit integers leave out the odd multiples of 8 above 24.
_WHOLE = (8, 16, 24, *range(32, 257, 16))


def _shapes(sizes: range | tuple[int, ...], k: int) -> str:
    return " ".join(f"m64n{n}k{k}" for n in sizes)


def _meeting(b: Binder, body: Callable[[Array], None]) -> Step:
    """A step of whole warpgroups: ``body`` gets their lanes, ascending."""
    if b.ins.guard is not None:
        raise b.unsupported("a predicated instruction of a warpgroup")
    after = b.site.index + 1

    def step(active: Active) -> Groups:
        machine = b.machine
        full = np.where(active.bits != 0, np.uint32(0xFFFFFFFF), np.uint32(0))
        machine.converged(active, full, f"divergent {b.entry.opcode}")
        lanes = machine.warpgroups.meet(b.site, active)
        if lanes is None:
            return []
        body(lanes)
        if len(lanes) == active.count and active.mask[lanes].all():
            return [(after, None)]
        mask = np.zeros(machine.lanes, bool)
        mask[lanes] = True
        return [(after, mask)]

    return step


@cache
def _order_d(n: int) -> Array:
    """Where, in [64, n], the elements [n / 2, 128 lanes] of D are."""
    i, lane = np.arange(n // 2)[:, None], np.arange(LANES)
    row = lane // WARP * 16 + lane % WARP // 4 + 8 * (i // 2 % 2)
    return row * n + 8 * (i // 4) + lane % 4 * 2 + i % 2


_FLOATS = {"f16": {"f16"}, "bf16": {"bf16"}, "tf32": {"tf32"}}
_EIGHT_BITS = {"e4m3": {"e4m3", "e5m2"}, "e5m2": {"e4m3", "e5m2"}}


@instruction(
    "wgmma.mma_async.sync.aligned",
    family="matrix",
    section="Asynchronous Multiply-and-Accumulate Instruction: wgmma.mma_async",
    types="f32 f16 bf16",
    modifiers=_shapes(_EIGHT, 16),
    reads_results=True,
    control=True,
)
def mma_16(b: Binder) -> Step:
    """D = A B (+ D) of f16 and bf16; A and B negated or transposed by constants."""
    return _mma(b, _FLOATS)


@instruction(
    "wgmma.mma_async.sync.aligned",
    family="matrix",
    section="Asynchronous Multiply-and-Accumulate Instruction: wgmma.mma_async",
    types="f32 tf32",
    modifiers=_shapes(_EIGHT, 8),
    reads_results=True,
    control=True,
)
def mma_tf32(b: Binder) -> Step:
    """D = A B (+ D) of tf32; A and B negated by constants."""
    return _mma(b, _FLOATS)


@instruction(
    "wgmma.mma_async.sync.aligned",
    family="matrix",
    section="Asynchronous Multiply-and-Accumulate Instruction: wgmma.mma_async",
    types="f32 f16 e4m3 e5m2",
    modifiers=_shapes(_EIGHT, 32),
    reads_results=True,
    control=True,
)
def mma_8(b: Binder) -> Step:
    """D = A B (+ D) of e4m3 and e5m2; A and B negated by constants."""
    return _mma(b, _EIGHT_BITS)


@instruction(
    "wgmma.mma_async.sync.aligned",
    family="matrix",
    section="Asynchronous Multiply-and-Accumulate Instruction: wgmma.mma_async",
    types="s32 s8 u8",
    modifiers=f"{_shapes(_WHOLE, 32)} satfinite",
    reads_results=True,
    control=True,
)
def mma_integer(b: Binder) -> Step:
    """D = A B (+ D) of s8 and u8."""
    return _mma(b, {"s8": {"s8", "u8"}, "u8": {"s8", "u8"}})


def _mma(b: Binder, pairs: dict[str, set[str]]) -> Step:
    machine = b.machine
    if machine.launch.program.target != "sm_90a":
        raise b.unsupported(f"wgmma for {machine.launch.program.target}: it needs sm_90a")
    if len(b.types) != 3:
        raise b.unsupported("other than three types")
    result, type_a, type_b = b.types
    whole = result.name == "s32"
    accumulators = {"s32"} if whole else {"f32"}
    if type_a.name in ("f16", "e4m3", "e5m2"):
        accumulators.add("f16")
    if type_b.name not in pairs.get(type_a.name, ()) or result.name not in accumulators:
        raise b.unsupported("this combination of types")
    shape = next(m for m in b.mods if m.startswith("m64"))
    n = int(shape[4:].split("k")[0])
    in_registers = isinstance(b.ins.operands[1], Vector)
    scales = [] if whole else [b.integer(4), b.integer(5)]
    turns = [b.integer(i) for i in range(6, len(b.ins.operands))] if scales else []
    expected = (1 if in_registers else 2) if type_a.size == 2 else 0
    if any(s not in (1, -1) for s in scales) or any(t not in (0, 1) for t in turns):
        raise b.unsupported("a scale that is not 1 or -1, or a transposition that is not 0 or 1")
    if len(turns) != expected or len(b.ins.operands) != 4 + len(scales) + len(turns):
        raise b.unsupported(f"{len(b.ins.operands)} operands")
    sign = -1 if scales and scales[0] * scales[1] < 0 else 1

    a: RegisterOperand | SharedOperand
    if in_registers:
        a = RegisterOperand(b, type_a)
    else:
        a = SharedOperand(b, 1, ROWS, type_a, bool(turns and turns[0]))
    right = SharedOperand(b, 2, n, type_b, bool(turns and turns[-1]))
    held = TYPES["b32"] if result.name == "f16" else result
    ds = b.results(0, held)
    if len(ds) != n * (2 if result.name == "f16" else 4) // 8:
        raise b.unsupported(f"{len(ds)} registers of D")
    accumulates = b.predicate(3)
    d_names, a_names = list(names(b.ins.operands[0])), []
    if in_registers:
        a_names = list(names(b.ins.operands[1]))
    if len(set(d_names)) != len(d_names) or set(d_names) & set(a_names):
        raise b.unsupported("a register used twice")
    flags = KnownRegisters(b)
    parts = (shape, result.name)
    order, k = _order_d(n), K_BYTES // type_a.size

    def body(lanes: Array) -> None:
        shared, groups = machine.shared, machine.warpgroups
        add = np.broadcast_to(accumulates(), (machine.lanes,))[lanes]
        flags.require(lanes, add)
        first = lanes[::LANES] // WARP
        groups.issue(b.site, first, parts, d_names, a_names)
        left, places_a = a.read(lanes)
        values_b, places = right.read(lanes)
        if places_a is not None:
            places = np.concatenate([places_a, places], axis=1)
        warp_lanes = lanes[::WARP].reshape(-1, GROUP)
        for own, place in zip(warp_lanes, places, strict=True):
            cells = shared.cells(place, CHUNK)
            read = shared.async_read_begin(b.site, own, cells)
            groups.hold(read, int(own[0]) // WARP)
        traffic = b.site.traffic
        traffic.matrix_shared_bytes += places.size * CHUNK
        # Eight chunks of 16 bytes, as every layout has them, fall into different banks.
        traffic.matrix_shared_wavefronts += places.size * CHUNK // 128
        traffic.multiply_adds += len(first) * ROWS * n * k
        product = np.matmul(left * np.float32(sign), values_b.swapaxes(1, 2))
        out = product.reshape(len(first), -1)[:, order].swapaxes(0, 1).reshape(n // 2, -1)
        _store(lanes, out, uniform(b, "scale-d", add))

    def _store(lanes: Array, out: Array, add: Array) -> None:
        own = slice(None) if len(lanes) == machine.lanes else lanes
        keep = np.repeat(add, LANES)
        if result.name == "f16":
            _store_halves(own, out, keep)
            return
        if whole:
            out = out.astype(np.int64)
        if keep.any():
            before = np.stack([d[own] for d in ds])
            out = np.where(keep, out + before, out)
        if whole:
            if "satfinite" in b.mods:
                out = np.clip(out, -(1 << 31), (1 << 31) - 1)
            out = out.astype(np.int32)
        else:
            out = rounding.canonical(out)
        for d, row in zip(ds, out, strict=True):
            d[own] = row

    def _store_halves(own: Array | slice, out: Array, keep: Array) -> None:
        if keep.any():
            before = np.stack([np.ascontiguousarray(d[own]) for d in ds], axis=0)
            pairs_before = before.view(np.float16).reshape(len(ds), -1, 2).swapaxes(1, 2)
            out = np.where(keep, out + pairs_before.reshape(len(out), -1), out)
        coded = rounding.encode_f32(out, TYPES["f16"]).reshape(len(ds), 2, -1)
        packed = np.ascontiguousarray(coded.swapaxes(1, 2)).view(np.uint32)
        for d, row in zip(ds, packed[..., 0], strict=True):
            d[own] = row

    return _meeting(b, body)


@instruction(
    "wgmma.fence.sync.aligned",
    family="matrix",
    section="Asynchronous Multiply-and-Accumulate Instruction: wgmma.fence",
    results=0,
    control=True,
)
def fence(b: Binder) -> Step:
    """Orders accesses of registers before those of wgmma.mma_async."""
    return _meeting(b, lambda lanes: b.machine.warpgroups.fence(lanes[::WARP] // WARP))


@instruction(
    "wgmma.commit_group.sync.aligned",
    family="matrix",
    section="Asynchronous Multiply-and-Accumulate Instruction: wgmma.commit_group",
    results=0,
    control=True,
)
def commit(b: Binder) -> Step:
    """Closes the warpgroup's group of wgmma.mma_async."""
    return _meeting(b, lambda lanes: b.machine.warpgroups.commit(lanes[::WARP] // WARP))


@instruction(
    "wgmma.wait_group.sync.aligned",
    family="matrix",
    section="Asynchronous Multiply-and-Accumulate Instruction: wgmma.wait_group",
    results=0,
    control=True,
)
def wait(b: Binder) -> Step:
    """Waits until at most n groups of the warpgroup are in flight."""
    pending = b.integer(0)
    return _meeting(b, lambda lanes: b.machine.warpgroups.wait(lanes[::WARP] // WARP, pending))


@instruction(
    "setmaxnreg",
    family="control",
    section="Miscellaneous Instructions: setmaxnreg",
    types="u32",
    modifiers="inc dec sync aligned",
    results=0,
    control=True,
)
def setmaxnreg(b: Binder) -> Step:
    """Takes registers from the CTA's pool, waiting for them, or gives some back."""
    count = b.integer(0)
    if b.ins.guard is not None or not {"sync", "aligned"} <= b.mods:
        raise b.unsupported("other than an unpredicated .sync.aligned")
    if count % 8 or not 24 <= count <= 256:
        raise b.unsupported(f"{count} registers: not a multiple of 8 from 24 to 256")

    def step(active: Active) -> Groups:
        machine: Machine = b.machine
        full = np.where(active.bits != 0, np.uint32(0xFFFFFFFF), np.uint32(0))
        machine.converged(active, full, "divergent setmaxnreg")
        lanes = machine.warpgroups.meet(b.site, active)
        if lanes is None:
            return []
        return machine.register_pool.change(b.site, lanes, count, more="inc" in b.mods)

    return step
