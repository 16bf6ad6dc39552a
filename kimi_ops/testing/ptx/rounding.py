"""Floating-point arithmetic with the rounding PTX asks for.

Sums and products of values up to float32 are formed in float64 with round-to-odd: a result that is
not exact gets an odd last bit, so that rounding it again to any format of at most 51 bits, in any
direction, is the rounding of the exact value (Boldo and Melquiond, "Emulation of FMA and correctly
rounded sums: proved algorithms using rounding to odd", IEEE TC 2008).
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np

from kimi_ops.testing.ptx.types import Array, ScalarType, bf16_to_f32, f32_to_bf16

CANONICAL_NAN = np.uint32(0x7FFFFFFF).view(np.float32)
TINY = np.finfo(np.float32).smallest_normal
MODES = ("rn", "rz", "rm", "rp")
_LARGE = 2.0**500


def _exact_sum(x: Any, y: Any) -> tuple[Array, Array]:
    """x + y of float64 arrays, to nearest, and its error (Knuth, TAOCP 2, 4.2.2)."""
    s = np.asarray(x + y)
    part = s - x
    return s, (x - (s - part)) + (y - part)


def odd_sum(x: Any, y: Any, mode: str = "rn") -> Array:
    """x + y of float64 arrays, rounded to odd; a zero from unlike signs is -0 if rounding down."""
    s, error = _exact_sum(x, y)
    if mode == "rm":
        s = np.where((s == 0) & (np.signbit(x) | np.signbit(y)), -0.0, s)
    inexact = np.isfinite(s) & (error != 0)
    if inexact.any():
        bits = s.view(np.int64)
        even = inexact & ((bits & 1) == 0)
        # The neighbours of an even number are odd.
        towards = np.where((error > 0) == (s > 0), 1, -1)
        s = np.where(even, (bits + towards).view(np.float64), s)
    return s


def to_f32(x: Any, mode: str = "rn") -> Array:
    """float64 to float32; from round-to-odd results, one correct rounding."""
    x = np.asarray(x, np.float64)
    near = x.astype(np.float32)
    if mode == "rn":
        return near
    back = near.astype(np.float64)
    down, up = np.float32(-np.inf), np.float32(np.inf)
    if mode == "rz":
        wrong, to = np.abs(back) > np.abs(x), np.float32(0)
    elif mode == "rm":
        wrong, to = back > x, down
    else:
        wrong, to = back < x, up
    return np.where(wrong, np.nextafter(near, to), near)


def odd_f32(x: Any) -> Array:
    """float64 (rounded to odd) to float32, rounded to odd."""
    near = to_f32(x, "rz")
    inexact = np.isfinite(near) & (near.astype(np.float64) != x)
    bits = near.view(np.uint32) | inexact.astype(np.uint32)
    return bits.view(np.float32)


def flush(x: Any) -> Array:
    """Subnormal float32 become zeros of their sign."""
    x = np.asarray(x)
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def canonical(x: Array) -> Array:
    """Replaces NaN in place by the one NaN that PTX results have, 0x7FFFFFFF."""
    if x.dtype == np.float32 and x.size and np.isnan(x.min()):
        x = np.where(np.isnan(x), CANONICAL_NAN, x)
    return x


@cache
def _eight_bit_floats(name: str) -> Array:
    """The 256 values of e4m3 (no infinity, one NaN of each sign) or e5m2."""
    mantissa, bias = (3, 7) if name == "e4m3" else (2, 15)
    code = np.arange(128)
    exponent, fraction = code >> mantissa, code & ((1 << mantissa) - 1)
    scale = np.exp2(np.maximum(exponent, 1) - bias - mantissa)
    values = ((exponent > 0) * (1 << mantissa) + fraction) * scale
    if name == "e4m3":
        values[-1] = np.nan
    else:
        values[-4:] = [np.inf, np.nan, np.nan, np.nan]
    return np.concatenate([values, -values]).astype(np.float32)


def decode(bits: Any, scalar: ScalarType) -> Array:
    """What a register of type f16, bf16, f32, tf32, e4m3 or e5m2 holds, as float32 values."""
    if scalar.name == "bf16":
        return bf16_to_f32(bits)
    if scalar.size == 1:
        return _eight_bit_floats(scalar.name)[np.asarray(bits).view(np.uint8)]
    if scalar.name == "tf32":
        # The tensor cores do not look at the low 13 bits.
        return (np.asarray(bits, np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.asarray(bits).view(scalar.dtype).astype(np.float32)


def encode(values: Any, scalar: ScalarType, mode: str = "rn") -> Array:
    """float64 values (exact or rounded to odd) as f16, bf16 (bits) or f32.

    Raises:
        ValueError: another rounding than to nearest for f16 and bf16.
    """
    if scalar.name == "f32":
        return canonical(to_f32(values, mode))
    if mode == "rz" and scalar.name == "bf16":
        single = to_f32(values, "rz")
        cut = (single.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        return np.where(np.isnan(single), np.uint16(0x7FFF), cut)
    if mode == "rz":
        half = np.asarray(values, np.float64).astype(np.float16)
        wrong = np.abs(half.astype(np.float64)) > np.abs(values)
        half = np.where(wrong, np.nextafter(half, np.float16(0)), half)
        return _canonical_half(half)
    if mode != "rn":
        raise ValueError(f"rounding {mode} to {scalar.name}")
    if scalar.name == "bf16":
        return f32_to_bf16(odd_f32(values))
    return _canonical_half(np.asarray(values, np.float64).astype(np.float16))


def encode_f32(values: Any, scalar: ScalarType, mode: str = "rn") -> Array:
    """float32 values as f16, bf16 (bits) or f32: `encode` without the way through float64."""
    if mode != "rn":
        return encode(np.asarray(values, np.float64), scalar, mode)
    if scalar.name == "bf16":
        return f32_to_bf16(values)
    if scalar.name == "f16":
        return _canonical_half(np.asarray(values).astype(np.float16))
    return canonical(np.asarray(values))


def _canonical_half(x: Array) -> Array:
    return np.where(np.isnan(x), np.uint16(0x7FFF).view(np.float16), x)


def fma_f32(x: Any, y: Any, z: Any) -> Array:
    """x * y + z of float32, one rounding to nearest even."""
    product = np.multiply(x, y, dtype=np.float64)
    total = np.asarray(product + z)
    # Rounding twice differs from once only where the first result lies halfway between two float32
    # numbers, which for subnormals is at other bits.
    bits = total.view(np.uint64) & np.uint64(0x1FFFFFFF)
    delicate = (bits == np.uint64(0x10000000)) | ((np.abs(total) < 2 * TINY) & (total != 0))
    if delicate.any():
        total = np.where(delicate, odd_sum(product, np.asarray(z, np.float64)), total)
    return canonical(total.astype(np.float32))


def _halves(x: Array) -> tuple[Array, Array]:
    """float64 as a sum of two numbers of at most 26 bits (Veltkamp, Dekker)."""
    scaled = x * 134217729.0  # 2^27 + 1
    high = scaled - (scaled - x)
    return high, x - high


def _exact_product(x: Array, y: Array) -> tuple[Array, Array]:
    """x * y of float64 arrays, to nearest, and its error (Dekker 1971)."""
    product = x * y
    (x_high, x_low), (y_high, y_low) = _halves(x), _halves(y)
    error = ((x_high * y_high - product) + x_high * y_low + x_low * y_high) + x_low * y_low
    return product, error


def fma_f64(x: Any, y: Any, z: Any) -> Array:
    """x * y + z of float64, one rounding to nearest even (Boldo and Melquiond, as above)."""
    x, y, z = np.broadcast_arrays(x, y, z)
    out = np.asarray(x * y + z)
    # The rest, infinite, NaN or z, is right as it is.
    finite = np.isfinite(x) & np.isfinite(y) & np.isfinite(z) & (x != 0) & (y != 0)
    product, product_error = _exact_product(x, y)
    low, low_error = _exact_sum(z, product_error)
    high, high_error = _exact_sum(product, low)
    total = high + odd_sum(low_error, high_error)
    # Neither may a part overflow, nor the product's error, 2^106 below it, be no normal number.
    tame = (np.abs(x) < _LARGE) & (np.abs(y) < _LARGE) & (np.abs(z) < _LARGE)
    tame &= finite & (np.abs(product) > 1 / _LARGE)
    out = np.where(tame & (total != 0), total, out)  # a zero has the sign that it has
    for i in np.flatnonzero(finite & ~tame):
        exact = Fraction(float(x[i])) * Fraction(float(y[i])) + Fraction(float(z[i]))
        if exact:
            out[i] = _nearest(exact)
    return out


def _nearest(exact: Fraction) -> float:
    try:
        return exact.numerator / exact.denominator
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")


def minimum(x: Any, y: Any, *, nan: bool, largest: bool = False) -> Array:
    """min (or max) of float arrays: -0 below +0; a NaN loses, or wins with ``nan``."""
    x, y = np.broadcast_arrays(np.asarray(x), np.asarray(y))
    sign = np.signbit(x)
    tie = sign if not largest else ~sign
    less = (x > y) if largest else (x < y)
    out = np.where(less | ((x == y) & tie), x, y)
    if nan:
        out = np.where(np.isnan(x) | np.isnan(y), np.float32(np.nan), out)
    else:
        out = np.where(np.isnan(x), y, np.where(np.isnan(y), x, out))
    return canonical(np.asarray(out, x.dtype))
