"""Floating-point instructions against exact fractions rounded with Python integers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from ptx_text import FORMATS, evaluate, from_fraction, to_fraction

from kimi_ops.testing.ptx import rounding

EDGES = {
    "f32": [0, 0x80000000, 1, 0x80000001, 0x7FFFFF, 0x800000, 0x80800000, 0x3F800000, 0xBF800000,
            0x3F800001, 0x33800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000,
            0xFFC00001, 0x3F000000, 0x4B800001, 0x4B000001, 0x5F000000],
    "f16": [0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x3C00, 0xBC00, 0x3C01, 0x7BFF, 0xFBFF, 0x7C00,
            0xFC00, 0x7E00, 0x1400, 0x3800],
    "bf16": [0, 0x8000, 1, 0x8001, 0x7F, 0x80, 0x3F80, 0xBF80, 0x3F81, 0x7F7F, 0xFF7F, 0x7F80,
             0xFF80, 0x7FC0, 0x3B80, 0x3F00],
    "f64": [0, 1 << 63, 1, 0x3FF0000000000000, 0xBFF0000000000000, 0x7FEFFFFFFFFFFFFF, 0x7FF << 52,
            0xFFF << 52, 0x7FF8 << 48, 0x3FF0000000000001, 0x3CA0000000000000],
}  # fmt: skip
NAN = {"f32": 0x7FFFFFFF, "f16": 0x7FFF, "bf16": 0x7FFF}


def samples(name: str, count: int, seed: int) -> list[np.ndarray]:
    """All pairs of edges; random bits; and values of like size, whose sums lie between numbers."""
    rng = np.random.default_rng(seed)
    size = FORMATS[name][3]
    edges = np.array(EDGES[name], np.uint64)
    grid = [g.reshape(-1) for g in np.meshgrid(edges, edges)]
    grid.append(rng.permutation(grid[0]))
    near = FORMATS[name][0] - 1
    base = {"f32": 127, "f16": 15, "bf16": 127, "f64": 1023}[name]
    out = []
    for i in range(count):
        random = rng.integers(0, 2**64, 200, np.uint64)
        close = rng.integers(base - 3, base + 3, 300).astype(np.uint64) << np.uint64(near)
        close |= rng.integers(0, 2**near, 300).astype(np.uint64)
        close |= rng.integers(0, 2, 300).astype(np.uint64) << np.uint64(8 * size - 1)
        both = np.concatenate([grid[i], random, close])
        out.append((both & np.uint64((1 << 8 * size) - 1)).astype(f"u{size}"))
    return out


def number(value):
    """A fraction, or a float for what is none."""
    return (
        {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "-0": -0.0}.get(value, value)
        if isinstance(value, str)
        else value
    )


def exact(opcode, *values):
    """(fraction, negative zero) of an operation, or a float for NaN and infinities."""
    v = [number(x) for x in values]
    special = any(isinstance(x, float) and x != 0 for x in v)
    if special:
        f = [float(x) if isinstance(x, float) else float(np.sign(x)) for x in v]
        with np.errstate(all="ignore"):
            a = [np.float64(x) for x in f]
            if opcode == "add":
                return float(a[0] + a[1])
            if opcode == "sub":
                return float(a[0] - a[1])
            if opcode == "mul":
                return float(a[0] * a[1])
            if opcode == "div":
                return float(a[0] / a[1])
            return float(a[0] * a[1] + a[2])
    negative = [x < 0 or (isinstance(x, float) and math.copysign(1, x) < 0) for x in v]
    q = [Fraction(x) for x in v]
    if opcode in ("add", "sub"):
        flip = negative[1] != (opcode == "sub")
        total = q[0] + (q[1] if opcode == "add" else -q[1])
        return total, negative[0] and flip, q[0] == 0 and q[1] == 0
    if opcode == "mul":
        return q[0] * q[1], negative[0] != negative[1], True
    if opcode == "div":
        if q[1] == 0:
            if q[0] == 0:
                return math.nan
            return -math.inf if negative[0] != negative[1] else math.inf
        return q[0] / q[1], negative[0] != negative[1], True
    product = negative[0] != negative[1]
    return q[0] * q[1] + q[2], product and negative[2], q[0] * q[1] == 0 and q[2] == 0


def expected(opcode, bits, name, mode="rn"):
    value = exact(opcode, *(to_fraction(int(b), name) for b in bits))
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if value == 0:
            return from_fraction(Fraction(0), name, negative_zero=math.copysign(1, value) < 0)
        return from_fraction(Fraction(2) ** 5000 * (1 if value > 0 else -1), name)
    total, negative, plain = value
    if total == 0 and not plain:
        # Exact cancellation gives +0, and -0 when rounding down (IEEE 754, section 6.3).
        negative = mode == "rm"
    elif total == 0 and opcode in ("add", "sub", "fma") and not negative:
        negative = mode == "rm" and _mixed_zeros(opcode, bits, name)
    return from_fraction(total, name, mode, negative_zero=negative)


def _mixed_zeros(opcode, bits, name):
    signs = [int(b) >> (8 * FORMATS[name][3] - 1) for b in bits]
    if opcode == "fma":
        return (signs[0] ^ signs[1]) != signs[2]
    return signs[0] != signs[1] ^ (opcode == "sub")


def check(text, opcode, inputs, name, mode="rn"):
    got = evaluate(text, inputs, FORMATS[name][3])
    for i, bits in enumerate(zip(*(a.tolist() for a in inputs), strict=True)):
        want = expected(opcode, bits, name, mode)
        if want is None:
            assert to_fraction(int(got[i]), name) == "nan", (text, [hex(b) for b in bits])
            if name in NAN:
                assert int(got[i]) == NAN[name]
        else:
            assert int(got[i]) == want, (text, [hex(b) for b in bits], hex(got[i]), hex(want))


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("opcode", ["add", "sub", "mul", "fma", "div"])
def test_f32(opcode, mode):
    count = 3 if opcode == "fma" else 2
    sources = ", ".join(f"{{x{i}}}" for i in range(count))
    check(f"{opcode}.{mode}.f32 {{y}}, {sources};", opcode, samples("f32", count, 1), "f32", mode)


@pytest.mark.parametrize("opcode", ["add", "sub", "mul", "fma", "div"])
def test_f64(opcode):
    count = 3 if opcode == "fma" else 2
    sources = ", ".join(f"{{x{i}}}" for i in range(count))
    check(f"{opcode}.rn.f64 {{y}}, {sources};", opcode, samples("f64", count, 2), "f64")


@pytest.mark.parametrize("exponents", [(-3, 3), (-60, 60), (-520, -440), (460, 502)])
def test_fma_f64_where_the_addend_cancels_or_only_decides_the_rounding(exponents):
    rng = np.random.default_rng(0)
    x, y, z = (np.ldexp(rng.uniform(-1, 1, 3000), rng.integers(*exponents, 3000)) for _ in range(3))
    z[:1000] = -(x * y)[:1000] * (1 + rng.integers(-2, 3, 1000) * 2.0**-52)
    with np.errstate(all="ignore"):
        z[1000:2000] = np.ldexp((x * y)[1000:2000], rng.integers(-120, 120, 1000))
        results = rounding.fma_f64(x, y, z)
    for *numbers, got in zip(x, y, z, results, strict=True):
        if np.isfinite(numbers).all():
            a, b, c = map(Fraction, numbers)
            exact = a * b + c
            assert got == exact.numerator / exact.denominator, numbers


@pytest.mark.parametrize("name", ["f16", "bf16"])
@pytest.mark.parametrize("opcode", ["add", "sub", "mul", "fma"])
def test_halves_and_their_pairs(opcode, name):
    count = 3 if opcode == "fma" else 2
    inputs = samples(name, count, 3)
    sources = ", ".join(f"{{x{i}}}" for i in range(count))
    check(f"{opcode}.rn.{name} {{y}}, {sources};", opcode, inputs, name)
    even = len(inputs[0]) // 2 * 2
    packed = [x[:even].view(np.uint32) for x in inputs]
    pairs = evaluate(f"{opcode}.rn.{name}x2 {{y}}, {sources};", packed, 4).view(np.uint16)
    single = evaluate(f"{opcode}.rn.{name} {{y}}, {sources};", [x[:even] for x in inputs], 2)
    assert (pairs == single).all()


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_mixed_precision(name):
    """f32 results of half operands and an f32 addend (sm_100)."""
    a, b = samples(name, 2, 15)
    c = np.resize(samples("f32", 1, 16)[0], len(a))
    wide = [evaluate(f"cvt.f32.{name} {{y}}, {{x0}};", [h], 4) for h in (a, b)]
    for opcode, inputs, same in (
        ("add", [a, c], [wide[0], c]), ("sub", [a, c], [wide[0], c]), ("fma", [a, b, c], [*wide, c])
    ):  # fmt: skip
        sources = ", ".join(f"{{x{i}}}" for i in range(len(inputs)))
        got = evaluate(f"{opcode}.rn.f32.{name} {{y}}, {sources};", inputs, 4)
        want = evaluate(f"{opcode}.rn.f32 {{y}}, {sources};", same, 4)
        assert (got == want).all()


def test_a_fused_product_rounds_once():
    """1 + 2^-23 squared minus its rounding: zero in two roundings, 2^-46 in one."""
    x = np.array([0x3F800001], np.uint32)
    c = np.array([0xBF800002], np.uint32)
    got = evaluate("fma.rn.f32 {y}, {x0}, {x0}, {x1};", [x, c], 4).view(np.float32)
    assert got[0] == 2.0**-46


def test_flush_to_zero():
    x, y = samples("f32", 2, 4)
    got = evaluate("mul.ftz.f32 {y}, {x0}, {x1};", [x, y], 4)

    def flushed(bits):
        return bits & 0x80000000 if bits & 0x7F800000 == 0 else bits

    for a, b, g in zip(x.tolist(), y.tolist(), got.tolist(), strict=True):
        want = expected("mul", (flushed(a), flushed(b)), "f32")
        assert g == (0x7FFFFFFF if want is None else flushed(want)), (hex(a), hex(b))


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("opcode", ["min", "max"])
@pytest.mark.parametrize("nan", ["", ".NaN"])
def test_extremes(opcode, name, nan):
    x, y = samples(name, 2, 5)
    got = evaluate(f"{opcode}{nan}.{name} {{y}}, {{x0}}, {{x1}};", [x, y], FORMATS[name][3])
    top = 1 << (8 * FORMATS[name][3] - 1)
    for a, b, g in zip(x.tolist(), y.tolist(), got.tolist(), strict=True):
        values = [v for v in (a, b) if to_fraction(v, name) != "nan"]
        if len(values) < 2 and (nan or not values):
            assert g == NAN[name]
            continue
        # Sign and magnitude as one integer order: -0 is below +0.
        key = lambda v: -(v - top) - 1 if v & top else v  # noqa: E731
        assert g == (min if opcode == "min" else max)(values, key=key), (hex(a), hex(b), hex(g))


def test_saturation_to_one():
    (x,) = samples("f32", 1, 6)
    got = evaluate("add.sat.f32 {y}, {x0}, 0f00000000;", [x], 4).view(np.float32)
    values = x.view(np.float32)
    want = np.where(np.isnan(values), 0, np.clip(values, 0, 1))
    assert (got == want).all()
    assert not np.signbit(got).any()


def test_signs():
    (x,) = samples("f32", 1, 7)
    assert (evaluate("neg.f32 {y}, {x0};", [x], 4) == x ^ np.uint32(1 << 31)).all()
    assert (evaluate("abs.f32 {y}, {x0};", [x], 4) == x & np.uint32((1 << 31) - 1)).all()
    assert (evaluate("neg.bf16x2 {y}, {x0};", [x], 4) == x ^ np.uint32(0x80008000)).all()


@pytest.mark.parametrize(
    ("text", "function", "allowed"),
    [
        # The ISA's own bounds (rcp to tanh): relative, or absolute for sin, cos and lg2.
        ("rcp.approx.ftz.f32", lambda x: 1 / x, 2**-23),
        ("rcp.rn.f32", lambda x: 1 / x, 2**-24),
        ("sqrt.rn.f32", math.sqrt, 2**-24),
        ("sqrt.approx.f32", math.sqrt, 2**-23),
        ("rsqrt.approx.f32", lambda x: 1 / math.sqrt(x), 2**-22.4),
        ("ex2.approx.f32", lambda x: 2.0**x, 2**-22.5),
        ("lg2.approx.f32", math.log2, 2**-22),
        ("sin.approx.f32", math.sin, 2**-20.5),
        ("cos.approx.f32", math.cos, 2**-20.5),
        ("tanh.approx.f32", math.tanh, 2**-11),
    ],
)
def test_functions(text, function, allowed):
    x = np.random.default_rng(0).uniform(0.1, 3, 200).astype(np.float32)
    got = evaluate(f"{text} {{y}}, {{x0}};", [x.view(np.uint32)], 4).view(np.float32)
    for a, g in zip(x.tolist(), got.tolist(), strict=True):
        want = function(a)
        assert abs(g - want) <= allowed * max(
            abs(want), 1 if text[:3] in ("sin", "cos", "lg2") else 0
        )


def test_functions_of_special_values():
    specials = np.array([0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000], np.uint32)
    inf, nan = 0x7F800000, 0x7FFFFFFF
    wants = {
        "rcp.approx.f32": [inf, 0xFF800000, 0, 0x80000000, nan],
        "rsqrt.approx.f32": [inf, 0xFF800000, 0, nan, nan],
        "ex2.approx.f32": [0x3F800000, 0x3F800000, inf, 0, nan],
        "lg2.approx.f32": [0xFF800000, 0xFF800000, inf, nan, nan],
        "sqrt.rn.f32": [0, 0x80000000, inf, nan, nan],
        "tanh.approx.f32": [0, 0x80000000, 0x3F800000, 0xBF800000, nan],
    }
    for text, want in wants.items():
        assert evaluate(f"{text} {{y}}, {{x0}};", [specials], 4).tolist() == want, text


OPERATORS = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_comparisons(name):
    x, y = samples(name, 2, 8)
    for operator in [*OPERATORS, *(f"{o}u" for o in OPERATORS), "num", "nan"]:
        body = f"setp.{operator}.{name} %p0, {{x0}}, {{x1}}; selp.b32 {{y}}, 1, 0, %p0;"
        got = evaluate(body, [x, y], 4)
        for a, b, g in zip(x.tolist(), y.tolist(), got.tolist(), strict=True):
            u, v = number(to_fraction(a, name)), number(to_fraction(b, name))
            unordered = any(isinstance(w, float) and math.isnan(w) for w in (u, v))
            if operator in ("num", "nan"):
                want = unordered == (operator == "nan")
            elif unordered:
                want = len(operator) == 3
            else:
                want = OPERATORS[operator[:2]](u, v)
            assert g == want, (operator, hex(a), hex(b))


@pytest.mark.parametrize(
    ("to", "source", "mode"),
    [
        ("f16", "f32", "rn"), ("f16", "f32", "rz"), ("bf16", "f32", "rn"), ("bf16", "f32", "rz"),
        ("f32", "f64", "rn"), ("f32", "f64", "rz"), ("f32", "f64", "rm"), ("f32", "f64", "rp"),
        ("f16", "f64", "rn"), ("tf32", "f32", "rna"), ("tf32", "f32", "rn"),
    ],
)  # fmt: skip
def test_float_conversions(to, source, mode):
    (x,) = samples(source, 1, 9)
    got = evaluate(f"cvt.{mode}.{to}.{source} {{y}}, {{x0}};", [x], FORMATS[to][3])
    for a, g in zip(x.tolist(), got.tolist(), strict=True):
        value = to_fraction(a, source)
        if value == "nan":
            assert to_fraction(g, to) == "nan"
        elif value in ("inf", "-inf"):
            assert to_fraction(g, to) == value
        else:
            exact_value = Fraction(0) if value == "-0" else value
            want = from_fraction(exact_value, to, mode, negative_zero=value == "-0")
            assert g == want, (hex(a), hex(g), hex(want))


@pytest.mark.parametrize(("to", "source"), [("f32", "f16"), ("f32", "bf16"), ("f64", "f32")])
def test_widening_is_exact(to, source):
    (x,) = samples(source, 1, 10)
    got = evaluate(f"cvt.{to}.{source} {{y}}, {{x0}};", [x], FORMATS[to][3])
    for a, g in zip(x.tolist(), got.tolist(), strict=True):
        assert to_fraction(g, to) == to_fraction(a, source)


def test_packed_conversion_puts_the_first_operand_high():
    x, y = samples("f32", 2, 11)
    for name in ("f16", "bf16"):
        got = evaluate(f"cvt.rn.{name}x2.f32 {{y}}, {{x0}}, {{x1}};", [x, y], 4)
        high = evaluate(f"cvt.rn.{name}.f32 {{y}}, {{x0}};", [x], 2)
        low = evaluate(f"cvt.rn.{name}.f32 {{y}}, {{x0}};", [y], 2)
        assert (got == (high.astype(np.uint32) << 16 | low)).all()


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
def test_float_to_integer(mode):
    (x,) = samples("f32", 1, 12)
    rounded = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[mode]
    for kind in ("u8", "s16", "u32", "s32", "u64", "s64"):
        size = int(kind[1:]) // 8
        low = -(1 << 8 * size - 1) if kind[0] == "s" else 0
        high = (1 << 8 * size - (kind[0] == "s")) - 1
        got = evaluate(f"cvt.{mode}.{kind}.f32 {{y}}, {{x0}};", [x], size)
        for a, g in zip(x.tolist(), got.tolist(), strict=True):
            value = to_fraction(a, "f32")
            if isinstance(value, str):
                want = {"nan": 0, "inf": high, "-inf": low, "-0": 0}[value]
            else:
                want = max(low, min(high, rounded(value)))
            assert g == want & ((1 << 8 * size) - 1), (kind, hex(a))


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_integer_to_float(mode):
    rng = np.random.default_rng(13)
    x = rng.integers(0, 2**64, 300, np.uint64) >> rng.integers(0, 64, 300, np.uint64)
    x = np.concatenate([x, np.array([0, 1, 2**24 + 1, 2**53 + 1, 2**63, 2**64 - 1], np.uint64)])
    for kind in ("u64", "s64", "u32", "s32"):
        size = int(kind[1:]) // 8
        source = x.astype(f"u{size}")
        for to in ("f32", "f64", "f16", "bf16"):
            if mode != "rn" and to in ("f16", "bf16"):
                continue
            got = evaluate(f"cvt.{mode}.{to}.{kind} {{y}}, {{x0}};", [source], FORMATS[to][3])
            for a, g in zip(source.tolist(), got.tolist(), strict=True):
                value = a - (1 << 8 * size) if kind[0] == "s" and a >> (8 * size - 1) else a
                assert g == from_fraction(Fraction(value), to, mode), (kind, to, value)


def test_rounding_to_whole_floats():
    (x,) = samples("f32", 1, 14)
    values = x.view(np.float32)
    for mode, function in (
        ("rni", np.rint),
        ("rzi", np.trunc),
        ("rmi", np.floor),
        ("rpi", np.ceil),
    ):
        got = evaluate(f"cvt.{mode}.f32.f32 {{y}}, {{x0}};", [x], 4).view(np.float32)
        assert np.array_equal(got, function(values), equal_nan=True)
