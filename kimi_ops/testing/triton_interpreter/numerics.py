"""Number formats that numpy lacks: bf16, fp8 and TF32, and what a value nobody set looks like.

A bf16 array is held as its bit patterns in uint16 and an fp8 array as uint8, as Triton's
interpreter holds them; arithmetic on them goes through `widen` and `narrow`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import triton.language as tl

from kimi_ops.testing.triton_interpreter.faults import UnsupportedByInterpreter

Array = np.ndarray[Any, Any]

_FP8_MANTISSA_BITS = {tl.float8e4nv: 3, tl.float8e5: 2}


def bf16_to_f32(bits: Array) -> Array:
    """The float32 values of bf16 bit patterns (uint16), exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: Array) -> Array:
    """float32 to bf16 bit patterns, to nearest even; every NaN becomes the quiet 0x7FFF.

    Source: PTX ISA, "cvt": ``.rn``, and the canonical NaN of bf16.
    """
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    result = (rounded >> np.uint32(16)).astype(np.uint16).reshape(np.shape(x))
    return np.where(np.isnan(x), np.uint16(0x7FFF), result)


def f64_to_bf16(x: Array) -> Array:
    """float64 to bf16 bit patterns with one rounding.

    Through float32 rounded to odd, which keeps what the second rounding must know.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        near = x.astype(np.float32)
        too_far = np.abs(near.astype(np.float64)) > np.abs(x)
    cut = np.where(too_far, np.nextafter(near, np.float32(0)), near)
    inexact = np.isfinite(x) & (cut.astype(np.float64) != x)
    odd = np.ascontiguousarray(cut).view(np.uint32) | inexact.astype(np.uint32)
    return f32_to_bf16(odd.view(np.float32).reshape(np.shape(x)))


def truncate_to_bf16(x: Array) -> Array:
    """float32 to bf16 bit patterns, towards zero."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).reshape(np.shape(x))
    return np.where(np.isnan(x), np.uint16(0x7FFF), (bits >> np.uint32(16)).astype(np.uint16))


def truncate_to_tf32(x: Array) -> Array:
    """float32 without the 13 low mantissa bits; NaN and inf unchanged.

    What a TF32 ``mma.sync`` or ``wgmma`` makes of a float32 operand: Triton 3.7.1 hands it over as
    it is, without a ``cvt.rna.tf32``, for sm_80, sm_90 and sm_120, and the tensor core reads 19
    bits. Source: PTX ISA, "mma" (``.tf32`` operands are 32-bit registers).
    """
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), bits.view(np.float32).reshape(np.shape(x)), x)


@lru_cache
def _fp8_values(dtype: Any) -> Array:
    """The value of each of the 256 bit patterns, float32."""
    mantissa = _FP8_MANTISSA_BITS[dtype]
    bits = np.arange(256)
    exponent = (bits & 0x7F) >> mantissa
    fraction = (bits & ((1 << mantissa) - 1)) / (1 << mantissa)
    bias = 7 if dtype == tl.float8e4nv else 15
    scale = np.exp2(np.maximum(exponent, 1).astype(np.float64) - bias)
    value = np.where(exponent > 0, 1 + fraction, fraction) * scale
    if dtype == tl.float8e4nv:
        value[(bits & 0x7F) == 0x7F] = np.nan
    else:
        value[(bits & 0x7F) == 0x7C] = np.inf
        value[(bits & 0x7F) > 0x7C] = np.nan
    result: Array = np.where(bits & 0x80, -value, value).astype(np.float32)
    return result


def f32_to_fp8(x: Array, dtype: Any) -> Array:
    """float32 to fp8 bit patterns, to nearest even, saturating; NaN becomes 0x7F.

    Source: PTX ISA, "cvt", ``cvt.rn.satfinite.e4m3x2.f32`` and ``.e5m2x2``.
    """
    positive = _fp8_values(dtype)[:0x80].astype(np.float64)
    positive = positive[np.isfinite(positive)]
    size = np.minimum(np.abs(np.where(np.isnan(x), 0, x)).astype(np.float64), positive[-1])
    above = np.searchsorted(positive, size).clip(1)
    middle = (positive[above - 1] + positive[above]) / 2
    up = (size > middle) | ((size == middle) & (above % 2 == 0))
    code = np.where(up, above, above - 1)
    code = np.where(np.isnan(x), 0x7F, code | np.where(np.signbit(x), 0x80, 0))
    return code.astype(np.uint8)


def widen(data: Array, dtype: Any) -> Array:
    """The values of a handle's data, in a numpy type that can calculate.

    Args:
        data: as the handle holds it.
        dtype: its scalar Triton type.

    Raises:
        UnsupportedByInterpreter: an fp8 format other than e4nv and e5.
    """
    if dtype == tl.bfloat16:
        return bf16_to_f32(data)
    if dtype.is_fp8():
        _require_known_fp8(dtype)
        return _fp8_values(dtype)[data]
    return data


def narrow(values: Array, dtype: Any, toward_zero: bool = False) -> Array:
    """Floating-point or integer values as a handle of floating type `dtype` holds them.

    Rounds once, to nearest even (or towards zero, for bf16 alone); overflow gives infinity,
    in fp8 the largest finite value.

    Raises:
        UnsupportedByInterpreter: an fp8 format other than e4nv and e5, or a rounding towards
            zero to anything but bf16.
    """
    if toward_zero and dtype != tl.bfloat16:
        raise UnsupportedByInterpreter(f"a conversion to {dtype} that rounds towards zero")
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == tl.bfloat16:
            if toward_zero:
                return truncate_to_bf16(values.astype(np.float32))
            exact = values.dtype in (np.float32, np.float16)
            return f32_to_bf16(values) if exact else f64_to_bf16(values.astype(np.float64))
        if dtype.is_fp8():
            _require_known_fp8(dtype)
            return f32_to_fp8(values.astype(np.float32), dtype)
        types = {tl.float16: np.float16, tl.float32: np.float32, tl.float64: np.float64}
        return values.astype(types[dtype], copy=False)


def _require_known_fp8(dtype: Any) -> None:
    if dtype not in _FP8_MANTISSA_BITS:
        raise UnsupportedByInterpreter(f"the number format {dtype}")


def float_to_int(values: Array, target: np.dtype[Any]) -> Array:
    """Towards zero, saturating at 32 (or 64) bits, NaN to 0; narrower targets keep low bits.

    Source: PTX ISA, "cvt", ``cvt.rzi``. LLVM calls values out of range undefined.
    """
    wide = np.dtype(f"{target.kind}{max(4, target.itemsize)}")
    limits = np.iinfo(wide)
    truncated = np.trunc(values.astype(np.float64))
    # 2**63 - 1 is no float64: compare with the first value that does not fit instead.
    low, high = truncated <= float(limits.min), truncated >= float(limits.max)
    inside = np.where(low | high | np.isnan(truncated), 0, truncated).astype(wide)
    result = np.where(high, limits.max, np.where(low, limits.min, inside)).astype(wide)
    return result.astype(target)


def poison(shape: tuple[int, ...], dtype: Any, storage: np.dtype[Any]) -> Array:
    """What an element that nobody set holds: NaN, or the byte 0x5A repeated.

    Args:
        shape: of the result.
        dtype: scalar Triton type.
        storage: numpy type in which a handle holds it.
    """
    if storage == np.bool_:
        return np.ones(shape, np.bool_)
    if dtype == tl.bfloat16:
        return np.full(shape, 0x7FFF, np.uint16)
    if dtype.is_fp8():
        return np.full(shape, 0x7F, np.uint8)
    if storage.kind == "f":
        return np.full(shape, np.nan, storage)
    raw = np.full((*shape, storage.itemsize), 0x5A, np.uint8)
    return raw.view(storage).reshape(shape)
