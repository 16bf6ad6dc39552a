"""Conversions to and from 8-bit floats: every code, exact rounding, Triton's and NVIDIA's casts.

NVIDIA's ``cuda_fp8.h`` computes the conversions with integers for GPUs before sm_89 and with the
instructions from there on: the same source, executed for both, must give the same bits.
"""

from __future__ import annotations

import os
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx_text import evaluate, to_fraction
from test_ptx_cuda import compiled

from kimi_ops.testing.ptx import Kernel, UnsupportedPtx
from kimi_ops.testing.ptx.families import conversion_fp8

triton = pytest.importorskip("triton", reason="needs triton: pip install 'triton>=3.4'")
# Decorating under the interpreter would make no compiled kernels.
_INTERPRET = os.environ.pop("TRITON_INTERPRET", None)
from triton import language as tl  # noqa: E402

from kimi_ops.testing.runner import compile_triton, run_triton  # noqa: E402


@triton.jit
def cast_kernel(x_ptr, coded_ptr, back_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    coded = tl.load(x_ptr + i).to(coded_ptr.dtype.element_ty)
    tl.store(coded_ptr + i, coded)
    tl.store(back_ptr + i, coded.to(back_ptr.dtype.element_ty))


@triton.jit
def scaled_kernel(a_ptr, scale_a_ptr, b_ptr, scale_b_ptr, c_ptr, N: tl.constexpr, K: tl.constexpr):
    n, k, g = tl.arange(0, N), tl.arange(0, K), tl.arange(0, K // 32)
    a = tl.load(a_ptr + n[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    at = n[:, None] * (K // 32) + g[None, :]
    scale_a, scale_b = tl.load(scale_a_ptr + at), tl.load(scale_b_ptr + at)
    c = tl.dot_scaled(a, scale_a, "e4m3", b, scale_b, "e5m2")
    tl.store(c_ptr + n[:, None] * N + n[None, :], c)


if _INTERPRET is not None:
    os.environ["TRITON_INTERPRET"] = _INTERPRET

# Bits of mantissa, bias, and the code of the largest finite number.
LAYOUT = {"e4m3": (3, 7, 0x7E), "e5m2": (2, 15, 0x7B)}
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
NAMES = sorted(LAYOUT)


def magnitude(code: int, name: str) -> Fraction:
    """The value of a finite code without its sign."""
    bits, bias, _ = LAYOUT[name]
    exponent, fraction = code >> bits, code & ((1 << bits) - 1)
    if exponent == 0:
        return Fraction(fraction, 1 << bits) * Fraction(2) ** (1 - bias)
    return (1 + Fraction(fraction, 1 << bits)) * Fraction(2) ** (exponent - bias)


def rounded(value: Fraction | str, name: str, *, relu: bool = False) -> int:
    """The code of a value, as `to_fraction` gives it: integers only, from the definition."""
    bits, bias, largest = LAYOUT[name]
    if value == "nan":
        return 0x7F
    negative = value in ("-0", "-inf") or (not isinstance(value, str) and value < 0)
    if negative and relu:
        return 0
    sign = negative << 7
    if value in ("inf", "-inf"):
        return sign | largest
    if value in (0, "-0"):
        return sign
    size = abs(value)
    # Floats have powers of two as denominators: the difference of lengths is the exponent.
    exponent = max(size.numerator.bit_length() - size.denominator.bit_length(), 1 - bias)
    # Python's round takes ties to even. A carry into the exponent is the right next code.
    whole = round(size / Fraction(2) ** (exponent - bits))
    return sign | min(whole + ((exponent + bias - 1) << bits), largest)


def hard_f32(name: str) -> np.ndarray:
    """Every finite code, every midpoint, both neighbours of each, and values of all sizes; bits."""
    finite = [magnitude(code, name) for code in range(LAYOUT[name][2] + 1)]
    # The last midpoint is with the number that would follow the largest.
    beyond = 2 * finite[-1] - finite[-2]
    middles = [(low + high) / 2 for low, high in zip(finite, [*finite[1:], beyond], strict=True)]
    points = np.array([float(v) for v in finite + middles], np.float32)
    assert [Fraction(float(p)) for p in points] == finite + middles
    near = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), points[1:]])
    near[-len(points) + 1 :] = np.nextafter(points[1:], np.float32(0))
    rng = np.random.default_rng(0)
    specials = [0, 1, 0x7FFFFF, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF]
    bits = np.concatenate([near.view(np.uint32), rng.integers(0, 2**31, 500, np.uint32)])
    bits = np.concatenate([bits, np.array(specials, np.uint32)])
    return np.concatenate([bits, bits | np.uint32(1 << 31)])


def wanted(bits: np.ndarray, source: str, name: str, *, relu: bool = False) -> np.ndarray:
    codes = [rounded(to_fraction(b, source), name, relu=relu) for b in bits.tolist()]
    return np.array(codes, np.uint8)


def from_singles(name: str, relu: str = "") -> tuple[np.ndarray, np.ndarray]:
    """What the instruction gives for `hard_f32` in both halves, and what it should."""
    low = hard_f32(name)
    high = np.random.default_rng(1).permutation(low)
    text = f"cvt.rn.satfinite{relu}.{name}x2.f32 {{y}}, {{x0}}, {{x1}};"
    got = evaluate(text, [high, low], 2)
    want = [wanted(x, "f32", name, relu=bool(relu)).astype(np.uint16) for x in (high, low)]
    return got, want[0] << np.uint16(8) | want[1]


@pytest.mark.parametrize("relu", ["", ".relu"])
@pytest.mark.parametrize("name", NAMES)
def test_f32_to_a_pair(name, relu):
    got, want = from_singles(name, relu)
    assert (got == want).all()
    # Nothing of the format is left out.
    assert set(want.view(np.uint8).tolist()) >= {*range(LAYOUT[name][2] + 1), 0x7F}


@pytest.mark.parametrize("relu", ["", ".relu"])
@pytest.mark.parametrize("name", NAMES)
def test_every_f16_to_a_pair(name, relu):
    low = np.arange(1 << 16, dtype=np.uint16)
    high = np.random.default_rng(2).permutation(low)
    packed = high.astype(np.uint32) << np.uint32(16) | low
    got = evaluate(f"cvt.rn.satfinite{relu}.{name}x2.f16x2 {{y}}, {{x0}};", [packed], 2)
    table = wanted(low, "f16", name, relu=bool(relu)).astype(np.uint16)
    assert (got == (table[high] << np.uint16(8) | table[low])).all()


@pytest.mark.parametrize("name", NAMES)
def test_casts_of_torch(name):
    """Versions of torch differ beyond the largest number; where its result is finite, as ours."""
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    singles = torch.from_numpy(hard_f32(name).view(np.int32)).view(torch.float32)
    for x, text, copies in ((halves, "f16x2 {y}, {x0}", 2), (singles, "f32 {y}, {x0}, {x0}", 1)):
        bits = x.repeat_interleave(copies).view(torch.int32).numpy().view(np.uint32)
        got = evaluate(f"cvt.rn.satfinite.{name}x2.{text};", [bits], 2).view(np.uint8)[::2]
        cast = x.to(TORCH[name])
        finite = cast.float().isfinite().numpy()
        assert (got == cast.view(torch.uint8).numpy())[finite].all()
        assert finite.sum() > len(x) / 3
        nan = x.isnan().numpy()
        assert (got[~finite & ~nan] & 0x7F == LAYOUT[name][2]).all()
        assert (got[nan] == 0x7F).all()


@pytest.mark.parametrize("relu", ["", ".relu"])
@pytest.mark.parametrize("name", NAMES)
def test_every_pair_to_f16(name, relu):
    pairs = np.arange(1 << 16, dtype=np.uint16)
    got = evaluate(f"cvt.rn{relu}.f16x2.{name}x2 {{y}}, {{x0}};", [pairs], 4)
    table = []
    for code in range(256):
        size, negative = code & 0x7F, code >> 7
        if size > LAYOUT[name][2]:
            # Above the largest number e5m2 has an infinity first.
            infinite = name == "e5m2" and size == 0x7C
            half = 0x7C00 | negative << 15 if infinite else 0x7FFF
        else:
            half = int(np.float16(float(magnitude(size, name))).view(np.uint16)) | negative << 15
        table.append(0 if relu and negative and half != 0x7FFF else half)
    halves = np.array(table, np.uint32)
    assert (got == (halves[pairs >> 8] << np.uint32(16) | halves[pairs & 0xFF])).all()
    # torch's widening, which keeps no NaN of its own.
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(TORCH[name]).half().numpy()
    plain = evaluate(f"cvt.rn.f16x2.{name}x2 {{y}}, {{x0}};", [pairs[:256]], 4)
    low = plain.view(np.float16)[::2]
    assert np.array_equal(low, codes, equal_nan=True)
    assert (np.signbit(low) == np.signbit(codes))[~np.isnan(codes)].all()


def test_a_constant_as_one_half():
    x = np.array([0x3F800000, 0xC0000000], np.uint32)
    got = evaluate("cvt.rn.satfinite.e4m3x2.f32 {y}, 0f43E00000, {x0};", [x], 2)
    assert got.tolist() == [0x7E38, 0x7EC0]
    got = evaluate("cvt.rn.satfinite.e5m2x2.f32 {y}, {x0}, 0f00000000;", [x], 2)
    assert got.tolist() == [0x3C00, 0xC000]


@pytest.mark.parametrize(
    ("text", "size", "message"),
    [
        ("cvt.rn.e4m3x2.f32 {y}, {x0}, {x0};", 2, "without .satfinite"),
        ("cvt.satfinite.e5m2x2.f16x2 {y}, {x0};", 2, "without .rn"),
        ("cvt.f16x2.e4m3x2 {y}, %h0;", 4, "without .rn"),
        ("cvt.rn.satfinite.f16x2.e4m3x2 {y}, %h0;", 4, "satfinite to f16x2"),
        ("cvt.rz.satfinite.e4m3x2.f32 {y}, {x0}, {x0};", 2, "unsupported modifier .rz"),
        ("cvt.rn.satfinite.e4m3x2.e5m2x2 {y}, %h0;", 2, "these types"),
        ("cvt.rn.f32.e4m3x2 {y}, %h0;", 4, "these types"),
        ("cvt.rn.satfinite.e4m3x2.f32 {y}, {x0}, {x0};", 4, "32-bit register %y for the result"),
        ("cvt.rn.satfinite.e4m3x2.f32 {y}, {x0};", 2, "only 2 operands"),
        ("cvt.rn.satfinite.f16x2.f32 {y}, {x0}, {x0};", 4, "unsupported modifier .satfinite"),
    ],
)
def test_what_the_instructions_do_not_have(text, size, message):
    with pytest.raises(UnsupportedPtx, match=re.escape(message)):
        evaluate(text, [np.zeros(1, np.uint32)], size)


def always_up(limits):
    """Ties away from zero: every midpoint itself rounds up."""
    return lambda name: np.where(
        np.arange(len(limits(name))) % 2 == 0,
        np.nextafter(limits(name), np.float32(0)),
        limits(name),
    )


def no_subnormals(limits):
    return lambda name: np.maximum(limits(name), float(magnitude(1 << LAYOUT[name][0], name)))


def one_number_more(limits):
    return lambda name: np.append(limits(name), np.float32(2) * limits(name)[-1])


@pytest.mark.parametrize("bug", [always_up, no_subnormals, one_number_more])
@pytest.mark.parametrize("name", NAMES)
def test_wrong_roundings_are_noticed(name, bug, monkeypatch):
    monkeypatch.setattr(conversion_fp8, "_limits", bug(conversion_fp8._limits))
    got, want = from_singles(name)
    assert (got != want).any()


# Triton's casts

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
CASTS = [(arch, source, name) for arch in (89, 90, 120) for source in DTYPES for name in NAMES]


def cast_case(source: str, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs of `cast_kernel`, a multiple of 512, and room for its results."""
    x = torch.from_numpy(hard_f32(name).view(np.int32)).view(torch.float32).to(DTYPES[source])
    x = torch.cat([x, x[: -len(x) % 512]])
    return x, torch.empty(len(x), dtype=TORCH[name]), torch.empty_like(x)


def right(ptx, source, name, x, coded, back) -> bool:
    """Whether the results of `cast_kernel` are what its instructions should give."""
    size = x.element_size()
    bits = x.view({2: torch.int16, 4: torch.int32}[size]).numpy().view(f"u{size}")
    if "cvt.rz.f16.f32" in ptx:
        # Before sm_90 Triton rounds to f16 first, towards zero, which loses on which side of a
        # midpoint a value lies.
        bits = evaluate("cvt.rz.f16.f32 {y}, {x0};", [bits], 2)
        source = "f16"
    codes = coded.view(torch.uint8).numpy()
    if (codes != wanted(bits, source, name)).any():
        return False
    # Every code is a number of all three wider types.
    wide, got = coded.float().numpy(), back.float().numpy()
    if name == "e5m2" and back.dtype == torch.bfloat16:
        # Triton does this without the instruction, and until its pull request 11784 is merged
        # takes a NaN for a number: exponent 16, mantissa 1.75.
        got = np.where((got == 1.75 * 2**16) & np.isnan(wide), np.nan, got)
    return np.array_equal(got, wide, equal_nan=True)


@pytest.mark.parametrize(("arch", "source", "name"), CASTS)
def test_casts_of_triton(arch, source, name):
    x, coded, back = cast_case(source, name)
    arguments = {"x_ptr": x, "coded_ptr": coded, "back_ptr": back, "BLOCK": 512}
    ptx = compile_triton(cast_kernel, arguments, arch=arch).ptx
    assert re.search(rf"cvt\.rn\.satfinite\.{name}x2", ptx)
    run_triton(
        cast_kernel, (len(x) // 512,), x, coded, back, BLOCK=512, arch=arch,
        uninitialised=[coded, back],
    )  # fmt: skip
    assert right(ptx, source, name, x, coded, back)


@pytest.mark.parametrize(
    ("pattern", "new"),
    [
        (r"(\.satfinite)(\.e4m3x2\.f32)", r"\1.relu\2"),
        (r"(cvt\.rn\.satfinite\.e4m3x2\.f32\s+\S+) (\S+), (\S+);", r"\1 \3, \2;"),
        (r"e4m3x2\.f32", "e5m2x2.f32"),
        (r"f16x2\.e4m3x2", "f16x2.e5m2x2"),
        (r"cvt\.rn\.f16x2", "cvt.rn.relu.f16x2"),
    ],
)
def test_bugs_planted_in_a_cast_of_triton(pattern, new):
    x, coded, back = cast_case("f32", "e4m3")
    arguments = {"x_ptr": x, "coded_ptr": coded, "back_ptr": back, "BLOCK": 512}
    built = compile_triton(cast_kernel, arguments, arch=90)
    broken, count = re.subn(pattern, new, built.ptx)
    assert count
    for ptx, expected in ((built.ptx, True), (broken, False)):
        Kernel(ptx).launch((len(x) // 512,), (built.threads,), [x, coded, back, 0, 0])
        assert right(built.ptx, "f32", "e4m3", x, coded, back) == expected


@pytest.mark.parametrize("arch", [89, 90])
def test_a_scaled_product_of_triton(arch):
    """Neither GPU multiplies with scales: Triton widens both to bf16, e4m3 by the instruction."""
    n, k = 128, 64
    a, b = torch.randn(n, k).to(TORCH["e4m3"]), torch.randn(k, n).to(TORCH["e5m2"])
    scales = [torch.randint(124, 131, (n, k // 32)).to(torch.uint8) for _ in range(2)]
    c = torch.empty(n, n)
    run_triton(
        scaled_kernel, (1,), a, scales[0], b, scales[1], c, n, k, arch=arch, uninitialised=[c]
    )
    factors = [torch.exp2(s.double() - 127).repeat_interleave(32, 1) for s in scales]
    x, y = a.double() * factors[0], b.double() * factors[1].T
    # Factors are exact in bf16 and so are products in float32: only the sum of k terms rounds.
    assert ((c - x @ y).abs() <= k * 2**-24 * (x.abs() @ y.abs())).all()


# NVIDIA's own arithmetic

HEADER = r"""
#include <cuda_fp8.h>
extern "C" __global__ void narrow(const float* x, const __half* h, unsigned char* out, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  out[4 * i] = __nv_cvt_float_to_fp8(x[i], __NV_SATFINITE, __NV_E4M3);
  out[4 * i + 1] = __nv_cvt_float_to_fp8(x[i], __NV_SATFINITE, __NV_E5M2);
  out[4 * i + 2] = __nv_cvt_halfraw_to_fp8(h[i], __NV_SATFINITE, __NV_E4M3);
  out[4 * i + 3] = __nv_cvt_halfraw_to_fp8(h[i], __NV_SATFINITE, __NV_E5M2);
}
extern "C" __global__ void widen(const unsigned char* x, __half* out) {
  out[2 * threadIdx.x] = __nv_cvt_fp8_to_halfraw(x[threadIdx.x], __NV_E4M3);
  out[2 * threadIdx.x + 1] = __nv_cvt_fp8_to_halfraw(x[threadIdx.x], __NV_E5M2);
}
"""


def of_the_header(arch: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of `hard_f32` and as many f16, uint8 [n, 4]; the 256 codes as f16 bits [256, 2]."""
    ptx = compiled(HEADER, arch)
    # Arithmetic up to sm_86, instructions from sm_89.
    assert (len(re.findall(r"cvt\.rn\.\S*e[45]m[32]x2", ptx)) == 6) == (int(arch[:2]) != 80)
    bits = np.concatenate([hard_f32(name) for name in NAMES])
    halves = np.resize(np.arange(0, 1 << 16, 11).astype(np.int16), len(bits))
    x = torch.from_numpy(bits.view(np.int32)).view(torch.float32)
    h = torch.from_numpy(halves).view(torch.float16)
    out = torch.empty(len(x), 4, dtype=torch.uint8)
    Kernel(ptx, "narrow").launch(
        (-(-len(x) // 256),), (256,), [x, h, out, len(x)], uninitialised=[out]
    )
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    wide = torch.empty(256, 2, dtype=torch.float16)
    Kernel(ptx, "widen").launch((1,), (256,), [codes, wide], uninitialised=[wide])
    return out, wide.view(torch.int16)


@pytest.mark.parametrize("arch", ["89", "90a"])
def test_the_header_of_cuda_gives_the_same_with_and_without_the_instructions(arch):
    for got, want in zip(of_the_header(arch), of_the_header("80"), strict=True):
        assert torch.equal(got, want)
