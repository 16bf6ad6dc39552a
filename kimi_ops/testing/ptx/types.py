"""Scalar types of PTX and their place in numpy, and the two float formats that numpy lacks.

Source: PTX ISA, "Fundamental Types", "Alternate Floating-Point Data Formats",
"Packed Data Types".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

# A numpy array. Not its generic type: registers are viewed as one dtype after another, which
# numpy's stubs cannot follow.
Array: TypeAlias = Any
WARP = 32


@dataclass(frozen=True)
class ScalarType:
    """One PTX type.

    Attributes:
        name: as PTX writes it, without the dot.
        size: bytes; 0 for a predicate, which has no place in memory.
        kind: "u" unsigned, "s" signed, "b" untyped bits, "f" float, "p" predicate, "x" two packed
            floats.
        dtype: how a register of this type is held; bf16, tf32, 8-bit floats and the packed types
            as bits.
    """

    name: str
    size: int
    kind: str
    dtype: np.dtype[Any]


def _type(name: str, size: int, kind: str, dtype: Any) -> ScalarType:
    return ScalarType(name, size, kind, np.dtype(dtype))


TYPES: dict[str, ScalarType] = {
    t.name: t
    for t in (
        _type("pred", 0, "p", np.bool_),
        *(_type(f"u{8 * n}", n, "u", f"u{n}") for n in (1, 2, 4, 8)),
        *(_type(f"s{8 * n}", n, "s", f"i{n}") for n in (1, 2, 4, 8)),
        *(_type(f"b{8 * n}", n, "b", f"u{n}") for n in (1, 2, 4, 8)),
        _type("f16", 2, "f", np.float16),
        _type("bf16", 2, "f", np.uint16),
        _type("tf32", 4, "f", np.uint32),
        _type("f32", 4, "f", np.float32),
        _type("f64", 8, "f", np.float64),
        _type("e4m3", 1, "f", np.uint8),
        _type("e5m2", 1, "f", np.uint8),
        _type("f16x2", 4, "x", np.uint32),
        _type("bf16x2", 4, "x", np.uint32),
        _type("f32x2", 8, "x", np.uint64),
        _type("e4m3x2", 2, "x", np.uint16),
        _type("e5m2x2", 2, "x", np.uint16),
    )
}
BITS: dict[int, np.dtype[Any]] = {n: np.dtype(f"u{n}") for n in (1, 2, 4, 8)}


def bf16_to_f32(bits: Array) -> Array:
    """Values of bfloat16 bit patterns: uint16 [...] -> float32 [...]; exact."""
    return np.asarray(bits, np.uint16).astype(np.uint32).__lshift__(16).view(np.float32)


def f32_to_bf16(values: Array) -> Array:
    """float32 [...] -> bfloat16 bits, uint16 [...], to nearest even; any NaN becomes 0x7FFF."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    # A NaN would carry into the sign; adding wraps at most there, and NaN is replaced below.
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(
        16
    )
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)
