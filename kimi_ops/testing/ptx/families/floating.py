"""Floating-point arithmetic: f32, f64, f16, bf16, and their packed pairs.

Operations that PTX calls approximate give the correctly rounded result here; hardware may be off by
the error that the ISA states for them. Source: PTX ISA,
"Floating Point Instructions", "Half Precision Floating Point Instructions", "Mixed Precision
Floating Point Instructions".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kimi_ops.testing.ptx import rounding
from kimi_ops.testing.ptx.binding import Binder, Step
from kimi_ops.testing.ptx.registry import instruction
from kimi_ops.testing.ptx.types import TYPES, Array, ScalarType

F32 = TYPES["f32"]
HALVES = "f16 bf16 f16x2 bf16x2"
_PARTS = {"f16x2": TYPES["f16"], "bf16x2": TYPES["bf16"], "f32x2": F32}


def _mode(b: Binder) -> str:
    return next((m for m in rounding.MODES if m in b.mods), "rn")


def _clamped(x: Array) -> Array:
    """``.sat``: into [0, 1], NaN to +0."""
    x = np.where(np.isnan(x), np.zeros((), x.dtype), x)
    return np.where(x <= 0, np.zeros((), x.dtype), np.minimum(x, np.ones((), x.dtype)))


def _split(b: Binder, operand: int, scalar: ScalarType) -> tuple[Any, ScalarType]:
    """A source, packed pairs as [..., lanes or 1, 2]; and the type of its elements."""
    source = b.src(operand, scalar)
    part = _PARTS.get(scalar.name)
    if part is None:
        return source, scalar
    held = np.atleast_1d(source)
    return held.view(part.dtype).reshape(*held.shape, 2), part


def _joined(values: Array, scalar: ScalarType) -> Array:
    """The inverse of `_split` for a result."""
    if scalar.name not in _PARTS:
        return values
    return np.ascontiguousarray(values).view(scalar.dtype)[..., 0]


def elementwise(b: Binder, count: int, function: Callable[..., Any]) -> Step:
    """A step from a function of float64 (f64) or exact float64 (others) values.

    The function's result is rounded once; it must be exact or rounded to odd for sums, products
    and fused products. Handles ``.ftz``, ``.sat``, ``.relu`` and the rounding mode.
    """
    scalar, kinds = b.types[0], [b.type] * count
    if len(b.types) == 2:
        # Mixed precision: the addend has the type of the result.
        if scalar.name != "f32" or b.type.name not in ("f16", "bf16"):
            raise b.unsupported(f"{b.type.name} operands of {scalar.name}")
        kinds[-1] = scalar
    d = b.dst(0, scalar)
    split = [_split(b, i + 1, kind) for i, kind in enumerate(kinds)]
    part = _PARTS.get(scalar.name, scalar)
    mode, ftz = _mode(b), "ftz" in b.mods

    def values() -> Array:
        inputs = []
        for source, kind in split:
            if part.name == "f64":
                inputs.append(np.asarray(source))
                continue
            single = rounding.decode(source, kind)
            if ftz:
                single = rounding.flush(single)
            inputs.append(single.astype(np.float64))
        out = np.asarray(function(*inputs))
        if "sat" in b.mods:
            out = _clamped(out)
        if "relu" in b.mods:
            out = np.where(np.isnan(out), out, np.maximum(out, 0.0))
        if part.name == "f64":
            return out
        coded = rounding.encode(out, part, mode)
        if ftz and part.name == "f32":
            coded = rounding.flush(coded)
        return _joined(coded, scalar)

    return b.compute(values, d)


def _plain_f32(b: Binder) -> bool:
    return [t.name for t in b.types] == ["f32"] and not b.mods - {"rn"}


def _native(b: Binder, count: int, function: Callable[..., Any]) -> Step:
    """A step from a numpy function that rounds float32 or float64 as PTX does."""
    sources = [b.src(i + 1, b.type) for i in range(count)]
    return b.compute(lambda: rounding.canonical(np.asarray(function(*sources))), b.dst(0, b.type))


def _binary(b: Binder, native: Callable[..., Any], exact: Callable[..., Any]) -> Step:
    if _plain_f32(b) or b.type.name == "f64":
        if b.type.name == "f64" and _mode(b) != "rn":
            raise b.unsupported(f"rounding {_mode(b)} of f64")
        return _native(b, 2, native)
    return elementwise(b, 2, exact)


_ARITHMETIC = "rn rz rm rp ftz sat"


@instruction(
    "add",
    family="float",
    section="Floating Point Instructions: add",
    types=f"f32 f64 f32x2 {HALVES}",
    modifiers=_ARITHMETIC,
    order="pure",
)
def add(b: Binder) -> Step:
    """a + b."""
    return _binary(b, np.add, lambda x, y: rounding.odd_sum(x, y, _mode(b)))


@instruction(
    "sub",
    family="float",
    section="Floating Point Instructions: sub",
    types=f"f32 f64 f32x2 {HALVES}",
    modifiers=_ARITHMETIC,
    order="pure",
)
def sub(b: Binder) -> Step:
    """a - b."""
    return _binary(b, np.subtract, lambda x, y: rounding.odd_sum(x, -y, _mode(b)))


@instruction(
    "mul",
    family="float",
    section="Floating Point Instructions: mul",
    types=f"f32 f64 f32x2 {HALVES}",
    modifiers=_ARITHMETIC,
    order="pure",
)
def mul(b: Binder) -> Step:
    """a * b."""
    return _binary(b, np.multiply, np.multiply)


@instruction(
    "fma mad",
    family="float",
    section="Floating Point Instructions: fma, mad",
    types=f"f32 f64 f32x2 {HALVES}",
    modifiers=f"{_ARITHMETIC} relu",
    order="pure",
)
def fma(b: Binder) -> Step:
    """a * b + c, rounded once."""
    if b.type.name == "f64":
        if _mode(b) != "rn":
            raise b.unsupported(f"rounding {_mode(b)} of f64")
        return _native(b, 3, rounding.fma_f64)
    if _plain_f32(b):
        return _native(b, 3, rounding.fma_f32)
    return elementwise(b, 3, lambda x, y, z: rounding.odd_sum(x * y, z, _mode(b)))


def _odd_ratio(x: Array, y: Array) -> Array:
    """x / y of float32 values in float64, rounded to odd by the sign of the rest."""
    q = np.asarray(x / y)
    finite = np.isfinite(q)
    # q * y needs up to 77 bits: split q so that both products are exact.
    high = q.astype(np.float32).astype(np.float64)
    rest = (x - high * y) - (q - high) * y
    bits = q.view(np.int64)
    even = finite & (rest != 0) & np.isfinite(rest) & ((bits & 1) == 0)
    towards = np.where(((rest > 0) == (y > 0)) == (q > 0), 1, -1)
    return np.where(even, (bits + towards).view(np.float64), q)


@instruction(
    "div",
    family="float",
    section="Floating Point Instructions: div",
    types="f32 f64",
    modifiers="approx full rn rz rm rp ftz",
    order="pure",
)
def div(b: Binder) -> Step:
    """a / b; ``.approx`` and ``.full`` correctly rounded."""
    if b.type.name == "f64" or (b.type.name == "f32" and b.mods <= {"rn", "full", "approx"}):
        if _mode(b) != "rn":
            raise b.unsupported(f"rounding {_mode(b)} of f64")
        return _native(b, 2, np.divide)
    return elementwise(b, 2, _odd_ratio)


@instruction(
    "abs",
    family="float",
    section="Floating Point Instructions: abs",
    types=f"f32 f64 {HALVES}",
    modifiers="ftz",
    order="pure",
)
def absolute(b: Binder) -> Step:
    """|a|."""
    return _signs(b, lambda x, sign: x & ~sign)


@instruction(
    "neg",
    family="float",
    section="Floating Point Instructions: neg",
    types=f"f32 f64 f32x2 {HALVES}",
    modifiers="ftz",
    order="pure",
)
def neg(b: Binder) -> Step:
    """-a."""
    return _signs(b, lambda x, sign: x ^ sign)


def _signs(b: Binder, function: Callable[[Any, Any], Any]) -> Step:
    """A change of sign bits."""
    scalar = b.type
    d = b.dst(0, scalar)
    bits = np.dtype(f"u{scalar.size}")
    source = np.asarray(b.src(1, scalar)).view(bits)
    part = _PARTS.get(scalar.name, scalar)
    sign = sum(1 << (8 * part.size * (i + 1) - 1) for i in range(scalar.size // part.size))
    if "ftz" not in b.mods or part.name != "f32":
        # bf16 and f16 subnormals: .ftz of f16 keeps them here only where they are none.
        if "ftz" in b.mods:
            raise b.unsupported(".ftz of a half precision sign change")
        return b.compute(lambda: function(source, bits.type(sign)), d)
    return b.compute(lambda: rounding.flush(function(source, bits.type(sign)).view(np.float32)), d)


def _extreme(b: Binder, largest: bool) -> Step:
    scalar = b.type
    d = b.dst(0, scalar)
    count = len(b.ins.operands) - 1
    split = [_split(b, i + 1, scalar) for i in range(count)]
    part = split[0][1]
    nan, ftz = "NaN" in b.mods, "ftz" in b.mods

    def values() -> Array:
        inputs = [
            np.asarray(s) if part.name == "f64" else rounding.decode(s, part) for s, _ in split
        ]
        if ftz:
            inputs = [rounding.flush(x) for x in inputs]
        out = inputs[0]
        for other in inputs[1:]:
            if "xorsign" in b.mods:
                sign = np.signbit(out) ^ np.signbit(other)
                out = rounding.minimum(np.abs(out), np.abs(other), nan=nan, largest=largest)
                out = np.where(sign, -out, out)
            else:
                out = rounding.minimum(out, other, nan=nan, largest=largest)
        if part.name == "f64":
            return out
        return _joined(rounding.encode_f32(out, part), scalar)

    return b.compute(values, d)


_EXTREMES = "ftz NaN xorsign abs"


@instruction(
    "min",
    family="float",
    section="Floating Point Instructions: min",
    types=f"f32 f64 {HALVES}",
    modifiers=_EXTREMES,
    order="pure",
)
def minimum(b: Binder) -> Step:
    """Smallest of two or three; a NaN loses, or wins with ``.NaN``."""
    return _extreme(b, largest=False)


@instruction(
    "max",
    family="float",
    section="Floating Point Instructions: max",
    types=f"f32 f64 {HALVES}",
    modifiers=_EXTREMES,
    order="pure",
)
def maximum(b: Binder) -> Step:
    """Largest of two or three; a NaN loses, or wins with ``.NaN``."""
    return _extreme(b, largest=True)


_FUNCTIONS: dict[str, tuple[str, Callable[[Array], Array]]] = {
    "rcp": ("Floating Point Instructions: rcp", lambda x: _odd_ratio(np.ones_like(x), x)),
    "sqrt": ("Floating Point Instructions: sqrt", np.sqrt),
    "rsqrt": ("Floating Point Instructions: rsqrt", lambda x: 1.0 / np.sqrt(x)),
    "sin": ("Floating Point Instructions: sin", np.sin),
    "cos": ("Floating Point Instructions: cos", np.cos),
    "lg2": ("Floating Point Instructions: lg2", np.log2),
    "ex2": ("Floating Point Instructions: ex2", np.exp2),
    "tanh": ("Floating Point Instructions: tanh", np.tanh),
}


def _function(name: str, section: str, function: Callable[[Array], Array]) -> None:
    types = "f32 f64" if name in ("rcp", "sqrt", "rsqrt") else "f32"
    if name in ("ex2", "tanh"):
        types += f" {HALVES}"

    @instruction(
        name,
        family="float",
        section=section,
        types=types,
        modifiers="approx rn rz rm rp ftz",
        order="pure",
    )
    def build(b: Binder) -> Step:
        """The function of its name; ``.approx`` correctly rounded from float64."""
        if b.type.name == "f64" and ("approx" in b.mods or _mode(b) != "rn"):
            raise b.unsupported("approximate or directed f64")
        return elementwise(b, 1, function)


for _name, (_section, _numpy) in _FUNCTIONS.items():
    _function(_name, _section, _numpy)


@instruction(
    "copysign",
    family="float",
    section="Floating Point Instructions: copysign",
    types="f32 f64",
    order="pure",
)
def copysign(b: Binder) -> Step:
    """Magnitude of b, sign of a."""
    d, sign, value = b.dst(0, b.type), b.src(1, b.type), b.src(2, b.type)
    return b.ufunc(np.copysign, d, value, sign)


@instruction(
    "testp",
    family="float",
    section="Floating Point Instructions: testp",
    types="f32 f64",
    modifiers="finite infinite number notanumber normal subnormal",
    order="pure",
)
def testp(b: Binder) -> Step:
    """Whether a is of the named kind."""
    d, x = b.dst(0, TYPES["pred"]), b.src(1, b.type)
    tiny = np.finfo(b.type.dtype).smallest_normal
    tests: dict[str, Callable[[Any], Any]] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda v: ~np.isnan(v),
        "notanumber": np.isnan,
        "normal": lambda v: np.isfinite(v) & (np.abs(v) >= tiny),
        "subnormal": lambda v: (np.abs(v) < tiny) & (v != 0),
    }
    (test,) = b.mods
    return b.compute(lambda: tests[test](x), d)
