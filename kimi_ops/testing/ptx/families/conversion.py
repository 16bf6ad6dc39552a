"""Conversions between types.

Float to integer clamps to the range of the integer, NaN becomes 0. Source: PTX ISA,
"Data Movement and Conversion Instructions: cvt", "Type Information for Instructions and
Operands".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kimi_ops.testing.ptx import rounding
from kimi_ops.testing.ptx.binding import Binder, Step
from kimi_ops.testing.ptx.families.floating import _clamped
from kimi_ops.testing.ptx.registry import instruction
from kimi_ops.testing.ptx.types import TYPES, Array, ScalarType

_INTEGERS = "u8 s8 u16 s16 u32 s32 u64 s64"
_TO_INTEGER: dict[str, Callable[[Any], Any]] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}


def _mode(b: Binder, default: str = "rn") -> str:
    return next((m for m in (*rounding.MODES, "rna") if m in b.mods), default)


@instruction(
    "cvt",
    family="conversion",
    section="Data Movement and Conversion Instructions: cvt",
    types=_INTEGERS,
    modifiers="sat",
    order="pure",
)
def integer_to_integer(b: Binder) -> Step:
    """Integer to integer: extends, cuts, or with ``.sat`` clamps."""
    to, source = b.types
    d, x = b.dst(0, to, wide=True), b.src(1, source, wide=True)
    if "sat" not in b.mods:
        return b.compute(lambda: np.asarray(x).astype(to.dtype), d)
    low, high = np.iinfo(to.dtype).min, np.iinfo(to.dtype).max

    def clamp() -> Array:
        value = np.asarray(x)
        info = np.iinfo(source.dtype)
        return np.clip(value, max(low, info.min), min(high, info.max)).astype(to.dtype)

    return b.compute(clamp, d)


def _directed(value: Array, near: Array, mode: str) -> Array:
    """Repairs integer-to-float32 rounding ``near`` for a directed mode."""
    # The extended format of x86 holds every 64-bit integer.
    exact, back = value.astype(np.longdouble), near.astype(np.longdouble)
    if mode == "rz":
        wrong, to = np.abs(back) > np.abs(exact), 0.0
    elif mode == "rm":
        wrong, to = back > exact, -np.inf
    else:
        wrong, to = back < exact, np.inf
    return np.where(wrong, np.nextafter(near, near.dtype.type(to)), near)


@instruction(
    "cvt",
    family="conversion",
    section="Data Movement and Conversion Instructions: cvt",
    types=f"{_INTEGERS} f16 bf16 f32 f64",
    modifiers="rn rz rm rp rni rzi rmi rpi ftz sat relu",
    order="pure",
)
def cvt(b: Binder) -> Step:
    """Between integers and floats, and between floats."""
    to, source = b.types
    if to.kind == "f" and source.kind == "f":
        return _float_to_float(b, to, source)
    if to.kind == "f":
        return _integer_to_float(b, to, source)
    return _float_to_integer(b, to, source)


def _integer_to_float(b: Binder, to: ScalarType, source: ScalarType) -> Step:
    d, x = b.dst(0, to, wide=True), b.src(1, source, wide=True)
    mode = _mode(b)

    def convert() -> Array:
        value = np.asarray(x)
        if to.name == "f64" or to.name == "f32":
            out = value.astype(to.dtype)
            out = out if mode == "rn" else _directed(value, out, mode)
            return _clamped(out) if "sat" in b.mods else out
        # 64-bit integers beyond 53 bits overflow f16, and in bf16 need the sticky bit.
        double = value.astype(np.float64)
        if source.size == 8:
            double = _odd_integer(value)
        return rounding.encode(double, to, mode)

    return b.compute(convert, d)


def _odd_integer(value: Array) -> Array:
    """64-bit integers as float64, rounded to odd."""
    low = np.asarray(value & value.dtype.type(0xFFFF)).astype(np.float64)
    high = np.asarray(value - (value & value.dtype.type(0xFFFF))).astype(np.float64)
    return rounding.odd_sum(high, low)


def _float_to_integer(b: Binder, to: ScalarType, source: ScalarType) -> Step:
    d, x = b.dst(0, to, wide=True), b.src(1, source, wide=True)
    modes = [m for m in b.mods if m in _TO_INTEGER]
    if len(modes) != 1:
        raise b.unsupported("float to integer without a rounding mode")
    info = np.iinfo(to.dtype)

    def convert() -> Array:
        value = np.asarray(x) if source.name == "f64" else rounding.decode(x, source)
        if "ftz" in b.mods:
            value = rounding.flush(value)
        whole = np.atleast_1d(_TO_INTEGER[modes[0]](value.astype(np.float64)))
        whole = np.where(np.isnan(whole), 0.0, whole)
        # 2^63 and 2^64 are floats, the largest integers are not.
        above, below = whole >= float(info.max) + (to.size < 8), whole < float(info.min)
        inside = np.where(above | below, 0.0, whole).astype(to.dtype)
        return np.where(above, info.max, np.where(below, info.min, inside)).astype(to.dtype)

    return b.compute(convert, d)


def _float_to_float(b: Binder, to: ScalarType, source: ScalarType) -> Step:
    d, x = b.dst(0, to, wide=True), b.src(1, source, wide=True)
    whole = next((_TO_INTEGER[m] for m in b.mods if m in _TO_INTEGER), None)
    mode = _mode(b)
    if to.name in ("f16", "bf16") and mode not in ("rn", "rz"):
        raise b.unsupported(f"rounding {mode} to {to.name}")

    def convert() -> Array:
        value = np.asarray(x) if source.name == "f64" else rounding.decode(x, source)
        if "ftz" in b.mods and source.name != "f64":
            value = rounding.flush(value)
        if whole is not None:
            value = whole(value)
        if "sat" in b.mods:
            value = _clamped(value)
        if "relu" in b.mods:
            value = np.where(np.isnan(value), value, np.maximum(value, 0))
        if to.name == "f64":
            return value.astype(np.float64)
        encode = rounding.encode if source.name == "f64" else rounding.encode_f32
        out = encode(value, to, mode)
        if "ftz" in b.mods and to.name == "f32":
            out = rounding.flush(out)
        return out

    return b.compute(convert, d)


@instruction(
    "cvt",
    family="conversion",
    section="Data Movement and Conversion Instructions: cvt",
    types="f16x2 bf16x2 f32",
    modifiers="rn rz relu",
    order="pure",
)
def pack(b: Binder) -> Step:
    """Two f32 to a packed pair: a to the upper half, b to the lower."""
    if b.types[0].kind != "x" or b.types[1].name != "f32":
        raise b.unsupported("these types")
    part = TYPES["f16" if b.types[0].name == "f16x2" else "bf16"]
    d, high, low = b.dst(0, b.types[0]), b.src(1, b.types[1]), b.src(2, b.types[1])
    mode = _mode(b)

    def convert() -> Array:
        halves = np.empty((*b.shape, 2), np.uint16)
        for column, source in enumerate((low, high)):
            value = np.asarray(source)
            if "relu" in b.mods:
                value = np.where(np.isnan(value), value, np.maximum(value, 0))
            coded = rounding.encode_f32(value, part, mode)
            halves[..., column] = coded.view(np.uint16)
        return halves.view(np.uint32)[..., 0]

    return b.compute(convert, d)


@instruction(
    "cvt",
    family="conversion",
    section="Data Movement and Conversion Instructions: cvt",
    types="tf32 f32",
    modifiers="rn rna rz relu",
    order="pure",
)
def to_tf32(b: Binder) -> Step:
    """f32 to tf32: ten bits of mantissa; ``.rna`` ties away from zero."""
    if [t.name for t in b.types] != ["tf32", "f32"]:
        raise b.unsupported("these types")
    d, x = b.dst(0, TYPES["b32"]), b.src(1, b.types[1])
    mode = _mode(b)

    def convert() -> Array:
        value = np.asarray(x)
        if "relu" in b.mods:
            value = np.where(np.isnan(value), value, np.maximum(value, np.float32(0)))
        bits: Array = value.view(np.uint32)
        odd = (bits >> np.uint32(13)) & np.uint32(1)
        add = {"rna": np.uint32(0x1000), "rn": np.uint32(0xFFF) + odd, "rz": np.uint32(0)}[mode]
        out = (bits + add) & np.uint32(0xFFFFE000)
        special = ~np.isfinite(value)
        return np.where(special, np.where(np.isnan(value), np.uint32(0x7FFFFFFF), bits), out)

    return b.compute(convert, d)
