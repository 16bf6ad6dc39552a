"""Shifts, bit fields, permutations.

Source: PTX ISA, "Integer Arithmetic Instructions", "Logic and Shift Instructions",
"Data Movement and Conversion Instructions: prmt".
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kimi_ops.testing.ptx.binding import Binder, Step
from kimi_ops.testing.ptx.registry import BIT_TYPES, INTEGERS, instruction
from kimi_ops.testing.ptx.types import BITS, TYPES, Array

U32 = TYPES["u32"]
B32 = TYPES["b32"]


@instruction(
    "shl",
    family="integer",
    section="Logic and Shift Instructions: shl",
    types=BIT_TYPES,
    order="pure",
)
def shl(b: Binder) -> Step:
    """a << b; 0 for b of the width or more."""
    d, x, n = b.dst(0, b.type), b.src(1, b.type), b.src(2, U32)
    width = 8 * b.type.size
    if np.ndim(n) == 0 and n < width:
        return b.ufunc(np.left_shift, d, x, b.type.dtype.type(n))
    kind = b.type.dtype

    def shift() -> Array:
        moved = x << np.minimum(n, width - 1).astype(kind)
        return np.where(n >= width, kind.type(0), moved)

    return b.compute(shift, d)


@instruction(
    "shr",
    family="integer",
    section="Logic and Shift Instructions: shr",
    types=f"{BIT_TYPES} {INTEGERS}",
    order="pure",
)
def shr(b: Binder) -> Step:
    """a >> b, with sign for signed types; b stops at the width."""
    d, x, n = b.dst(0, b.type), b.src(1, b.type), b.src(2, U32)
    width, kind = 8 * b.type.size, b.type.dtype
    if np.ndim(n) == 0 and n < width:
        return b.ufunc(np.right_shift, d, x, kind.type(n))

    def shift() -> Array:
        moved = x >> np.minimum(n, width - 1).astype(kind)
        return moved if b.type.kind == "s" else np.where(n >= width, kind.type(0), moved)

    return b.compute(shift, d)


@instruction(
    "shf",
    family="integer",
    section="Logic and Shift Instructions: shf",
    types="b32",
    modifiers="l r wrap clamp",
    order="pure",
)
def shf(b: Binder) -> Step:
    """Funnel shift of the 64 bits b:a; left gives the upper half, right the lower."""
    d = b.dst(0, B32)
    low, high, n = (b.src(i, B32) for i in (1, 2, 3))

    def shift() -> Array:
        amount = np.minimum(n, 32) if "clamp" in b.mods else n & np.uint32(31)
        both = (np.asarray(high).astype(np.uint64) << np.uint64(32)) | low
        by = np.asarray(amount).astype(np.uint64)
        if "l" in b.mods:
            return (both << by >> np.uint64(32)).astype(np.uint32)
        return (both >> by).astype(np.uint32)

    return b.compute(shift, d)


@instruction(
    "lop3",
    family="integer",
    section="Logic and Shift Instructions: lop3",
    types="b32",
    order="pure",
)
def lop3(b: Binder) -> Step:
    """Any function of three bits, given as its truth table."""
    d = b.dst(0, B32)
    x, y, z = (b.src(i, B32) for i in (1, 2, 3))
    table = b.integer(4)
    if not 0 <= table <= 255:
        raise b.unsupported(f"truth table {table}")

    def combine() -> Array:
        result = np.zeros(b.shape, np.uint32)
        for row in range(8):
            if table >> row & 1:
                result |= (x if row & 4 else ~x) & (y if row & 2 else ~y) & (z if row & 1 else ~z)
        return result

    return b.compute(combine, d)


@instruction(
    "prmt",
    family="integer",
    section="Data Movement and Conversion Instructions: prmt",
    types="b32",
    modifiers="f4e b4e rc8 ecl ecr rc16",
    order="pure",
)
def prmt(b: Binder) -> Step:
    """Four bytes picked from the eight of b:a; in the default mode with sign replication."""
    d = b.dst(0, B32)
    x, y, c = (b.src(i, B32) for i in (1, 2, 3))
    picks = {
        "f4e": ((0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (3, 4, 5, 6)),
        "b4e": ((0, 7, 6, 5), (1, 0, 7, 6), (2, 1, 0, 7), (3, 2, 1, 0)),
        "rc8": ((0,) * 4, (1,) * 4, (2,) * 4, (3,) * 4),
        "ecl": ((0, 1, 2, 3), (1, 1, 2, 3), (2, 2, 2, 3), (3, 3, 3, 3)),
        "ecr": ((0, 0, 0, 0), (0, 1, 1, 1), (0, 1, 2, 2), (0, 1, 2, 3)),
        "rc16": ((0, 1, 0, 1), (2, 3, 2, 3), (0, 1, 0, 1), (2, 3, 2, 3)),
    }
    mode = next(iter(b.mods), None)

    def permute() -> Array:
        both = np.asarray(x).astype(np.uint64) | (np.asarray(y).astype(np.uint64) << np.uint64(32))
        result = np.zeros(b.shape, np.uint64)
        for byte in range(4):
            if mode:
                pick = np.array([row[byte] for row in picks[mode]])[np.asarray(c) & 3]
                sign = np.zeros(1, bool)
            else:
                nibble = (np.asarray(c) >> np.uint32(4 * byte)) & np.uint32(15)
                pick, sign = nibble & np.uint32(7), (nibble & np.uint32(8)) != 0
            value = (both >> (pick.astype(np.uint64) * np.uint64(8))) & np.uint64(255)
            value = np.where(sign, np.where(value & np.uint64(128), 255, 0), value)
            result |= value.astype(np.uint64) << np.uint64(8 * byte)
        return result.astype(np.uint32)

    return b.compute(permute, d)


@instruction(
    "popc",
    family="integer",
    section="Integer Arithmetic Instructions: popc",
    types="b32 b64",
    order="pure",
)
def popc(b: Binder) -> Step:
    """Number of bits set, u32."""
    d, x = b.dst(0, U32), b.src(1, b.type)
    return b.compute(lambda: np.bitwise_count(x).astype(np.uint32), d)


def bit_length(x: Any) -> Array:
    """Position of the highest set bit, plus one; 0 for 0. Unsigned of any width."""
    value = np.asarray(x).astype(np.uint64)
    length = np.zeros(value.shape, np.uint32)
    for step in (32, 16, 8, 4, 2, 1):
        big = value >= np.uint64(1) << np.uint64(step)
        length += big * np.uint32(step)
        value = np.where(big, value >> np.uint64(step), value)
    return (length + (value > 0)).astype(np.uint32)


@instruction(
    "clz",
    family="integer",
    section="Integer Arithmetic Instructions: clz",
    types="b32 b64",
    order="pure",
)
def clz(b: Binder) -> Step:
    """Number of leading zeros, u32."""
    d, x = b.dst(0, U32), b.src(1, b.type)
    return b.compute(lambda: np.uint32(8 * b.type.size) - bit_length(x), d)


@instruction(
    "bfind",
    family="integer",
    section="Integer Arithmetic Instructions: bfind",
    types="u32 u64 s32 s64",
    modifiers="shiftamt",
    order="pure",
)
def bfind(b: Binder) -> Step:
    """Position of the highest bit that is no sign; 0xFFFFFFFF for none."""
    d, x = b.dst(0, U32), b.src(1, b.type)
    unsigned = BITS[b.type.size]

    def find() -> Array:
        value = np.asarray(x)
        if b.type.kind == "s":
            value = np.where(value < 0, ~value, value)
        length = bit_length(value.astype(unsigned))
        position = length - np.uint32(1)
        if "shiftamt" in b.mods:
            position = np.where(length == 0, position, np.uint32(8 * b.type.size) - length)
        return position

    return b.compute(find, d)


@instruction(
    "brev",
    family="integer",
    section="Integer Arithmetic Instructions: brev",
    types="b32 b64",
    order="pure",
)
def brev(b: Binder) -> Step:
    """Bits in reverse order."""
    d, x = b.dst(0, b.type), b.src(1, b.type)
    width, kind = 8 * b.type.size, b.type.dtype

    def reverse() -> Array:
        value, shift = np.asarray(x), width // 2
        mask = (1 << width) - 1
        while shift:
            mask ^= (mask << shift) & ((1 << width) - 1)
            low = kind.type(mask)
            by = kind.type(shift)
            value = ((value >> by) & low) | ((value & low) << by)
            shift //= 2
        return value

    return b.compute(reverse, d)


@instruction(
    "bfe",
    family="integer",
    section="Integer Arithmetic Instructions: bfe",
    types="u32 u64 s32 s64",
    order="pure",
)
def bfe(b: Binder) -> Step:
    """c bits of a from position b; signed types extend the sign, past the end too."""
    d, x = b.dst(0, b.type), b.src(1, b.type)
    start, count = b.src(2, U32), b.src(3, U32)
    width = 8 * b.type.size

    def extract() -> Array:
        position = (np.asarray(start) & np.uint32(255)).astype(np.int64)
        length = (np.asarray(count) & np.uint32(255)).astype(np.int64)
        unsigned = BITS[b.type.size]
        value = np.asarray(x)
        # The ISA takes the sign from the last bit inside the register.
        last = np.minimum(position + length - 1, width - 1)
        inside = np.clip(width - position, 0, length)
        moved = value.view(unsigned) >> np.minimum(position, width - 1).astype(unsigned)
        ones = np.where(
            inside >= width,
            unsigned.type((1 << width) - 1),
            (unsigned.type(1) << np.minimum(inside, width - 1).astype(unsigned)) - unsigned.type(1),
        )
        field = moved & ones
        if b.type.kind == "s":
            negative = (value.view(unsigned) >> np.maximum(last, 0).astype(unsigned)) & 1
            field = np.where((negative != 0) & (length > 0), field | ~ones, field)
        return np.asarray(field, unsigned).view(b.type.dtype)

    return b.compute(extract, d)


@instruction(
    "bfi",
    family="integer",
    section="Integer Arithmetic Instructions: bfi",
    types="b32 b64",
    order="pure",
)
def bfi(b: Binder) -> Step:
    """b with d bits from position c replaced by the low bits of a."""
    d, x, y = b.dst(0, b.type), b.src(1, b.type), b.src(2, b.type)
    start, count = b.src(3, U32), b.src(4, U32)
    width, kind = 8 * b.type.size, b.type.dtype

    def insert() -> Array:
        position = (np.asarray(start) & np.uint32(255)).astype(np.int64)
        length = np.minimum(np.asarray(count) & np.uint32(255), width).astype(np.int64)
        ones = np.where(
            length >= width,
            kind.type((1 << width) - 1),
            (kind.type(1) << np.minimum(length, width - 1).astype(kind)) - kind.type(1),
        )
        by = np.minimum(position, width - 1).astype(kind)
        mask = np.where(position >= width, kind.type(0), ones << by)
        return np.asarray((y & ~mask) | ((x << by) & mask), kind)

    return b.compute(insert, d)


@instruction(
    "bmsk",
    family="integer",
    section="Integer Arithmetic Instructions: bmsk",
    types="b32",
    modifiers="clamp wrap",
    order="pure",
)
def bmsk(b: Binder) -> Step:
    """b ones from position a."""
    d, start, count = b.dst(0, B32), b.src(1, U32), b.src(2, U32)

    def mask() -> Array:
        position, length = (np.asarray(v).astype(np.uint64) for v in (start, count))
        if "wrap" in b.mods:
            position, length = position & np.uint64(31), length & np.uint64(31)
        position, length = np.minimum(position, 32), np.minimum(length, 32)
        one = np.uint64(1)
        return (((one << length) - one) << position).astype(np.uint32)

    return b.compute(mask, d)
