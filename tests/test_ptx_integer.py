"""Integer instructions of the emulator against Python integers."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_text import evaluate

EDGES = {
    2: [0, 1, 2, 3, 7, 8, 15, 16, 31, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0xFFFE, 0x1234],
    4: [0, 1, 2, 3, 31, 32, 33, 255, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0x12345678],
    8: [
        0,
        1,
        3,
        63,
        64,
        2**31,
        2**32 - 1,
        2**63 - 1,
        2**63,
        2**63 + 1,
        2**64 - 1,
        0x123456789ABCDEF,
    ],
}


def samples(size: int, count: int, seed: int) -> list[np.ndarray]:
    """Every pair of edges, cycled, and random values of all magnitudes."""
    rng = np.random.default_rng(seed)
    edges = np.array(EDGES[size], np.uint64)
    grid = np.meshgrid(edges, edges)
    columns = [grid[i % 2].reshape(-1) for i in range(2)]
    columns.append(rng.permutation(columns[0]))
    out = []
    for column in range(count):
        random = rng.integers(0, 2**64, 300, np.uint64) >> rng.integers(0, 64, 300, np.uint64)
        both = np.concatenate([columns[column], random]) & np.uint64((1 << 8 * size) - 1)
        out.append(both.astype(f"u{size}"))
    return out


def signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def check(text: str, inputs: list[np.ndarray], result: int, reference) -> None:
    got = evaluate(text, inputs, result)
    mask = (1 << 8 * result) - 1
    for i, row in enumerate(zip(*(a.tolist() for a in inputs), strict=True)):
        want = reference(*row) & mask
        assert int(got[i]) == want, f"{text} of {[hex(v) for v in row]}: {got[i]:#x}, not {want:#x}"


def towards_zero(x: int, y: int) -> int:
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


BINARY = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul.lo": lambda x, y: x * y,
    "min": min,
    "max": max,
}


@pytest.mark.parametrize("kind", ["u", "s"])
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("opcode", [*BINARY, "mul.hi", "div", "rem"])
def test_binary(opcode, size, kind):
    bits = 8 * size
    x, y = samples(size, 2, 1)
    if opcode in ("div", "rem"):
        y[y == 0] = 3

    def reference(a, b):
        if kind == "s":
            a, b = signed(a, bits), signed(b, bits)
        if opcode == "mul.hi":
            return (a * b) >> bits
        if opcode == "div":
            return towards_zero(a, b)
        if opcode == "rem":
            return a - towards_zero(a, b) * b
        return BINARY[opcode](a, b)

    check(f"{opcode}.{kind}{bits} {{y}}, {{x0}}, {{x1}};", [x, y], size, reference)


@pytest.mark.parametrize("kind", ["u", "s"])
@pytest.mark.parametrize("opcode", ["mad.lo", "mad.hi", "sad"])
@pytest.mark.parametrize("size", [4, 8])
def test_ternary(opcode, size, kind):
    bits = 8 * size

    def reference(a, b, c):
        if kind == "s":
            a, b = signed(a, bits), signed(b, bits)
        return {"mad.lo": a * b + c, "mad.hi": ((a * b) >> bits) + c, "sad": abs(a - b) + c}[opcode]

    check(
        f"{opcode}.{kind}{bits} {{y}}, {{x0}}, {{x1}}, {{x2}};",
        samples(size, 3, 2),
        size,
        reference,
    )


@pytest.mark.parametrize("kind", ["u", "s"])
@pytest.mark.parametrize("size", [2, 4])
def test_wide_products(size, kind):
    bits = 8 * size
    x, y = samples(size, 2, 3)

    def value(a):
        return signed(a, bits) if kind == "s" else a

    check(f"mul.wide.{kind}{bits} {{y}}, {{x0}}, {{x1}};", [x, y], 2 * size,
          lambda a, b: value(a) * value(b))  # fmt: skip
    z = np.resize(samples(2 * size, 1, 4)[0], len(x))
    check(f"mad.wide.{kind}{bits} {{y}}, {{x0}}, {{x1}}, {{x2}};", [x, y, z], 2 * size,
          lambda a, b, c: value(a) * value(b) + c)  # fmt: skip


@pytest.mark.parametrize("opcode", ["add", "sub"])
def test_saturation(opcode):
    def reference(a, b):
        a, b = signed(a, 32), signed(b, 32)
        exact = a + b if opcode == "add" else a - b
        return max(-(2**31), min(2**31 - 1, exact))

    check(f"{opcode}.sat.s32 {{y}}, {{x0}}, {{x1}};", samples(4, 2, 5), 4, reference)


@pytest.mark.parametrize("size", [4, 8])
def test_carries_make_double_width_sums(size):
    """A 2n-bit sum and difference from n-bit halves; the carry flag links them."""
    bits = 8 * size
    a, b, c = samples(size, 3, 6)
    d = np.roll(c, 7)
    for opcode, sign in (("add", 1), ("sub", -1)):
        high = lambda w, x, y, z, s=sign: ((x << bits | w) + s * (z << bits | y)) >> bits  # noqa: E731
        check(
            f"{opcode}.cc.u{bits} {{y}}, {{x0}}, {{x2}}; {opcode}c.u{bits} {{y}}, {{x1}}, {{x3}};",
            [a, b, c, d], size, high,
        )  # fmt: skip


def test_carry_of_products():
    """mad.lo.cc and madc.hi make the full 64-bit a * b + c:d, as Triton's sine emits."""
    a, b, c = samples(4, 3, 7)
    d = np.roll(c, 5)
    check(
        "mad.lo.cc.u32 {y}, {x0}, {x1}, {x2}; madc.hi.u32 {y}, {x0}, {x1}, {x3};",
        [a, b, c, d], 4, lambda w, x, y, z: (w * x + (z << 32 | y)) >> 32,
    )  # fmt: skip


@pytest.mark.parametrize("size", [2, 4, 8])
def test_bits(size):
    bits = 8 * size
    ones = (1 << bits) - 1
    x, y = samples(size, 2, 8)
    n = np.resize(np.array([0, 1, 5, bits - 1, bits, bits + 1, 200, 2**31], np.uint32), len(x))
    check(f"and.b{bits} {{y}}, {{x0}}, {{x1}};", [x, y], size, lambda a, b: a & b)
    check(f"or.b{bits} {{y}}, {{x0}}, {{x1}};", [x, y], size, lambda a, b: a | b)
    check(f"xor.b{bits} {{y}}, {{x0}}, {{x1}};", [x, y], size, lambda a, b: a ^ b)
    check(f"not.b{bits} {{y}}, {{x0}};", [x], size, lambda a: ~a)
    check(f"cnot.b{bits} {{y}}, {{x0}};", [x], size, lambda a: int(a == 0))
    check(
        f"shl.b{bits} {{y}}, {{x0}}, {{x1}};", [x, n], size, lambda a, b: a << b if b < bits else 0
    )
    check(f"shr.u{bits} {{y}}, {{x0}}, {{x1}};", [x, n], size, lambda a, b: a >> b)
    check(
        f"shr.s{bits} {{y}}, {{x0}}, {{x1}};",
        [x, n],
        size,
        lambda a, b: signed(a, bits) >> min(b, bits),
    )
    check(f"neg.s{bits} {{y}}, {{x0}};", [x], size, lambda a: -a)
    check(f"abs.s{bits} {{y}}, {{x0}};", [x], size, lambda a: abs(signed(a, bits)))
    if size > 2:
        check(f"popc.b{bits} {{y}}, {{x0}};", [x], 4, lambda a: bin(a).count("1"))
        check(f"clz.b{bits} {{y}}, {{x0}};", [x], 4, lambda a: bits - a.bit_length())
        check(f"brev.b{bits} {{y}}, {{x0}};", [x], size, lambda a: int(f"{a:0{bits}b}"[::-1], 2))
        check(f"bfind.u{bits} {{y}}, {{x0}};", [x], 4, lambda a: a.bit_length() - 1)
        check(f"bfind.s{bits} {{y}}, {{x0}};", [x], 4,
              lambda a: (a ^ (ones if a >> (bits - 1) else 0)).bit_length() - 1)  # fmt: skip


@pytest.mark.parametrize("size", [4, 8])
def test_bit_fields(size):
    bits = 8 * size
    x, y = samples(size, 2, 9)
    rng = np.random.default_rng(0)
    start = rng.choice([0, 1, 7, 16, bits - 1, bits, 100, 255, 256], len(x)).astype(np.uint32)
    count = rng.choice([0, 1, 8, 31, 32, bits, 100, 255], len(x)).astype(np.uint32)

    def extract(a, p, n, kind):
        p, n = p & 255, n & 255
        sign = 0
        if kind == "s" and n:
            sign = a >> min(p + n - 1, bits - 1) & 1
        return sum(
            ((a >> (p + i) & 1) if i < n and p + i < bits else sign) << i for i in range(bits)
        )

    for kind in "us":
        check(f"bfe.{kind}{bits} {{y}}, {{x0}}, {{x1}}, {{x2}};", [x, start, count], size,
              lambda a, p, n, k=kind: extract(a, p, n, k))  # fmt: skip

    def insert(a, b, p, n):
        p, n = p & 255, n & 255
        for i in range(n):
            if p + i < bits and i < bits:
                b = b & ~(1 << (p + i)) | ((a >> i & 1) << (p + i))
        return b

    check(f"bfi.b{bits} {{y}}, {{x0}}, {{x1}}, {{x2}}, {{x3}};", [x, y, start, count], size, insert)


def test_funnel_shift():
    low, high = samples(4, 2, 10)
    n = np.resize(np.array([0, 1, 31, 32, 33, 63, 64, 2**31], np.uint32), len(low))
    for side in "lr":
        for mode in ("wrap", "clamp"):

            def reference(a, b, c, side=side, mode=mode):
                by = c & 31 if mode == "wrap" else min(c, 32)
                both = b << 32 | a
                return (both << by) >> 32 if side == "l" else both >> by

            check(
                f"shf.{side}.{mode}.b32 {{y}}, {{x0}}, {{x1}}, {{x2}};",
                [low, high, n],
                4,
                reference,
            )


@pytest.mark.parametrize("table", [0x00, 0xFF, 0x80, 0xFE, 0x96, 0xCA, 0xE8, 0x1B])
def test_lop3(table):
    def reference(a, b, c):
        return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i
                   for i in range(32))  # fmt: skip

    check(f"lop3.b32 {{y}}, {{x0}}, {{x1}}, {{x2}}, {table};", samples(4, 3, 11), 4, reference)


def test_prmt():
    x, y = samples(4, 2, 12)
    selectors = np.random.default_rng(1).integers(0, 2**16, len(x)).astype(np.uint32)

    def reference(a, b, c):
        pool = list((a | b << 32).to_bytes(8, "little"))
        out = 0
        for i in range(4):
            nibble = c >> 4 * i & 15
            byte = pool[nibble & 7]
            out |= ((255 if byte & 128 else 0) if nibble & 8 else byte) << 8 * i
        return out

    check("prmt.b32 {y}, {x0}, {x1}, {x2};", [x, y, selectors], 4, reference)
    modes = {
        "f4e": lambda k: [k, k + 1, k + 2, k + 3],
        "b4e": lambda k: [k, (k - 1) % 8, (k - 2) % 8, (k - 3) % 8],
        "rc8": lambda k: [k] * 4,
        "ecl": lambda k: [max(k, i) for i in range(4)],
        "ecr": lambda k: [min(k, i) for i in range(4)],
        "rc16": lambda k: [2 * (k & 1), 2 * (k & 1) + 1] * 2,
    }
    for mode, pick in modes.items():

        def general(a, b, c, pick=pick):
            pool = (a | b << 32).to_bytes(8, "little")
            return int.from_bytes(bytes(pool[i] for i in pick(c & 3)), "little")

        check(f"prmt.b32.{mode} {{y}}, {{x0}}, {{x1}}, {{x2}};", [x, y, selectors], 4, general)


def test_dot_products_of_bytes():
    x, y, z = samples(4, 3, 13)
    for ka in "us":
        for kb in "us":

            def reference(a, b, c, ka=ka, kb=kb):
                total = c
                for i in range(4):
                    u, v = a >> 8 * i & 255, b >> 8 * i & 255
                    total += (signed(u, 8) if ka == "s" else u) * (signed(v, 8) if kb == "s" else v)
                return total

            check(f"dp4a.{ka}32.{kb}32 {{y}}, {{x0}}, {{x1}}, {{x2}};", [x, y, z], 4, reference)


def test_comparison_and_selection():
    x, y = samples(4, 2, 14)
    tests = {
        "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b,
        "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    }  # fmt: skip
    unsigned = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
    cases = [("s32", op, op) for op in tests] + [("u32", op, op) for op in tests]
    cases += [("u32", op, same) for op, same in unsigned.items()]
    for kind, operator, meaning in cases:

        def reference(a, b, kind=kind, meaning=meaning):
            if kind == "s32":
                a, b = signed(a, 32), signed(b, 32)
            return 7 if tests[meaning](a, b) else 9

        check(
            f"setp.{operator}.{kind} %p0, {{x0}}, {{x1}}; selp.b32 {{y}}, 7, 9, %p0;",
            [x, y],
            4,
            reference,
        )


def test_second_predicate_and_combination():
    x, y = samples(4, 2, 15)
    body = (
        "setp.gt.u32 %p2, {x0}, 100;"
        "setp.lt.and.u32 %p0|%p1, {x0}, {x1}, !%p2;"
        "selp.b32 %r5, 1, 0, %p0; selp.b32 %r6, 2, 0, %p1; or.b32 {y}, %r5, %r6;"
    )
    check(body, [x, y], 4, lambda a, b: (a < b and a <= 100) | (a >= b and a <= 100) << 1)


def test_integer_conversions():
    names = ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"]
    for to in names:
        for source in names:
            size, result = int(source[1:]) // 8, int(to[1:]) // 8
            (x,) = samples(max(size, 2), 1, 16)
            for sat in ("", ".sat"):

                def reference(a, to=to, source=source, sat=sat, size=size, result=result):
                    a &= (1 << 8 * size) - 1
                    value = signed(a, 8 * size) if source[0] == "s" else a
                    if sat:
                        low = -(1 << 8 * result - 1) if to[0] == "s" else 0
                        high = (1 << 8 * result - (to[0] == "s")) - 1
                        value = max(low, min(high, value))
                    return value

                check(f"cvt{sat}.{to}.{source} {{y}}, {{x0}};", [x], result, reference)
