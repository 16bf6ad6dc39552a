"""Arithmetic, casts and matrix products of one program, as the GPU rounds them.

Overrides what Triton's own builder computes on bit patterns. Operations on 32-bit (or narrower)
signed integers also remember which elements overflowed: `machine.Machine` never sees a wrapped
value that was harmless, only an address made from one.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as stock

from kimi_ops.testing.triton_interpreter.faults import UnsupportedByInterpreter
from kimi_ops.testing.triton_interpreter.machine import Machine
from kimi_ops.testing.triton_interpreter.numerics import (
    Array,
    f32_to_bf16,
    float_to_int,
    narrow,
    truncate_to_tf32,
    widen,
)

Handle = Any  # triton.runtime.interpreter.TensorHandle
OVERFLOWED = "kimi_ops.overflowed"  # in Handle.attr: (mask, Place of the arithmetic)


def numpy_type(dtype: Any) -> np.dtype[Any]:
    """The numpy type in which a handle holds elements of a Triton type."""
    found: np.dtype[Any] = stock._get_np_dtype(dtype)
    return found


def handle(data: Array, dtype: Any, *sources: Handle) -> Handle:
    """A new handle; it inherits from `sources` which elements came from an overflow."""
    made = stock.TensorHandle(data, dtype)
    for source in sources:
        if OVERFLOWED in source.attr:
            mask, place = source.attr[OVERFLOWED]
            if OVERFLOWED in made.attr:
                mask = mask | made.attr[OVERFLOWED][0]
            made.attr[OVERFLOWED] = np.broadcast_to(mask, data.shape), place
    return made


def _float(op: Callable[..., Any]) -> Callable[..., Handle]:
    """An operation on floating-point handles of one type: calculated wide, rounded once."""

    def create(self: Arithmetic, *args: Handle) -> Handle:
        dtype = args[-1].dtype.scalar
        with np.errstate(all="ignore"):
            out = op(*(widen(arg.data, dtype) for arg in args))
        return handle(narrow(np.asarray(out), dtype), dtype)

    return create


def _compare(op: Callable[..., Any], nan: bool | None = None) -> Callable[..., Handle]:
    """A comparison; `nan` is its answer where an operand is NaN, None where numpy's is right."""

    def create(self: Arithmetic, lhs: Handle, rhs: Handle) -> Handle:
        a, b = widen(lhs.data, lhs.dtype.scalar), widen(rhs.data, rhs.dtype.scalar)
        out = np.asarray(op(a, b))
        if nan is not None:
            out = np.where(np.isnan(a) | np.isnan(b), nan, out)
        return handle(out, tl.int1)

    return create


def _integer(op: Callable[..., Any]) -> Callable[..., Handle]:
    """An operation on integer handles of one type, wrapping."""

    def create(self: Arithmetic, lhs: Handle, rhs: Handle) -> Handle:
        dtype = lhs.dtype.scalar
        with np.errstate(all="ignore"):
            out = np.asarray(op(lhs.data, rhs.data)).astype(numpy_type(dtype), copy=False)
        made = handle(out, dtype, lhs, rhs)
        if op in _CAN_OVERFLOW and out.dtype.kind == "i" and out.dtype.itemsize <= 4:
            exact = op(lhs.data.astype(np.int64), rhs.data.astype(np.int64))
            wrong = exact != out
            if wrong.any() and OVERFLOWED not in made.attr:
                made.attr[OVERFLOWED] = wrong, self.machine.place()
        return made

    return create


_CAN_OVERFLOW = (np.add, np.subtract, np.multiply)


def _unsigned(data: Array) -> Array:
    return data.view(f"u{data.itemsize}") if data.dtype.kind == "i" else data


def _signed(data: Array) -> Array:
    return data.view(f"i{data.itemsize}") if data.dtype.kind == "u" else data


def _divide(a: Array, b: Array) -> Array:
    """Integer quotient towards zero, as on the GPU."""
    result: Array = (a - np.fmod(a, b)) // b
    return result


def _high_half(a: Array, b: Array) -> Array:
    """High half of the unsigned product."""
    bits = a.itemsize * 8
    wide = _unsigned(a).astype(object) * _unsigned(b).astype(object)
    return np.asarray(wide >> bits).astype(f"u{a.itemsize}").view(a.dtype)


def _erf(x: Array) -> Array:
    result: Array = torch.erf(torch.from_numpy(np.ascontiguousarray(x))).numpy()
    return result.reshape(x.shape)


def _fma(x: Array, y: Array, z: Array) -> Array:
    # The product of two float32 is exact in float64; the second rounding is off in rare ties.
    return x.astype(np.float64) * y.astype(np.float64) + z.astype(np.float64)


def _clamp(x: Array, low: Array, high: Array) -> Array:
    return np.fmin(np.fmax(x, low), high)


def _clamp_propagating(x: Array, low: Array, high: Array) -> Array:
    return np.minimum(np.maximum(x, low), high)


def _matmul(x: Array, y: Array) -> Array:
    # torch's, because `execution` can keep it to one thread: numpy's threads wait for each other,
    # and on a busy machine that took 400 times as long for one tile.
    left, right = np.ascontiguousarray(x), np.ascontiguousarray(y)
    result: Array = torch.matmul(torch.from_numpy(left), torch.from_numpy(right)).numpy()
    return result


def _bf16_parts(x: Array, parts: int) -> list[Array]:
    """A float32 array as a sum of bf16 values, largest first."""
    found = []
    for _ in range(parts):
        part = widen(f32_to_bf16(x), tl.bfloat16)
        found.append(part)
        x = x - part
    return found


class Arithmetic(stock.InterpreterBuilder):  # type: ignore[misc]
    """The builder's arithmetic; `builder.Builder` adds memory and shapes."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine
        self.options = dataclasses.replace(
            stock.InterpreterOptions(),
            debug=True,  # tl.device_assert is evidence here, not a cost
            sanitize_overflow=False,  # ours reports overflows that reach an address
            allowed_dot_input_precisions=tuple(map(str.lower, ir.INPUT_PRECISION.__members__)),
        )
        self.codegen_fns["min_dot_size"] = self._min_dot_size

    @staticmethod
    def _min_dot_size(lhs: Any, rhs: Any) -> tuple[int, int, int]:
        # What the CUDA backend refuses at compile time must not pass here.
        return (1, 1, 32 if lhs.scalar.primitive_bitwidth == 8 else 16)

    create_fadd, create_fsub = _float(np.add), _float(np.subtract)
    create_fmul, create_fdiv = _float(np.multiply), _float(np.divide)
    create_precise_divf, create_frem = _float(np.divide), _float(np.fmod)
    create_minnumf, create_maxnumf = _float(np.fmin), _float(np.fmax)
    create_minimumf, create_maximumf = _float(np.minimum), _float(np.maximum)
    create_fneg, create_fabs = _float(np.negative), _float(np.abs)
    create_exp, create_exp2 = _float(np.exp), _float(np.exp2)
    create_log, create_log2 = _float(np.log), _float(np.log2)
    create_cos, create_sin = _float(np.cos), _float(np.sin)
    create_sqrt, create_precise_sqrt = _float(np.sqrt), _float(np.sqrt)
    create_rsqrt = _float(lambda x: 1 / np.sqrt(x))
    create_floor, create_ceil = _float(np.floor), _float(np.ceil)
    create_erf, create_fma = _float(_erf), _float(_fma)

    def create_clampf(self, x: Handle, low: Handle, high: Handle, propagate_nan: Any) -> Handle:
        """tl.clamp."""
        propagate = propagate_nan == ir.PROPAGATE_NAN.ALL
        return _float(_clamp_propagating if propagate else _clamp)(self, x, low, high)

    create_fcmpOLT, create_fcmpULT = _compare(np.less), _compare(np.less, True)  # noqa: N815
    create_fcmpOLE, create_fcmpULE = (  # noqa: N815
        _compare(np.less_equal),
        _compare(np.less_equal, True),
    )
    create_fcmpOGT, create_fcmpUGT = _compare(np.greater), _compare(np.greater, True)  # noqa: N815
    create_fcmpOGE, create_fcmpUGE = (  # noqa: N815
        _compare(np.greater_equal),
        _compare(np.greater_equal, True),
    )
    create_fcmpOEQ, create_fcmpUEQ = _compare(np.equal), _compare(np.equal, True)  # noqa: N815
    create_fcmpONE, create_fcmpUNE = (  # noqa: N815
        _compare(np.not_equal, False),
        _compare(np.not_equal),
    )
    create_icmpEQ, create_icmpNE = _compare(np.equal), _compare(np.not_equal)  # noqa: N815
    create_icmpSLT, create_icmpULT = _compare(np.less), _compare(np.less)  # noqa: N815
    create_icmpSLE, create_icmpULE = _compare(np.less_equal), _compare(np.less_equal)  # noqa: N815
    create_icmpSGT, create_icmpUGT = _compare(np.greater), _compare(np.greater)  # noqa: N815
    create_icmpSGE, create_icmpUGE = (  # noqa: N815
        _compare(np.greater_equal),
        _compare(np.greater_equal),
    )

    create_add, create_sub = _integer(np.add), _integer(np.subtract)
    create_mul = _integer(np.multiply)
    create_sdiv, create_udiv, create_idiv = (_integer(_divide) for _ in range(3))
    create_srem, create_urem = _integer(np.fmod), _integer(np.fmod)
    create_and, create_or = _integer(np.bitwise_and), _integer(np.bitwise_or)
    create_xor = _integer(np.bitwise_xor)
    create_minsi, create_minui = _integer(np.minimum), _integer(np.minimum)
    create_maxsi, create_maxui = _integer(np.maximum), _integer(np.maximum)
    create_shl = _integer(np.left_shift)
    create_umulhi = _integer(_high_half)

    def create_lshr(self, lhs: Handle, rhs: Handle) -> Handle:
        """Shift that fills with zeros, whatever the sign of the type."""
        out = np.right_shift(_unsigned(lhs.data), _unsigned(rhs.data))
        return handle(out.view(lhs.data.dtype), lhs.dtype.scalar, lhs, rhs)

    def create_ashr(self, lhs: Handle, rhs: Handle) -> Handle:
        """Shift that fills with the sign."""
        out = np.right_shift(_signed(lhs.data), _signed(rhs.data))
        return handle(out.view(lhs.data.dtype), lhs.dtype.scalar, lhs, rhs)

    def create_iabs(self, arg: Handle) -> Handle:
        """Magnitude; that of the lowest value wraps to itself."""
        return handle(np.abs(arg.data), arg.dtype.scalar, arg)

    def create_select(self, condition: Handle, lhs: Handle, rhs: Handle) -> Handle:
        """tl.where; an overflow in the branch not taken is forgotten."""
        chosen = condition.data
        made = handle(np.where(chosen, lhs.data, rhs.data), lhs.dtype.scalar)
        for source, taken in ((lhs, chosen), (rhs, ~chosen)):
            if OVERFLOWED in source.attr:
                mask, place = source.attr[OVERFLOWED]
                made.attr[OVERFLOWED] = np.broadcast_to(mask & taken, made.data.shape), place
        return made

    def create_bitcast(self, src: Handle, dst_type: Any) -> Handle:
        """The same bits as another type."""
        return handle(src.data.view(numpy_type(dst_type.scalar)), dst_type.scalar, src)

    create_int_to_ptr = create_bitcast
    create_ptr_to_int = create_bitcast

    def create_int_cast(self, src: Handle, dst_type: Any, is_signed: bool) -> Handle:
        """Integer to integer; the handle's numpy type knows its sign."""
        return handle(src.data.astype(numpy_type(dst_type.scalar)), dst_type.scalar, src)

    def create_fp_to_fp(self, src: Handle, dst_type: Any, rounding_mode: Any) -> Handle:
        """Between floating-point types, rounding to nearest even or (to bf16) towards zero."""
        toward_zero = rounding_mode == ir.ROUNDING_MODE.RTZ
        values, dtype = widen(src.data, src.dtype.scalar), dst_type.scalar
        return handle(narrow(values, dtype, toward_zero), dtype)

    def cast_impl(self, src: Handle, dst_type: Any) -> Handle:
        """Between any two scalar types, as C casts."""
        source, target = src.dtype.scalar, dst_type.scalar
        values = widen(src.data, source)
        if target.is_floating():
            return handle(narrow(values, target), target)
        if source.is_floating():
            return handle(float_to_int(values, numpy_type(target)), target)
        return self.create_int_cast(src, dst_type, True)

    create_si_to_fp = create_ui_to_fp = cast_impl
    create_fp_to_si = create_fp_to_ui = cast_impl
    create_fp_ext = create_fp_trunc = cast_impl

    def get_bf16(self, value: float) -> Handle:
        """A bf16 constant, rounded as the compiler rounds it."""
        return handle(narrow(np.array([value], np.float64), tl.bfloat16), tl.bfloat16)

    def create_dot(self, a: Handle, b: Handle, acc: Handle, precision: Any, _: int) -> Handle:
        """tl.dot: exact products, sums in the accumulator's type (float32, float64, int32).

        float16 accumulators are summed in float32 and rounded once, where hardware may round more.
        """
        self.machine.launch.dots += 1
        dtype, out = a.dtype.scalar, acc.dtype.scalar
        if not dtype.is_floating():
            # Exact in float64: |product| <= 2**14, and sums stay below 2**53.
            total = _matmul(a.data.astype(np.float64), b.data.astype(np.float64))
            return handle(total.astype(np.int64).astype(np.int32) + acc.data, out)
        x, y = widen(a.data, dtype), widen(b.data, b.dtype.scalar)
        with np.errstate(all="ignore"):
            if dtype == tl.float64:
                return handle(_matmul(x, y) + acc.data, out)
            x, y = x.astype(np.float32, copy=False), y.astype(np.float32, copy=False)
            products = [(x, y)] if dtype != tl.float32 else _operands(x, y, precision)
            total = sum((_matmul(p, q) for p, q in products[1:]), _matmul(*products[0]))
            total = total + widen(acc.data, out).astype(np.float32, copy=False)
        return handle(narrow(total, out), out)

    def create_extern_elementwise(
        self, library: str, path: str, symbol: str, args: list[Handle], dtype: Any, pure: bool
    ) -> Handle:
        """libdevice, the functions that have a numpy twin."""
        op = _LIBDEVICE.get(symbol.removeprefix("__nv_"))
        if op is None:
            raise UnsupportedByInterpreter(f"libdevice function {symbol}")
        with np.errstate(all="ignore"):
            out = op(*(arg.data for arg in args))
        return handle(out.astype(numpy_type(dtype.scalar), copy=False), dtype.scalar)


def _operands(x: Array, y: Array, precision: Any) -> list[tuple[Array, Array]]:
    """The matrix products that make up one of float32 operands, the largest last."""
    name = str(precision).rsplit(".", 1)[-1].upper()
    if name == "IEEE":
        return [(x, y)]
    if name == "TF32":
        return [(truncate_to_tf32(x), truncate_to_tf32(y))]
    if name == "TF32X3":
        xh, yh = truncate_to_tf32(x), truncate_to_tf32(y)
        xl, yl = truncate_to_tf32(x - xh), truncate_to_tf32(y - yh)
        return [(xl, yh), (xh, yl), (xh, yh)]
    if name not in ("BF16X3", "BF16X6"):
        raise UnsupportedByInterpreter(f"tl.dot with input_precision {name}")
    parts = 2 if name == "BF16X3" else 3
    a, b = _bf16_parts(x, parts), _bf16_parts(y, parts)
    pairs = [(i, j) for i in range(parts) for j in range(parts) if i + j < parts]
    pairs.sort(key=lambda pair: -sum(pair))
    return [(a[i], b[j]) for i, j in pairs]


_UNARY: dict[str, Callable[..., Any]] = {
    "exp": np.exp, "exp2": np.exp2, "log": np.log, "log2": np.log2, "log1p": np.log1p,
    "expm1": np.expm1, "tanh": np.tanh, "sin": np.sin, "cos": np.cos, "sqrt": np.sqrt,
    "fabs": np.abs, "floor": np.floor, "ceil": np.ceil, "trunc": np.trunc, "rint": np.rint,
    "nearbyint": np.rint, "erf": _erf, "rsqrt": lambda x: 1 / np.sqrt(x),
}  # fmt: skip
_BINARY: dict[str, Callable[..., Any]] = {
    "pow": np.power, "fmax": np.fmax, "fmin": np.fmin, "fmod": np.fmod, "atan2": np.arctan2,
}  # fmt: skip
_EXACT: dict[str, Callable[..., Any]] = {
    "isnan": np.isnan, "isinf": np.isinf, "isnand": np.isnan, "isinfd": np.isinf,
    "isnanf": np.isnan, "isinff": np.isinf, "finitef": np.isfinite, "isfinited": np.isfinite,
    "fdiv_rn": operator.truediv, "fmul_rn": operator.mul, "fadd_rn": operator.add,
}  # fmt: skip
_LIBDEVICE: dict[str, Callable[..., Any]] = {
    **_EXACT,
    **{name + suffix: op for name, op in {**_UNARY, **_BINARY}.items() for suffix in ("", "f")},
}
