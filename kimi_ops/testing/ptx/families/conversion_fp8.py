"""Conversions between pairs of 8-bit floats and f32 or pairs of f16.

A pair of e4m3 or e5m2 is a .b16, and what narrows to one always saturates: beyond the largest
finite number, infinities included, it becomes that number with its sign; any NaN becomes 0x7F,
and widened again the f16 NaN 0x7FFF. Source: PTX ISA, "Alternate Floating-Point Data Formats",
"Packed Floating Point Data Types", "Data Movement and Conversion Instructions: cvt".
"""

from __future__ import annotations

from functools import cache

import numpy as np

from kimi_ops.testing.ptx import rounding
from kimi_ops.testing.ptx.binding import Binder, Step
from kimi_ops.testing.ptx.registry import instruction
from kimi_ops.testing.ptx.types import TYPES, Array, ScalarType

_NAN, _SIGN = np.uint8(0x7F), np.uint8(0x80)
_SECTION = "Data Movement and Conversion Instructions: cvt"


@cache
def _limits(name: str) -> Array:
    """The least magnitude that rounds to each code above 0: float32 [number of finite codes - 1].

    The midpoint of two neighbours has one bit of mantissa more than they and is a float32. It
    belongs to the even one; where that is the lower, the upper begins at the next float32.
    """
    codes = np.arange(0x80, dtype=np.uint8)
    values = rounding.decode(codes, TYPES[name])
    values = values[np.isfinite(values)]
    middle = (values[:-1] + values[1:]) / np.float32(2)
    lower_is_even = np.arange(len(middle)) % 2 == 0
    return np.where(lower_is_even, np.nextafter(middle, np.float32(np.inf)), middle)


def _narrowed(value: Array, to: ScalarType, *, relu: bool) -> Array:
    """float32 values [...] as codes of e4m3 or e5m2, uint8 [...]: to nearest even, saturating."""
    index = np.searchsorted(_limits(to.name), np.abs(value), side="right")
    code: Array = np.asarray(index).astype(np.uint8)
    negative = np.signbit(value)
    code = np.where(negative, np.uint8(0) if relu else code | _SIGN, code)
    return np.where(np.isnan(value), _NAN, code)


def _part(b: Binder, pair: ScalarType) -> ScalarType:
    """The type of which ``pair`` holds two."""
    if pair.name not in ("e4m3x2", "e5m2x2"):
        raise b.unsupported("these types")
    return TYPES[pair.name.removesuffix("x2")]


def _require(b: Binder, modifiers: str) -> None:
    """Modifiers without which the conversion has no encoding."""
    missing = [m for m in modifiers.split() if m not in b.mods]
    if missing:
        raise b.unsupported(f"without .{' .'.join(missing)}")


@instruction(
    "cvt",
    family="conversion",
    section=_SECTION,
    types="e4m3x2 e5m2x2 f32",
    modifiers="rn satfinite relu",
    order="pure",
)
def singles_to_fp8(b: Binder) -> Step:
    """Two f32 to a pair of 8-bit floats: a to the upper half, b to the lower."""
    if len(b.types) != 2 or b.types[1].name != "f32":
        raise b.unsupported("these types")
    part = _part(b, b.types[0])
    _require(b, "rn satfinite")
    d, high, low = b.dst(0, b.types[0]), b.src(1, b.types[1]), b.src(2, b.types[1])
    relu = "relu" in b.mods

    def convert() -> Array:
        pair = np.empty((*b.shape, 2), np.uint8)
        pair[..., 0] = _narrowed(np.asarray(low), part, relu=relu)
        pair[..., 1] = _narrowed(np.asarray(high), part, relu=relu)
        return pair.view(np.uint16)[..., 0]

    return b.compute(convert, d)


@instruction(
    "cvt",
    family="conversion",
    section=_SECTION,
    types="e4m3x2 e5m2x2 f16x2",
    modifiers="rn satfinite relu",
    order="pure",
)
def halves_and_fp8(b: Binder) -> Step:
    """A pair of f16 to one of 8-bit floats or back, half by half; back is exact."""
    if len(b.types) != 2:
        raise b.unsupported("these types")
    to, source = b.types
    if to.name == "f16x2":
        return _to_halves(b, to, source)
    part = _part(b, to)
    if source.name != "f16x2":
        raise b.unsupported("these types")
    _require(b, "rn satfinite")
    d, x = b.dst(0, to), b.src(1, source)
    relu = "relu" in b.mods

    def convert() -> Array:
        held = np.ascontiguousarray(np.broadcast_to(x, b.shape))
        halves = held.view(np.float16).reshape(*b.shape, 2)
        codes = _narrowed(halves.astype(np.float32), part, relu=relu)
        return codes.view(np.uint16)[..., 0]

    return b.compute(convert, d)


def _to_halves(b: Binder, to: ScalarType, source: ScalarType) -> Step:
    part = _part(b, source)
    _require(b, "rn")
    if "satfinite" in b.mods:
        raise b.unsupported("satfinite to f16x2")
    d, x = b.dst(0, to), b.src(1, source)
    relu = "relu" in b.mods

    def convert() -> Array:
        held = np.ascontiguousarray(np.broadcast_to(x, b.shape))
        value = rounding.decode(held.view(np.uint8).reshape(*b.shape, 2), part)
        if relu:
            value = np.where(np.signbit(value) & ~np.isnan(value), np.float32(0), value)
        halves = np.ascontiguousarray(rounding.encode_f32(value, TYPES["f16"]))
        return halves.view(np.uint32)[..., 0]

    return b.compute(convert, d)
