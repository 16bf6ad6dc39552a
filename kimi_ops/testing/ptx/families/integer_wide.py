"""Products wider than their factors, and dot products of bytes.

Source: PTX ISA, "Integer Arithmetic Instructions".
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kimi_ops.testing.ptx.binding import Binder, Step
from kimi_ops.testing.ptx.registry import INTEGERS, instruction
from kimi_ops.testing.ptx.types import TYPES, Array


def high_half(x: Any, y: Any) -> Array:
    """Upper half of the full product of integers of one width."""
    x, y = np.asarray(x), np.asarray(y)
    size, kind = x.dtype.itemsize, x.dtype.kind
    if size < 8:
        wide = np.dtype(f"{kind}{2 * size}")
        return (x.astype(wide) * y.astype(wide) >> (8 * size)).astype(x.dtype)
    a, b = x.view(np.uint64), y.view(np.uint64)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    other = a0 * b1 + (middle & low)
    high = a1 * b1 + (middle >> half) + (other >> half)
    if kind == "i":
        zero = np.uint64(0)
        high = high - np.where(x < 0, b, zero) - np.where(y < 0, a, zero)
    return np.asarray(high).view(x.dtype)


@instruction(
    "mul.hi",
    family="integer",
    section="Integer Arithmetic Instructions: mul",
    types=INTEGERS,
    order="pure",
)
def mul_hi(b: Binder) -> Step:
    """Upper half of a * b."""
    return b.compute(high_half, b.dst(0, b.type), b.src(1, b.type), b.src(2, b.type))


@instruction(
    "mad.hi",
    family="integer",
    section="Integer Arithmetic Instructions: mad",
    types=INTEGERS,
    order="pure",
)
def mad_hi(b: Binder) -> Step:
    """Upper half of a * b, plus c."""
    d, x, y, z = (b.dst(0, b.type), *(b.src(i, b.type) for i in (1, 2, 3)))
    return b.compute(lambda: high_half(x, y) + z, d)


@instruction(
    "mul.wide",
    family="integer",
    section="Integer Arithmetic Instructions: mul",
    types="u16 u32 s16 s32",
    order="pure",
)
def mul_wide(b: Binder) -> Step:
    """a * b in twice the width."""
    wide = TYPES[f"{b.type.kind}{16 * b.type.size}"]
    d, x, y = b.dst(0, wide), b.src(1, b.type), b.src(2, b.type)
    return b.compute(lambda: np.multiply(x, y, dtype=wide.dtype), d)


@instruction(
    "mad.wide",
    family="integer",
    section="Integer Arithmetic Instructions: mad",
    types="u16 u32 s16 s32",
    order="pure",
)
def mad_wide(b: Binder) -> Step:
    """a * b in twice the width, plus c of that width."""
    wide = TYPES[f"{b.type.kind}{16 * b.type.size}"]
    d, x, y, z = b.dst(0, wide), b.src(1, b.type), b.src(2, b.type), b.src(3, wide)
    return b.compute(lambda: np.multiply(x, y, dtype=wide.dtype) + z, d)


@instruction(
    "mul24.lo",
    family="integer",
    section="Integer Arithmetic Instructions: mul24",
    types="u32 s32",
    order="pure",
)
def mul24(b: Binder) -> Step:
    """Low 32 bits of the product of the low 24 bits."""
    d, x, y = b.dst(0, b.type), b.src(1, b.type), b.src(2, b.type)
    return b.compute(lambda: ((x << 8) >> 8) * ((y << 8) >> 8), d)


@instruction(
    "dp4a",
    family="integer",
    section="Integer Arithmetic Instructions: dp4a",
    types="u32 s32",
    order="pure",
)
def dp4a(b: Binder) -> Step:
    """c plus the dot product of four bytes; each factor signed or not."""
    u32 = TYPES["u32"]
    d = b.dst(0, u32)
    x, y, z = (b.src(i, u32) for i in (1, 2, 3))

    def bytes_of(v: Any, kind: str) -> Array:
        flat = np.ascontiguousarray(np.broadcast_to(v, b.shape))
        each = flat.view("u1" if kind == "u" else "i1").reshape(*b.shape, 4)
        return each.astype(np.int64)

    def dot() -> Array:
        product = (bytes_of(x, b.types[0].kind) * bytes_of(y, b.types[1].kind)).sum(axis=-1)
        return (product + np.asarray(z).astype(np.int64)).astype(np.uint32)

    return b.compute(dot, d)
