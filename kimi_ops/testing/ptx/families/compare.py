"""Comparison and selection.

Source: PTX ISA, "Comparison and Selection Instructions",
"Half Precision Comparison Instructions", "Comparisons".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kimi_ops.testing.ptx import rounding
from kimi_ops.testing.ptx.binding import Active, Binder, Step, put
from kimi_ops.testing.ptx.registry import BIT_TYPES, INTEGERS, instruction
from kimi_ops.testing.ptx.types import TYPES, Array

PRED = TYPES["pred"]
_ORDERED: dict[str, Any] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_COMBINE: dict[str, Any] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
_OPERATORS = " ".join([*_ORDERED, *_UNSIGNED, *(f"{o}u" for o in _ORDERED), "num", "nan"])


def _compared(b: Binder, scalar: Any, first: int, second: int) -> Callable[[], Array]:
    operators = [m for m in b.mods if m in _OPERATORS.split()]
    if len(operators) != 1:
        raise b.unsupported("comparison without one operator")
    operator = operators[0]
    x, y = b.src(first, scalar), b.src(second, scalar)
    if scalar.kind != "f":
        if operator in _UNSIGNED and scalar.kind == "u":
            operator = _UNSIGNED[operator]
        if operator not in _ORDERED:
            raise b.unsupported(f"operator {operator} of {scalar.name}")
        return lambda: _ORDERED[operator](x, y)

    def floats() -> Array:
        u, v = x, y
        if scalar.name in ("f16", "bf16"):
            u, v = rounding.decode(u, scalar), rounding.decode(v, scalar)
        if "ftz" in b.mods:
            u, v = rounding.flush(u), rounding.flush(v)
        nan = np.isnan(u) | np.isnan(v)
        if operator in ("num", "nan"):
            return nan if operator == "nan" else ~nan
        if operator.endswith("u"):
            return _ORDERED[operator[:-1]](u, v) | nan
        return _ORDERED[operator](u, v) & ~nan

    if operator in _ORDERED and operator != "ne" and not b.mods & {"ftz"}:
        if scalar.name in ("f32", "f64"):
            return lambda: _ORDERED[operator](x, y)
        if scalar.name not in ("f16", "bf16"):
            raise b.unsupported(f"comparison of {scalar.name}")
    return floats


@instruction(
    "setp",
    family="integer",
    section="Comparison and Selection Instructions: setp",
    types=f"{BIT_TYPES} {INTEGERS} f32 f64 f16 bf16",
    modifiers=f"{_OPERATORS} and or xor ftz",
    order="pure",
)
def setp(b: Binder) -> Step:
    """p = (a op b) combined with c; q the same of the negated comparison."""
    compared = _compared(b, b.type, 1, 2)
    d, q = b.dst(0, PRED), b.second(0)
    combine = next((_COMBINE[m] for m in b.mods if m in _COMBINE), None)
    third = b.predicate(3) if combine is not None else None

    def step(active: Active) -> None:
        result = compared()
        other = ~result
        if combine is not None and third is not None:
            c = third()
            result, other = combine(result, c), combine(other, c)
        put(d, result, active)
        if q is not None:
            put(q, other, active)

    return step


@instruction(
    "set",
    family="integer",
    section="Comparison and Selection Instructions: set",
    types=f"{BIT_TYPES} {INTEGERS} f32 f64 f16 bf16",
    modifiers=f"{_OPERATORS} and or xor ftz",
    order="pure",
)
def set_value(b: Binder) -> Step:
    """All ones (1.0 for a float result) where a op b, combined with c; else 0."""
    result_type, scalar = b.types
    compared = _compared(b, scalar, 1, 2)
    d = b.dst(0, result_type)
    combine = next((_COMBINE[m] for m in b.mods if m in _COMBINE), None)
    third = b.predicate(3) if combine is not None else None
    if result_type.kind == "f" and result_type.name not in ("f32", "f16"):
        raise b.unsupported(f"result {result_type.name}")
    one = result_type.dtype.type(1 if result_type.kind == "f" else 0)
    if result_type.kind != "f":
        one = ~one

    def values() -> Array:
        result = compared()
        if combine is not None and third is not None:
            result = combine(result, third())
        return np.where(result, one, result_type.dtype.type(0))

    return b.compute(values, d)


@instruction(
    "selp",
    family="integer",
    section="Comparison and Selection Instructions: selp",
    types=f"{BIT_TYPES} {INTEGERS} f32 f64",
    order="pure",
)
def selp(b: Binder) -> Step:
    """a where c, else b."""
    d, x, y, p = b.dst(0, b.type), b.src(1, b.type), b.src(2, b.type), b.predicate(3)
    known_d, known_x, known_y, known_p = (b.flag(i) for i in range(4))
    if known_d is None:
        return b.compute(lambda: np.where(p(), x, y), d)
    # The value not taken may be unknown.
    b.tracks = True
    true = np.True_

    def step(active: Active) -> None:
        take = p()
        known = np.where(
            take, true if known_x is None else known_x, true if known_y is None else known_y
        )
        if known_p is not None:
            known = known & known_p
        put(d, np.where(take, x, y), active)
        np.copyto(known_d, known, where=active.mask)

    return step


@instruction(
    "slct",
    family="integer",
    section="Comparison and Selection Instructions: slct",
    types=f"{BIT_TYPES} {INTEGERS} f32 f64",
    order="pure",
)
def slct(b: Binder) -> Step:
    """a where c >= 0, else b."""
    d, x, y, c = (
        b.dst(0, b.types[0]),
        b.src(1, b.types[0]),
        b.src(2, b.types[0]),
        b.src(3, b.types[1]),
    )
    return b.compute(lambda: np.where(c >= 0, x, y), d)
