"""Matrix instructions of a warp.

Fragments are laid out by one rule for all element sizes: with g = lane // 4 and t = lane % 4, and
p = 4 / element bytes elements in a register, register r of A holds row g + 8 (r % 2), columns
p t ... p t + p - 1, plus 4 p (r // 2); register r of B the rows p t ... plus 4 p r of column g;
element i of C row g + 8 (i // 2), column 2 t + i % 2.

Products are exact and summed in float32, in no stated order; integers exactly, wrapping without
``.satfinite``. Source: PTX ISA, "Warp Level Matrix Multiply-Accumulate
Instructions".
"""

from __future__ import annotations

from functools import cache

import numpy as np

from kimi_ops.testing.ptx import rounding
from kimi_ops.testing.ptx.binding import Active, Binder, Step, put
from kimi_ops.testing.ptx.registry import instruction
from kimi_ops.testing.ptx.types import TYPES, WARP, Array, ScalarType

B32 = TYPES["b32"]
_G, _T = np.arange(WARP) // 4, np.arange(WARP) % 4


def _all_lanes(b: Binder, active: Active) -> None:
    """``.aligned``: all threads of the warp execute it together."""
    if active.count == b.machine.lanes:
        return
    full = np.where(active.bits != 0, np.uint32(0xFFFFFFFF), np.uint32(0))
    b.machine.converged(active, full, f"divergent {b.entry.opcode}")


@cache
def _order_a(size: int, registers: int) -> tuple[Array, int]:
    """Where, in [32, registers, p] elements, element (row, column) of A is; and the columns."""
    p = 4 // size
    columns = 2 * registers * p
    order = np.zeros((16, columns), np.int64)
    for r in range(registers):
        for j in range(p):
            row = _G + 8 * (r % 2)
            column = p * _T + j + 4 * p * (r // 2)
            order[row, column] = (np.arange(WARP) * registers + r) * p + j
    return order.reshape(-1), columns


@cache
def _order_b(size: int, registers: int) -> Array:
    """The same of B, [columns of A, 8]."""
    p = 4 // size
    order = np.zeros((4 * p * registers, 8), np.int64)
    for r in range(registers):
        for j in range(p):
            order[p * _T + j + 4 * p * r, _G] = (np.arange(WARP) * registers + r) * p + j
    return order.reshape(-1)


_ORDER_C = np.stack(
    [(_G + 8 * (i // 2)) * 8 + 2 * _T + i % 2 for i in range(4)]
)  # [4, 32] into [16, 8]
_SHAPES = {
    "f16": {"m16n8k8": 2, "m16n8k16": 4},
    "bf16": {"m16n8k8": 2, "m16n8k16": 4},
    "tf32": {"m16n8k4": 2, "m16n8k8": 4},
    "s8": {"m16n8k16": 2, "m16n8k32": 4},
    "u8": {"m16n8k16": 2, "m16n8k32": 4},
}


def _elements(registers: list[Array], scalar: ScalarType) -> Array:
    """Registers [..., lanes] each as element values [warps, 32 * registers * p]."""
    stacked = np.empty((*registers[0].shape, len(registers)), np.uint32)
    for i, register in enumerate(registers):
        stacked[..., i] = register
    if scalar.name in ("s8", "u8"):
        values = stacked.view(scalar.dtype).astype(np.int32)
    else:
        values = rounding.decode(stacked.view(scalar.dtype), scalar)
    return values.reshape(-1, WARP * values.shape[-1])


@instruction(
    "mma.sync",
    family="matrix",
    section="Multiply-and-Accumulate Instruction: mma",
    types="f32 f16 bf16 tf32 s32 s8 u8",
    modifiers="aligned row col satfinite m16n8k4 m16n8k8 m16n8k16 m16n8k32",
    order="pure",
)
def mma(b: Binder) -> Step:
    """D = A B + C for 16 x 8 tiles of f16, bf16, tf32, s8 and u8."""
    result, type_a, type_b, type_c = b.types
    shape = next(m for m in b.mods if m.startswith("m16"))
    if shape not in _SHAPES.get(type_a.name, {}):
        raise b.unsupported(f"shape {shape} of {type_a.name}")
    whole = type_a.name in ("s8", "u8")
    accumulators = {"s32"} if whole else {"f32", "f16"} if type_a.name == "f16" else {"f32"}
    mixed = type_b.name not in ("s8", "u8") if whole else type_a.name != type_b.name
    if mixed or result.name not in accumulators or type_c.name != result.name:
        raise b.unsupported("this combination of types")
    if b.ins.parts.index("row") > b.ins.parts.index("col"):
        raise b.unsupported("other than .row.col")
    held = B32 if result.name == "f16" else result
    ds, cs = b.results(0, held), b.sources(3, held)
    fa, fb = b.sources(1, B32), b.sources(2, B32)
    count = _SHAPES[type_a.name][shape]
    if (len(fa), len(fb), len(ds), len(cs)) != (count, count // 2, *[len(ds)] * 2):
        raise b.unsupported(f"fragments of {len(fa)} and {len(fb)} registers")
    lanes = b.machine.lanes
    order_a, k = _order_a(type_a.size, count)
    order_b = _order_b(type_b.size, count // 2)
    fa, fb, cs = ([np.broadcast_to(r, b.shape) for r in f] for f in (fa, fb, cs))

    def step(active: Active) -> None:
        _all_lanes(b, active)
        if active.count == lanes:
            a, right, c = fa, fb, cs
        else:
            # A few warps of a large batch: leave the others out.
            a, right, c = ([r[..., active.lanes] for r in f] for f in (fa, fb, cs))
        left = _elements(a, type_a).take(order_a, 1).reshape(-1, 16, k)
        product = np.matmul(left, _elements(right, type_b).take(order_b, 1).reshape(-1, k, 8))
        b.site.traffic.multiply_adds += product.size * k
        parts = product.reshape(-1, 128)[:, _ORDER_C].swapaxes(0, 1).reshape(4, *c[0].shape)
        for d, out in zip(ds, _accumulated(parts, c), strict=True):
            if active.count == lanes:
                d[...] = out
            else:
                d[..., active.lanes] = out

    def _accumulated(parts: Array, c: list[Array]) -> Array:
        if whole:
            total = parts.astype(np.int64) + np.stack(c)
            if "satfinite" in b.mods:
                total = np.clip(total, -(1 << 31), (1 << 31) - 1)
            return total.astype(np.int32)
        if result.name == "f32":
            return rounding.canonical(parts + np.stack(c))
        halves = np.stack(c, axis=-1).view(np.float16).astype(np.float32)
        coded = rounding.encode_f32(np.moveaxis(parts, 0, -1) + halves, TYPES["f16"])
        return np.moveaxis(np.ascontiguousarray(coded).view(np.uint32), -1, 0)

    return step


def _matrices(b: Binder) -> int:
    counts = [int(m[1:]) for m in b.mods if m in ("x1", "x2", "x4")]
    if "m8n8" not in b.mods or len(counts) != 1:
        raise b.unsupported("other than .m8n8 with .x1, .x2 or .x4")
    return counts[0]


_MATRIX = "sync aligned m8n8 x1 x2 x4 trans shared shared::cta"


def _row_lanes(active: Active, count: int) -> Array:
    """Lanes that give the row addresses of ``count`` matrices."""
    lanes: Array = (active.warps[:, None] * WARP + np.arange(8 * count)).reshape(-1)
    return lanes


@instruction(
    "ldmatrix",
    family="memory",
    section="Warp-level matrix load instruction: ldmatrix",
    types="b16",
    modifiers=_MATRIX,
    order="access",
)
def ldmatrix(b: Binder) -> Step:
    """Loads 8 x 8 matrices of 16-bit elements from rows of 16 bytes."""
    ds, count = b.results(0, B32), _matrices(b)
    addresses = b.address(1)
    if len(ds) != count:
        raise b.unsupported(f"{len(ds)} registers for {count} matrices")
    if not b.mods & {"shared", "shared::cta"}:
        raise b.unsupported("a generic address")
    shared, lanes = b.machine.shared, b.machine.lanes
    runs = b.shape[0] if len(b.shape) > 1 else 1

    def step(active: Active) -> None:
        _all_lanes(b, active)
        where = addresses(active).reshape(-1, WARP)[:, : 8 * count].reshape(-1)
        rows = _row_lanes(active, count)
        # One or two matrices take their addresses from some of the lanes only.
        b.site.per_access(len(rows))
        if runs > 1:
            rows = np.tile(rows, runs)
        values = shared.read(b.site, rows, where, 4, 4)
        values = np.ascontiguousarray(values).view(np.uint16).reshape(-1, count, 8, 8)
        if "trans" in b.mods:
            values = values.swapaxes(2, 3)
        pairs = np.ascontiguousarray(values).view(np.uint32).reshape(-1, count, WARP)
        for i, d in enumerate(ds):
            part = pairs[:, i].reshape(*b.shape[:-1], -1)
            if active.count == lanes:
                d[...] = part
            else:
                d[..., active.lanes] = part

    return step


@instruction(
    "stmatrix",
    family="memory",
    section="Warp-level matrix store instruction: stmatrix",
    types="b16",
    modifiers=_MATRIX,
    results=0,
    order="ordered",
)
def stmatrix(b: Binder) -> Step:
    """Stores 8 x 8 matrices of 16-bit elements to rows of 16 bytes (sm_90)."""
    sources, count = b.sources(1, B32), _matrices(b)
    addresses = b.address(0)
    if len(sources) != count:
        raise b.unsupported(f"{len(sources)} registers for {count} matrices")
    if not b.mods & {"shared", "shared::cta"}:
        raise b.unsupported("a generic address")
    shared = b.machine.shared

    def step(active: Active) -> None:
        _all_lanes(b, active)
        warps = active.warps
        where = addresses(active).reshape(len(warps), WARP)[:, : 8 * count].reshape(-1)
        full = [np.broadcast_to(s, (b.machine.lanes,))[active.lanes] for s in sources]
        pairs = np.stack([s.reshape(-1, WARP) for s in full], axis=1)
        values = np.ascontiguousarray(pairs).view(np.uint16).reshape(-1, count, 8, 8)
        if "trans" in b.mods:
            values = values.swapaxes(2, 3)
        data = np.ascontiguousarray(values).view(np.uint32).reshape(-1, 4)
        shared.write(b.site, _row_lanes(active, count), where, data)

    return step


@instruction(
    "movmatrix",
    family="matrix",
    section="Warp-level matrix transpose instruction: movmatrix",
    types="b16",
    modifiers="sync aligned m8n8 trans",
    order="ordered",
)
def movmatrix(b: Binder) -> Step:
    """Transposes an 8 x 8 matrix of 16-bit elements held by a warp."""
    d, x = b.dst(0, B32), b.src(1, B32)

    def step(active: Active) -> None:
        _all_lanes(b, active)
        values = np.ascontiguousarray(np.broadcast_to(x, (b.machine.lanes,)))
        matrix = values.view(np.uint16).reshape(-1, 8, 8).swapaxes(1, 2)
        put(d, np.ascontiguousarray(matrix).view(np.uint32).reshape(-1), active)

    return step
