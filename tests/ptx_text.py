"""Writes small PTX kernels for the tests, and rounds exactly with Python integers."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch

from kimi_ops.testing.ptx import Checks, Kernel, Report

HEADER = ".version 8.7\n.target sm_80\n.address_size 64\n"
REGISTERS = """
.reg .pred %p<9>;
.reg .b16 %h<9>;
.reg .b32 %r<40>;
.reg .f32 %f<9>;
.reg .b64 %d<20>;
"""


def kernel_text(body: str, pointers: int = 2, scalars: int = 0, declarations: str = "") -> str:
    """A kernel ``k`` with pointer parameters p0.. and u32 parameters n0..; %r0 is %tid.x."""
    params = [f".param .u64 p{i}" for i in range(pointers)]
    params += [f".param .u32 n{i}" for i in range(scalars)]
    loads = "\n".join(f"ld.param.u64 %d{i}, [p{i}];" for i in range(pointers))
    loads += "\n".join(f"ld.param.u32 %r{30 + i}, [n{i}];" for i in range(scalars))
    return (
        f"{HEADER}{declarations}\n.visible .entry k({', '.join(params)})\n{{{REGISTERS}"
        f"{loads}\nmov.u32 %r0, %tid.x;\n{body}\nret;\n}}\n"
    )


def run(
    body: str,
    *tensors: torch.Tensor,
    threads: int = 32,
    grid: int = 1,
    declarations: str = "",
    checks: Checks | None = None,
    seed: int | None = None,
    scalars: Sequence[int] = (),
    uninitialised: Sequence[torch.Tensor] = (),
    step_limit: int = 100_000,
) -> Report:
    """Runs a body (see `kernel_text`) on tensors."""
    text = kernel_text(body, len(tensors), len(scalars), declarations)
    return Kernel(text).launch(
        (grid,),
        (threads,),
        [*tensors, *scalars],
        checks=checks,
        seed=seed,
        uninitialised=uninitialised,
        step_limit=step_limit,
    )


def evaluate(
    instruction: str, inputs: Sequence[np.ndarray], result: int, sources: str = ""
) -> np.ndarray:
    """Applies an instruction, ``{y}`` its result and ``{x0}``.. its sources, to unsigned arrays.

    Args:
        result: bytes of the result.
    """
    count = len(inputs[0])
    lines, names = [], {}
    registers = []
    for i, array in enumerate(inputs):
        size = array.dtype.itemsize
        held = max(size, 2)
        registers.append(f".reg .b{8 * held} %x{i};")
        lines += [f"mad.wide.u32 %d{10 + i}, %r1, {size}, %d{i};"]
        lines += [f"ld.global.b{8 * size} %x{i}, [%d{10 + i}];"]
        names[f"x{i}"] = f"%x{i}"
    registers.append(f".reg .b{8 * max(result, 2)} %y;")
    names["y"] = "%y"
    text = instruction.format(**names)
    n = len(inputs)
    body = (
        "".join(registers)
        + "mov.u32 %r2, %ctaid.x; mad.lo.s32 %r1, %r2, 128, %r0; setp.ge.u32 %p8, %r1, %r30;"
        + "@%p8 exit;"
        + "".join(lines)
        + text
        + f"mad.wide.u32 %d{10 + n}, %r1, {result}, %d{n};"
        + f"st.global.b{8 * result} [%d{10 + n}], %y;"
    )
    tensors = [torch.from_numpy(a.view(f"i{a.dtype.itemsize}").copy()) for a in inputs]
    out = torch.zeros(
        count, dtype={1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[result]
    )
    run(
        body,
        *tensors,
        out,
        threads=128,
        grid=-(-count // 128),
        scalars=[count],
        uninitialised=[out],
    )
    return out.numpy().view(f"u{result}")


FORMATS = {"f16": (11, -14, 15, 2), "bf16": (8, -126, 127, 2), "f32": (24, -126, 127, 4),
           "tf32": (11, -126, 127, 4), "f64": (53, -1022, 1023, 8)}  # fmt: skip


def to_fraction(bits: int, name: str) -> Fraction | str:
    """The exact value of a bit pattern, or "nan", "inf", "-inf", "-0"."""
    precision, low, _, size = FORMATS[name]
    width = 8 * size
    if name == "tf32":
        precision = 24
    sign = bits >> (width - 1)
    mantissa = bits & ((1 << (precision - 1)) - 1)
    exponent = (bits >> (precision - 1)) & ((1 << (width - precision)) - 1)
    if exponent == (1 << (width - precision)) - 1:
        return "nan" if mantissa else "-inf" if sign else "inf"
    if exponent:
        mantissa |= 1 << (precision - 1)
        exponent -= 1
    if mantissa == 0 and sign:
        return "-0"
    value = Fraction(mantissa) * Fraction(2) ** (exponent + low - (precision - 1))
    return -value if sign else value


def from_fraction(
    value: Fraction, name: str, mode: str = "rn", *, negative_zero: bool = False
) -> int:
    """The bit pattern of a value rounded to a format: integers only, straight from IEEE 754."""
    precision, low, high, size = FORMATS[name]
    width = 8 * size
    negative = value < 0 or (value == 0 and negative_zero)
    sign = int(negative) << (width - 1)
    magnitude = abs(value)
    stored = 24 if name == "tf32" else precision
    if magnitude == 0:
        return sign
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    exponent = max(exponent, low)
    step = Fraction(2) ** (exponent - (precision - 1))
    whole, rest = divmod(magnitude, step)
    up = {
        "rn": rest > step / 2 or (rest == step / 2 and whole % 2 == 1),
        "rna": rest >= step / 2,
        "rz": False,
        "rm": negative and rest > 0,
        "rp": not negative and rest > 0,
    }[mode]
    whole += up
    if whole == 1 << precision:
        whole, exponent = whole // 2, exponent + 1
    if exponent > high:
        towards_zero = (
            mode == "rz" or (mode == "rm" and not negative) or (mode == "rp" and negative)
        )
        if towards_zero:
            return sign | (((high + 1 - low) << (stored - 1)) | ((1 << (stored - 1)) - 1))
        return sign | ((high + 2 - low) << (stored - 1))
    shift = stored - precision
    if whole < 1 << (precision - 1):
        return sign | (int(whole) << shift)
    fraction = int(whole) & ((1 << (precision - 1)) - 1)
    return sign | ((exponent - low + 1) << (stored - 1)) | (fraction << shift)
