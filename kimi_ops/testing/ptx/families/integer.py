"""Integer arithmetic of one width.

Results wrap; ``.sat`` clamps. Source: PTX ISA,
"Integer Arithmetic Instructions", "Extended-Precision Integer Arithmetic Instructions",
"Logic and Shift Instructions".
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kimi_ops.testing.ptx.binding import Active, Binder, Step
from kimi_ops.testing.ptx.errors import DivisionByZero
from kimi_ops.testing.ptx.registry import BIT_TYPES, INTEGERS, instruction
from kimi_ops.testing.ptx.types import BITS, Array


def _saturated(sign: int) -> Any:
    def add(x: Any, y: Any) -> Array:
        wide = np.asarray(x).astype(np.int64) + sign * np.asarray(y).astype(np.int64)
        return np.clip(wide, -(1 << 31), (1 << 31) - 1).astype(np.int32)

    return add


@instruction(
    "add",
    family="integer",
    section="Integer Arithmetic Instructions: add",
    types=INTEGERS,
    modifiers="sat",
    order="pure",
)
def add(b: Binder) -> Step:
    """a + b; ``.sat`` for s32."""
    d, x, y = b.dst(0, b.type), b.src(1, b.type), b.src(2, b.type)
    if "sat" in b.mods:
        if b.type.name != "s32":
            raise b.unsupported(".sat of other than s32")
        return b.compute(_saturated(1), d, x, y)
    return b.ufunc(np.add, d, x, y)


@instruction(
    "sub",
    family="integer",
    section="Integer Arithmetic Instructions: sub",
    types=INTEGERS,
    modifiers="sat",
    order="pure",
)
def sub(b: Binder) -> Step:
    """a - b; ``.sat`` for s32."""
    d, x, y = b.dst(0, b.type), b.src(1, b.type), b.src(2, b.type)
    if "sat" in b.mods:
        if b.type.name != "s32":
            raise b.unsupported(".sat of other than s32")
        return b.compute(_saturated(-1), d, x, y)
    return b.ufunc(np.subtract, d, x, y)


@instruction(
    "mul.lo",
    family="integer",
    section="Integer Arithmetic Instructions: mul",
    types=INTEGERS,
    order="pure",
)
def mul_lo(b: Binder) -> Step:
    """Low half of a * b."""
    return b.ufunc(np.multiply, b.dst(0, b.type), b.src(1, b.type), b.src(2, b.type))


@instruction(
    "mad.lo",
    family="integer",
    section="Integer Arithmetic Instructions: mad",
    types=INTEGERS,
    order="pure",
)
def mad_lo(b: Binder) -> Step:
    """Low half of a * b, plus c."""
    d, x, y, z = (b.dst(0, b.type), *(b.src(i, b.type) for i in (1, 2, 3)))
    return b.compute(lambda: x * y + z, d)


@instruction(
    "sad",
    family="integer",
    section="Integer Arithmetic Instructions: sad",
    types=INTEGERS,
    order="pure",
)
def sad(b: Binder) -> Step:
    """|a - b| + c."""
    d, x, y, z = (b.dst(0, b.type), *(b.src(i, b.type) for i in (1, 2, 3)))
    return b.compute(lambda: np.where(x < y, y - x, x - y) + z, d)


def quotient(x: Any, y: Any) -> Array:
    """x / y towards zero, wrapping; y is not 0."""
    q: Array = np.asarray(x // y)
    if q.dtype.kind == "u":
        return q
    # numpy rounds down; one up where the division leaves a rest and the signs differ.
    return np.asarray(q + ((q * y != x) & ((x < 0) != (y < 0))))


@instruction(
    "div rem", family="integer", section="Integer Arithmetic Instructions: div, rem", types=INTEGERS
)
def div(b: Binder) -> Step:
    """a / b or its remainder, towards zero; a divisor of 0 is an error."""
    d, x, y = b.dst(0, b.type), b.src(1, b.type), b.src(2, b.type)
    rest = b.entry.opcode == "rem"

    def step(active: Active) -> None:
        zero = active.mask & (np.asarray(y) == 0)
        if zero.any():
            raise b.site.fail(DivisionByZero, "integer division by zero", int(zero.argmax()))
        divisor = np.where(np.asarray(y) == 0, y.dtype.type(1), y)
        q = quotient(x, divisor)
        value = x - q * divisor if rest else q
        np.copyto(d, value, where=active.mask)

    return step


@instruction(
    "abs",
    family="integer",
    section="Integer Arithmetic Instructions: abs",
    types="s16 s32 s64",
    order="pure",
)
def absolute(b: Binder) -> Step:
    """|a|; the most negative number stays."""
    return b.ufunc(np.absolute, b.dst(0, b.type), b.src(1, b.type))


@instruction(
    "neg",
    family="integer",
    section="Integer Arithmetic Instructions: neg",
    types="s16 s32 s64",
    order="pure",
)
def neg(b: Binder) -> Step:
    """-a."""
    return b.ufunc(np.negative, b.dst(0, b.type), b.src(1, b.type))


@instruction(
    "min",
    family="integer",
    section="Integer Arithmetic Instructions: min",
    types=INTEGERS,
    modifiers="relu",
    order="pure",
)
def minimum(b: Binder) -> Step:
    """Smaller of a and b; ``.relu`` (s32) not below 0."""
    d, x, y = b.dst(0, b.type), b.src(1, b.type), b.src(2, b.type)
    if "relu" in b.mods:
        return b.compute(lambda: np.maximum(np.minimum(x, y), 0), d)
    return b.ufunc(np.minimum, d, x, y)


@instruction(
    "max",
    family="integer",
    section="Integer Arithmetic Instructions: max",
    types=INTEGERS,
    modifiers="relu",
    order="pure",
)
def maximum(b: Binder) -> Step:
    """Larger of a and b; ``.relu`` (s32) not below 0."""
    d, x, y = b.dst(0, b.type), b.src(1, b.type), b.src(2, b.type)
    if "relu" in b.mods:
        return b.compute(lambda: np.maximum(np.maximum(x, y), 0), d)
    return b.ufunc(np.maximum, d, x, y)


# Logic


@instruction(
    "and",
    family="integer",
    section="Logic and Shift Instructions: and",
    types=f"{BIT_TYPES} pred",
    order="pure",
)
def bit_and(b: Binder) -> Step:
    """a & b."""
    return _logic(b, np.bitwise_and)


@instruction(
    "or",
    family="integer",
    section="Logic and Shift Instructions: or",
    types=f"{BIT_TYPES} pred",
    order="pure",
)
def bit_or(b: Binder) -> Step:
    """a | b."""
    return _logic(b, np.bitwise_or)


@instruction(
    "xor",
    family="integer",
    section="Logic and Shift Instructions: xor",
    types=f"{BIT_TYPES} pred",
    order="pure",
)
def bit_xor(b: Binder) -> Step:
    """a ^ b."""
    return _logic(b, np.bitwise_xor)


def _logic(b: Binder, function: Any) -> Step:
    d = b.dst(0, b.type)
    if b.type.kind == "p":
        p, q = b.predicate(1), b.predicate(2)
        return b.compute(lambda: function(p(), q()), d)
    return b.ufunc(function, d, b.src(1, b.type), b.src(2, b.type))


@instruction(
    "not",
    family="integer",
    section="Logic and Shift Instructions: not",
    types=f"{BIT_TYPES} pred",
    order="pure",
)
def bit_not(b: Binder) -> Step:
    """~a."""
    return b.ufunc(np.invert, b.dst(0, b.type), b.src(1, b.type))


@instruction(
    "cnot",
    family="integer",
    section="Logic and Shift Instructions: cnot",
    types=BIT_TYPES,
    order="pure",
)
def cnot(b: Binder) -> Step:
    """1 if a is 0, else 0."""
    d, x = b.dst(0, b.type), b.src(1, b.type)
    return b.compute(lambda: (np.asarray(x) == 0).astype(BITS[b.type.size]), d)


# Carries


def _carried(b: Binder, addend: Any, *, subtract: bool, use: bool) -> Step:
    """d = a +- b with the carry flag, computed in parts that numpy can hold."""
    unsigned = BITS[b.type.size]
    d = b.dst(0, b.type).view(unsigned)
    cc = b.machine.carry
    keep = "cc" in b.ins.parts

    def step(active: Active) -> None:
        x, y = (np.asarray(v).view(unsigned) for v in addend())
        carry = cc.astype(unsigned) if use else unsigned.type(0)
        if subtract:
            value = x - y - carry
            out = (x < y) | ((x == y) & (carry != 0))
        else:
            value = x + y + carry
            out = (value < x) | ((value == x) & (carry != 0))
        np.copyto(d, value, where=active.mask)
        if keep:
            np.copyto(cc, out, where=active.mask)

    return step


@instruction(
    "add.cc addc addc.cc",
    family="integer",
    section="Extended-Precision Integer Arithmetic Instructions: add.cc, addc",
    types="u32 s32 u64 s64",
)
def add_carry(b: Binder) -> Step:
    """a + b (+ carry), carry out with ``.cc``."""
    x, y = b.src(1, b.type), b.src(2, b.type)
    return _carried(b, lambda: (x, y), subtract=False, use=b.entry.opcode.startswith("addc"))


@instruction(
    "sub.cc subc subc.cc",
    family="integer",
    section="Extended-Precision Integer Arithmetic Instructions: sub.cc, subc",
    types="u32 s32 u64 s64",
)
def sub_carry(b: Binder) -> Step:
    """a - b (- borrow), borrow out with ``.cc``."""
    x, y = b.src(1, b.type), b.src(2, b.type)
    return _carried(b, lambda: (x, y), subtract=True, use=b.entry.opcode.startswith("subc"))


@instruction(
    "mad.lo.cc mad.hi.cc madc.lo madc.hi madc.lo.cc madc.hi.cc",
    family="integer",
    section="Extended-Precision Integer Arithmetic Instructions: mad.cc, madc",
    types="u32 s32 u64 s64",
)
def mad_carry(b: Binder) -> Step:
    """One half of a * b, plus c (+ carry), carry out with ``.cc``."""
    from kimi_ops.testing.ptx.families.integer_wide import high_half

    x, y, z = (b.src(i, b.type) for i in (1, 2, 3))
    half = high_half if ".hi" in b.entry.opcode else np.multiply
    return _carried(
        b, lambda: (half(x, y), z), subtract=False, use=b.entry.opcode.startswith("madc")
    )
