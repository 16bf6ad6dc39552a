"""wgmma against layouts and arithmetic written from the ISA's text, and what misuse reports."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from kimi_ops.testing.ptx import (
    Deadlock,
    Divergence,
    Kernel,
    LaunchError,
    MissingFence,
    MissingWait,
    OutOfBounds,
    PtxError,
    Race,
    Report,
    UnsupportedPtx,
)

HEADER = ".version 8.7\n.target sm_90a\n.address_size 64\n"
SIZES = {"f16": 2, "bf16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1, "s8": 1, "u8": 1}
MODES = {16: 0, 128: 1, 64: 2, 32: 3}


# Layouts, element by element


def place(i: int, k: int, size: int, span: int, mn: bool, leading: int, stride: int) -> int:
    """Byte of element (i, k) from the start of a matrix, before the swizzle.

    From the table of canonical layouts: atoms of 8 rows (K-major) or 8 values of k (MN-major), in
    each of which a line of ``span`` bytes runs along the major dimension.
    """
    major, minor = (i, k) if mn else (k, i)
    line, within = divmod(major * size, span)
    atom, row = divmod(minor, 8)
    if span == 16:
        # Without a swizzle the stride is along M or N, the leading offset along K.
        along, across = (stride, leading) if mn else (leading, stride)
    else:
        # K-major matrices never leave their line: k16 of 2 bytes are 32 bytes.
        along, across = leading, stride
        assert mn or line == 0
    return line * along + atom * across + row * span + within


def swizzled(address: int, span: int, base: int = 0) -> int:
    """Bits 4, 5, 6 XORed with bits 7, 8, 9, as many as the span has."""
    for bit in range({16: 0, 32: 1, 64: 2, 128: 3}[span]):
        address ^= ((address // 128 - base) >> bit & 1) << (4 + bit)
    return address


def extent(rows: int, columns: int, size: int, span: int, mn: bool) -> tuple[int, int, int]:
    """(leading, stride, bytes) of a dense matrix; gaps are left between atoms."""
    if mn:
        lines = -(-rows * size // span)
        if span == 16:
            stride, leading = 128 + 16, (128 + 16) * lines + 32
            return leading, stride, leading * 2
        leading, stride = 8 * span, 8 * span * lines
        return leading, stride, stride * (columns // 8)
    if span == 16:
        leading, stride = 128, 256 + 128
        return leading, stride, stride * (rows // 8)
    return 16, 8 * span, 8 * span * (rows // 8)


def bits_of(values: torch.Tensor, kind: str) -> np.ndarray:
    dtype = {
        "f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "s8": torch.int8,
        "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "u8": torch.uint8,
    }[kind]  # fmt: skip
    held = values.to(dtype)
    return held.view(torch.uint8).numpy().reshape(*values.shape, SIZES[kind])


class Operand:
    """A matrix [rows, K] put into an image of shared memory at ``start``."""

    def __init__(self, values, kind, span=128, mn=False, start=0, base=0):
        rows, columns = values.shape
        size = SIZES[kind]
        self.leading, self.stride, length = extent(rows, columns, size, span, mn)
        self.span, self.base, self.start = span, base, start
        self.end = start + -(-length // 1024) * 1024 + 1024
        self.bits, self.mn, self.size = bits_of(values, kind), mn, size

    def put(self, image: np.ndarray) -> None:
        for i, k in itertools.product(range(self.bits.shape[0]), range(self.bits.shape[1])):
            at = place(i, k, self.size, self.span, self.mn, self.leading, self.stride)
            at = swizzled(self.start + at, self.span, self.base)
            image[at : at + self.size] = self.bits[i, k]

    @property
    def fields(self) -> int:
        """The descriptor without its start."""
        return (
            self.leading // 16 << 16
            | self.stride // 16 << 32
            | self.base << 49
            | MODES[self.span] << 62
        )


# Fragments, as the figures of "Register Fragments" have them


def rows_and_columns_of_d(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column [128 threads, n / 2] of the accumulator."""
    thread, i = np.arange(128)[:, None], np.arange(n // 2)
    lane, warp = thread % 32, thread // 32
    return 16 * warp + lane // 4 + 8 * (i % 4 // 2), lane % 4 * 2 + i % 2 + i // 4 * 8


def registers_of_a(bits: np.ndarray) -> np.ndarray:
    """A [64, K, bytes] as uint8 [128 threads, 4 registers of 4 bytes]."""
    size = bits.shape[2]
    p = 4 // size
    out = np.zeros((128, 4, p, size), np.uint8)
    for thread, r, j in itertools.product(range(128), range(4), range(p)):
        warp, lane = divmod(thread, 32)
        row = 16 * warp + lane // 4 + (8 if r in (1, 3) else 0)
        column = lane % 4 * p + j + (4 * p if r >= 2 else 0)
        out[thread, r, j] = bits[row, column]
    return out.reshape(128, 16)


# A kernel around one instruction


def text(
    opcode: str,
    registers: int,
    image: int,
    descriptors: tuple[int, int],
    starts: tuple[int, int],
    rest: str,
    *,
    a_in_registers: bool,
    add: bool,
    repeat: str = "",
) -> str:
    d = ", ".join(f"%c{i}" for i in range(registers))
    a = "{%a0, %a1, %a2, %a3}" if a_in_registers else "%da"
    loads = "".join(f"ld.global.b32 %c{i}, [%p2+{4 * i}];" for i in range(registers))
    stores = "".join(f"st.global.b32 [%p3+{4 * i}], %c{i};" for i in range(registers))
    copies = "".join(
        f"ld.global.v4.b32 {{%t0, %t1, %t2, %t3}}, [%p0+{at}];"
        f"st.shared.v4.b32 [%s+{at}], {{%t0, %t1, %t2, %t3}};"
        for at in range(0, image, 2048)
    )
    return f"""{HEADER}.shared .align 1024 .b8 buffer[{image}];
.visible .entry k(.param .u64 p0, .param .u64 p1, .param .u64 p2, .param .u64 p3) {{
.reg .b32 %c<{registers}>; .reg .b32 %a<4>; .reg .b32 %t<4>; .reg .b32 %s; .reg .b32 %i;
.reg .b64 %p<4>; .reg .b64 %da; .reg .b64 %db; .reg .pred %add; .reg .b32 %w;
ld.param.u64 %p0, [p0]; ld.param.u64 %p1, [p1]; ld.param.u64 %p2, [p2]; ld.param.u64 %p3, [p3];
mov.u32 %i, %tid.x; mov.u32 %s, buffer; mad.lo.u32 %s, %i, 16, %s;
mad.wide.u32 %p0, %i, 16, %p0; mad.wide.u32 %p1, %i, 16, %p1;
mad.wide.u32 %p2, %i, {4 * registers}, %p2; mad.wide.u32 %p3, %i, {4 * registers}, %p3;
{copies}
fence.proxy.async.shared::cta;
bar.sync 0;
ld.global.v4.b32 {{%a0, %a1, %a2, %a3}}, [%p1];
{loads}
mov.u32 %w, buffer; add.u32 %w, %w, {starts[0]}; shr.u32 %w, %w, 4; cvt.u64.u32 %da, %w;
or.b64 %da, %da, {descriptors[0]:#x};
mov.u32 %w, buffer; add.u32 %w, %w, {starts[1]}; shr.u32 %w, %w, 4; cvt.u64.u32 %db, %w;
or.b64 %db, %db, {descriptors[1]:#x};
setp.eq.u32 %add, 0, {0 if add else 1};
wgmma.fence.sync.aligned;
{opcode} {{{d}}}, {a}, %db, %add{rest};
{repeat}
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
{stores}
ret; }}
"""


def multiply(
    kinds: tuple[str, str, str],
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    c: torch.Tensor | None = None,
    spans: tuple[int, int] = (128, 128),
    mn: tuple[bool, bool] = (False, False),
    registers: bool = False,
    signs: tuple[int, int] = (1, 1),
    base: int = 0,
    offset: int = 0,
    suffix: str = "",
    change=lambda text: text,
    seed: int | None = None,
) -> tuple[np.ndarray, Report]:
    """D = A B^T (+ C) by one instruction: bits of D [64, N], as the type of D has them."""
    kind_d, kind_a, kind_b = kinds
    n, k = b.shape
    left = Operand(a, kind_a, spans[0], mn[0], offset, base)
    right = Operand(b, kind_b, spans[1], mn[1], -(-left.end // 1024) * 1024 + offset, base)
    image = np.full(-(-right.end // 2048) * 2048, 0xFF, np.uint8)
    left.put(image)
    right.put(image)
    whole = kind_d == "s32"
    rest = "" if whole else f", {signs[0]}, {signs[1]}"
    if SIZES[kind_a] == 2:
        rest += f", {int(mn[1])}" if registers else f", {int(mn[0])}, {int(mn[1])}"
    opcode = f"wgmma.mma_async.sync.aligned.m64n{n}k{k}{suffix}.{kind_d}.{kind_a}.{kind_b}"
    per = 2 if kind_d == "f16" else 1
    row, column = rows_and_columns_of_d(n)
    dtype = {"f32": np.float32, "f16": np.float16, "s32": np.int32}[kind_d]
    before = np.zeros((64, n), dtype) if c is None else c.numpy().astype(dtype)
    held = np.ascontiguousarray(before[row, column]).view(np.int32)
    out = torch.zeros(held.shape, dtype=torch.int32)
    a_bits = registers_of_a(left.bits) if registers else np.zeros((128, 16), np.uint8)
    ptx = text(
        opcode, n // 2 // per, len(image), (left.fields, right.fields), (left.start, right.start),
        rest, a_in_registers=registers, add=c is not None,
    )  # fmt: skip
    tensors = [torch.from_numpy(x.copy()) for x in (image, a_bits, held)]
    report = Kernel(change(ptx)).launch(
        (1,), (128,), [*tensors, out], uninitialised=[out], seed=seed
    )
    d = np.zeros((64, n), dtype)
    d[row, column] = out.numpy().view(dtype).reshape(row.shape)
    return d, report


def small(rows: int, columns: int, kind: str, seed: int = 0) -> torch.Tensor:
    """Integers whose products and sums are exact in every type."""
    low = 0 if kind == "u8" else -4
    generator = torch.Generator().manual_seed(seed + rows)
    return torch.randint(low, 5, (rows, columns), generator=generator).float()


LAYOUTS = list(itertools.product((16, 32, 64, 128), (False, True)))


@pytest.mark.parametrize(("span_a", "mn_a"), LAYOUTS)
def test_layouts_in_shared_memory(span_a, mn_a):
    """All swizzles and majors of A with all of B; N of more than one swizzle line."""
    for number, (span_b, mn_b) in enumerate(LAYOUTS):
        n = (72, 128)[number % 2]
        a, b = small(64, 16, "bf16", number), small(n, 16, "bf16", number + 9)
        d, report = multiply(("f32", "bf16", "bf16"), a, b, spans=(span_a, span_b), mn=(mn_a, mn_b))
        assert np.array_equal(d, (a @ b.T).numpy()), (span_b, mn_b)
        total = report.total
        assert total.multiply_adds == 64 * n * 16
        assert dict(total.tensor) == {"wgmma bf16.f32": 64 * n * 16}
        assert total.matrix_shared_bytes == (64 + n) * 32
        assert total.matrix_shared_wavefronts == (64 + n) * 32 // 128
        assert total.instructions["matrix"] == 4 * 4


@pytest.mark.parametrize("span", [32, 64, 128])
def test_step_inside_a_swizzle_atom_and_base_offset(span):
    """A start 32 bytes on, in the same pattern; a pattern 128 bytes off its boundary."""
    a, b = small(64, 16, "f16"), small(24, 16, "f16")
    kinds = ("f32", "f16", "f16")
    if span > 32:
        # The swizzle looks at the address, so the placement at an offset start is what it was.
        d, _ = multiply(kinds, a, b, spans=(span, span), offset=32)
        assert np.array_equal(d, (a @ b.T).numpy())
    d, _ = multiply(kinds, a, b, spans=(span, span), offset=128, base=1)
    assert np.array_equal(d, (a @ b.T).numpy())


TYPES = [
    ("f32", "f16", "f16"), ("f16", "f16", "f16"), ("f32", "bf16", "bf16"), ("f32", "tf32", "tf32"),
    *((d, a, b) for d in ("f32", "f16") for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")),
    *(("s32", a, b) for a in ("s8", "u8") for b in ("s8", "u8")),
]  # fmt: skip


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("kinds", TYPES)
def test_types_signs_and_accumulation(kinds, registers):
    k = 32 // SIZES[kinds[1]]
    a, b = small(64, k, kinds[1]), small(32, k, kinds[2])
    want = (a @ b.T).numpy()
    d, _ = multiply(kinds, a, b, registers=registers, spans=(32, 64))
    assert np.array_equal(d, want)
    c = torch.arange(64 * 32).reshape(64, 32) % 37 - 11
    d, _ = multiply(kinds, a, b, c=c, registers=registers, spans=(16, 16), seed=0)
    assert np.array_equal(d, want + c.numpy())
    if kinds[0] != "s32":
        for signs in ((1, -1), (-1, 1), (-1, -1)):
            d, _ = multiply(kinds, a, b, c=c, registers=registers, signs=signs)
            assert np.array_equal(d, signs[0] * signs[1] * want + c.numpy())


def test_every_width():
    for n in range(8, 257, 8):
        a, b = small(64, 16, "bf16", n), small(n, 16, "bf16", n)
        d, _ = multiply(("f32", "bf16", "bf16"), a, b, registers=n % 16 == 0)
        assert np.array_equal(d, (a @ b.T).numpy())
        a, b = small(64, 32, "s8", n), small(n, 32, "s8", n)
        if n <= 32 or n % 16 == 0:
            d, _ = multiply(("s32", "s8", "s8"), a, b)
            assert np.array_equal(d, (a @ b.T).numpy())
        else:
            with pytest.raises(UnsupportedPtx, match=rf"m64n{n}k32"):
                multiply(("s32", "s8", "s8"), a, b)


def test_every_eight_bit_float():
    """All 256 codes of both formats against torch's conversion, through a product with 1."""
    codes = torch.arange(256, dtype=torch.uint8)
    for kind, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        values = codes.view(dtype).float()
        for rows in values.split(64):
            a = torch.zeros(64, 32)
            a[:, 5] = rows
            b = torch.zeros(8, 32)
            b[:, 5] = 1
            d, _ = multiply(("f32", kind, "e5m2"), a, b)
            want = rows.numpy()
            assert np.array_equal(d[:, 0], want, equal_nan=True)


def test_rounding_nan_and_infinity():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(n, 16, generator=generator).bfloat16().float() for n in (64, 40))
    c = torch.randn(64, 40, generator=generator)
    d, _ = multiply(("f32", "bf16", "bf16"), a, b, c=c)
    exact = a.double() @ b.double().T + c.double()
    bound = 17 * 2**-24 * (a.double().abs() @ b.double().abs().T + c.double().abs())
    assert (np.abs(d - exact.numpy()) <= bound.numpy()).all()
    # tf32 leaves out the low 13 bits of its operands, whatever they are.
    whole = small(64, 8, "tf32")
    dirty = (whole.view(torch.int32) | 0x1FFF).view(torch.float32)
    b8 = small(8, 8, "tf32")
    dirty[whole == 0] = 0
    d, _ = multiply(("f32", "tf32", "tf32"), dirty, b8)
    assert np.array_equal(d, (whole @ b8.T).numpy())
    # Positions of NaN and infinity; the NaN is the canonical one.
    a, b = small(64, 16, "f16"), small(8, 16, "f16").abs() + 1
    a[3, 2], a[5, 7], a[9, 1] = float("nan"), float("inf"), float("-inf")
    b[4, 7] = float("-inf")
    d, _ = multiply(("f32", "f16", "f16"), a, b)
    want = (a.double() @ b.double().T).numpy()
    assert np.array_equal(np.isnan(d), np.isnan(want))
    assert np.array_equal(d[~np.isnan(d)], want[~np.isnan(want)])
    assert set(d.view(np.uint32)[np.isnan(d)].tolist()) == {0x7FFFFFFF}
    # A result in f16 is rounded to it, and overflows to infinity.
    a, b = torch.full((64, 16), 90.0), torch.full((8, 16), 60.0)
    d, _ = multiply(("f16", "f16", "f16"), a, b)
    assert np.isinf(d).all()
    d, _ = multiply(("f16", "f16", "f16"), a / 90, b / 60, c=torch.full((64, 8), 2048.0))
    assert (d == 2064).all()
    d, _ = multiply(("f16", "f16", "f16"), a * 0 + 0.25, b * 0 + 0.25, c=torch.full((64, 8), 2048))
    assert (d == 2048).all()  # 2049, half way, to even


def test_integers_wrap_or_saturate():
    a, b = torch.full((64, 32), 255), torch.full((8, 32), 255)
    c = torch.full((64, 8), 2**31 - 7)
    wrapped, _ = multiply(("s32", "u8", "u8"), a, b, c=c)
    assert (wrapped == 2**31 - 7 + 255 * 255 * 32 - 2**32).all()
    stopped, _ = multiply(("s32", "u8", "u8"), a, b, c=c, suffix=".satfinite")
    assert (stopped == 2**31 - 1).all()


# Misuse


def replaced(old: str, new: str, count: int = 1):
    def change(ptx: str) -> str:
        assert old in ptx
        return ptx.replace(old, new, count)

    return change


def broken(change, *, registers: bool = False, seed: int | None = None, add: bool = True):
    a, b = small(64, 16, "bf16"), small(16, 16, "bf16")
    c = torch.ones(64, 16) if add else None
    d, _ = multiply(
        ("f32", "bf16", "bf16"), a, b, c=c, registers=registers, change=change, seed=seed
    )
    assert np.array_equal(d, (a @ b.T).numpy() + (1 if add else 0))


COMMIT = "wgmma.commit_group.sync.aligned;"
WAIT = "wgmma.wait_group.sync.aligned 0;"
FENCE = "wgmma.fence.sync.aligned;"
PROXY = "fence.proxy.async.shared::cta;"
OTHER = (
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%c0, %c1, %c2, %c3}, %da, %db, %add, "
    "1, 1, 0, 0;"
)
SAME = (
    "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%c0, %c1, %c2, %c3, %c4, %c5, %c6, %c7},"
    " %da, %db, %add, 1, 1, 0, 0;"
)
SAME_OF_REGISTERS = SAME.replace("%da,", "{%a0, %a1, %a2, %a3},").replace("0, 0;", "0;")
MISUSE = {
    "no wgmma.fence at all": (FENCE, "", MissingFence, "no wgmma.fence before the first"),
    "accumulator written after the fence": (
        FENCE, f"{FENCE} mov.b32 %c5, 0;", MissingFence, r"%c5, accessed at PTX line \d+, is used",
    ),
    "accumulator read after the fence": (
        FENCE, f"{FENCE} mov.b32 %w, %c7;", MissingFence, "%c7, accessed",
    ),
    "other shape without a fence": (
        COMMIT, f"{COMMIT} {WAIT} {OTHER} {COMMIT}", MissingFence, "%c0, accessed",
    ),
    "other shape without a wait": (COMMIT, f"{FENCE} {OTHER} {COMMIT}", MissingWait, "%c0 is used"),
    "no wait": (WAIT, "", MissingWait, "register %c0 is read while the wgmma issued at PTX line"),
    "wait for all but one": (
        WAIT, WAIT.replace("0", "1"), MissingWait, "register %c0 is read",
    ),
    "no commit": (COMMIT, "", MissingWait, "register %c0 is read"),
    "accumulator read before the wait": (
        COMMIT, f"{COMMIT} mov.b32 %w, %c3;", MissingWait, "register %c3 is read",
    ),
    "accumulator written before the wait": (
        COMMIT, f"{COMMIT} mov.b32 %c3, 0;", MissingWait, "register %c3 is written",
    ),
    "accumulator changed before the wait": (
        COMMIT, f"{COMMIT} add.u32 %c3, %c3, 0;", MissingWait, "register %c3 is changed",
    ),
    "no proxy fence": (PROXY, "", MissingFence, "without a fence.proxy.async after the write"),
    "no barrier": ("bar.sync 0;", "", Race, "not ordered after the write by warp"),
    "overwritten before the wait": (
        COMMIT, f"{COMMIT} st.shared.b32 [%s], %i;", Race, "asynchronous read issued at PTX line",
    ),
    "copied over before the wait": (
        COMMIT, f"{COMMIT} cp.async.cg.shared.global [%s], [%p0], 16;", Race, "asynchronous read",
    ),
    "exits in flight": (WAIT, "exit;", MissingWait, "exits with this wgmma in flight"),
    "past the end": (
        "or.b64 %db, %db,", "add.u64 %db, %db, 0x1000; or.b64 %db, %db,", OutOfBounds,
        "matrix B ends at shared memory",
    ),
    "reserved bits": (
        "or.b64 %da, %da,", "or.b64 %da, %da, 0x8000; or.b64 %da, %da,", PtxError,
        "bits 0x8000 belong to no field",
    ),
    "descriptor not uniform": (
        "or.b64 %db, %db,", "cvt.u64.u32 %db, %i; or.b64 %db, %db,", Divergence,
        "descriptor of B differs",
    ),
    "scale-d not uniform": (
        FENCE, f"{FENCE} setp.lt.u32 %add, %i, 32;", Divergence, "scale-d differs",
    ),
    "one warp alone": (
        FENCE, f"setp.ge.u32 %add, %i, 32; @%add exit; {FENCE}", Deadlock, r"only warps \[0\] come",
    ),
    "one lane not": (
        FENCE, f"setp.eq.u32 %add, %i, 77; @%add bra L; {FENCE} L:", Divergence, "lanes 0x00002000",
    ),
    "two places": (
        FENCE, f"setp.lt.u32 %add, %i, 64; @%add bra L; {FENCE} bra M; L: {FENCE} M:", Divergence,
        "different instructions",
    ),
    "predicated": (FENCE, f"@%add {FENCE}", UnsupportedPtx, "predicated"),
    "another target": ("sm_90a", "sm_100a", UnsupportedPtx, "needs sm_90a"),
    "sparse": ("mma_async.sync", "mma_async.sp.sync", UnsupportedPtx, r"\.sp"),
    "scale of 2": ("%add, 1, 1", "%add, 2, 1", UnsupportedPtx, "scale"),
    "bf16 result": ("f32.bf16.bf16", "bf16.bf16.bf16", UnsupportedPtx, "combination of types"),
    "mixed types": ("f32.bf16.bf16", "f32.bf16.f16", UnsupportedPtx, "combination of types"),
    "a register twice": ("{%c0, %c1", "{%c1, %c1", UnsupportedPtx, "used twice"),
    "a register less": ("{%c0, %c1", "{%c1", UnsupportedPtx, "7 registers of D"),
}  # fmt: skip


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_the_right_kernel_passes(seed):
    broken(lambda ptx: ptx, seed=seed)
    broken(lambda ptx: ptx, registers=True, seed=seed)


@pytest.mark.parametrize("registers", [False, True])
def test_operations_of_one_shape_need_neither_fence_nor_wait_between_them(registers):
    """Accumulators of one shape, and an A in registers that several operations read."""
    a, b = small(64, 16, "bf16"), small(16, 16, "bf16")
    same = SAME_OF_REGISTERS if registers else SAME

    def change(ptx: str) -> str:
        return ptx.replace(COMMIT, f"{same} {COMMIT} {same} {COMMIT}").replace(
            WAIT, f"{FENCE} {WAIT}"
        )

    d, report = multiply(
        ("f32", "bf16", "bf16"), a, b, c=torch.ones(64, 16), registers=registers, change=change
    )
    assert np.array_equal(d, 3 * (a @ b.T).numpy() + 1)
    assert report.total.multiply_adds == 3 * 64 * 16 * 16


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_reported(name):
    old, new, error, message = MISUSE[name]
    with pytest.raises(error, match=message):
        broken(replaced(old, new))


# Registers of warpgroups


def registers(body: str, *, directives: str = ".maxnreg 128", threads: int = 256, seed=None):
    """A kernel of two warpgroups; %p is true in the first."""
    Kernel(
        f"""{HEADER}.visible .entry k() {directives} {{ .reg .b32 %i; .reg .pred %p;
        mov.u32 %i, %tid.x; setp.lt.u32 %p, %i, 128; {body} ret; }}"""
    ).launch((3,), (threads,), [], seed=seed)


HANDOVER = """@%p bra A; setmaxnreg.inc.sync.aligned.u32 216; bar.sync 1, 128;
setmaxnreg.dec.sync.aligned.u32 40; bra B;
A: setmaxnreg.dec.sync.aligned.u32 40; bar.sync 2, 128; setmaxnreg.inc.sync.aligned.u32 216; B:"""


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
@pytest.mark.parametrize(
    "directives", [".maxnreg 128", ".maxnreg 121", ".maxntid 256 .minnctapersm 2"]
)
def test_registers_go_from_one_warpgroup_to_the_other_and_back(directives, seed):
    registers(HANDOVER, directives=directives, seed=seed)


@pytest.mark.parametrize(
    ("old", "new", "directives", "error", "message"),
    [
        ("u32 216", "u32 224", ".maxnreg 128", Deadlock,
         r"inc to 224 registers .* hold \[40, 128\] a thread, the pool has 88"),
        ("A: setmaxnreg.dec.sync.aligned.u32 40;", "A:", ".maxnreg 128", Deadlock, "pool has 0"),
        ("", "", ".maxnreg 120", Deadlock, "pool has 80"),
        ("u32 216", "u32 48", ".maxnreg 128", PtxError, "setmaxnreg.inc to 48 .* that has 128"),
        ("A: setmaxnreg.dec.sync.aligned.u32 40", "A: setmaxnreg.dec.sync.aligned.u32 136",
         ".maxnreg 128", PtxError, "setmaxnreg.dec to 136 .* that has 128"),
        ("bar.sync 2, 128;", "", ".maxnreg 128", Race, "not ordered after the last one"),
        ("u32 216", "u32 264", ".maxnreg 128", UnsupportedPtx, "264 registers: not a multiple"),
        ("u32 40", "u32 16", ".maxnreg 128", UnsupportedPtx, "16 registers: not a multiple"),
        ("", "", ".maxntid 256", LaunchError, "ptxas ignores setmaxnreg"),
        ("", "", "", LaunchError, "ptxas ignores setmaxnreg"),
        ("A:", "A: setp.lt.u32 %p, %i, 32; @%p bra B;", ".maxnreg 128", Deadlock,
         "the pool has 0|only warps"),
        ("sync.aligned.u32 216", "u32 216", ".maxnreg 128", UnsupportedPtx, "sync.aligned"),
    ],
)  # fmt: skip
def test_misuse_of_the_register_pool(old, new, directives, error, message):
    assert old in HANDOVER
    with pytest.raises(error, match=message):
        registers(HANDOVER.replace(old, new, 1) if old else HANDOVER, directives=directives)


def test_a_warpgroup_is_four_warps():
    with pytest.raises(Divergence, match="outside of any warpgroup of four: the CTA has 6 warps"):
        registers("setmaxnreg.dec.sync.aligned.u32 40;", threads=192)
