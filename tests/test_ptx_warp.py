"""Warp collectives, matrix instructions and memory of the emulator, against plain formulations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx_text import run

from kimi_ops.testing.ptx import UnsupportedPtx

STORE = "mad.wide.u32 %d9, %r0, 4, %d{n}; st.global.b32 [%d9], %r9;"
LOAD = "mad.wide.u32 %d8, %r0, 4, %d0; ld.global.b32 %r1, [%d8];"


def collective(text: str, values: np.ndarray, threads: int = 64) -> np.ndarray:
    """%r9 of each thread after ``text`` with %r1 its value."""
    x = torch.from_numpy(values.astype(np.uint32).view(np.int32).copy())
    out = torch.zeros(threads, dtype=torch.int32)
    run(LOAD + text + STORE.format(n=1), x, out, threads=threads, uninitialised=[out])
    return out.numpy().view(np.uint32)


VALUES = np.random.default_rng(0).integers(0, 2**32, 64)


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 4])
@pytest.mark.parametrize("by", [0, 1, 3, 17, 31])
def test_shfl(mode, width, by):
    """As CUDA C++ defines __shfl_*_sync by width; the clamp operand is what its headers make."""
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    text = f"shfl.sync.{mode}.b32 %r9|%p1, %r1, {by}, {clamp}, -1; @!%p1 xor.b32 %r9, %r9, -1;"
    got = collective(text, VALUES)
    for thread in range(64):
        lane = thread % 32
        start = lane // width * width
        source = {
            "up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": start + by % width,
        }[mode]  # fmt: skip
        inside = source >= start if mode == "up" else source < start + width
        want = VALUES[thread // 32 * 32 + source] if inside else VALUES[thread] ^ 0xFFFFFFFF
        assert got[thread] == want, thread


def test_vote_and_masks():
    flags = VALUES & 1
    test = "and.b32 %r2, %r1, 1; setp.ne.b32 %p1, %r2, 0;"
    ballots = [sum(int(f) << i for i, f in enumerate(flags[w : w + 32])) for w in (0, 32)]
    got = collective(test + "vote.sync.ballot.b32 %r9, %p1, -1;", VALUES)
    assert got.tolist() == [ballots[0]] * 32 + [ballots[1]] * 32
    for values, wants in ((VALUES | 1, (1, 1, 1)), (VALUES & ~1, (0, 0, 1)), (VALUES, (0, 1, 0))):
        for kind, want in zip(("all", "any", "uni"), wants, strict=True):
            text = f"vote.sync.{kind}.pred %p2, %p1, -1; selp.b32 %r9, 1, 0, %p2;"
            assert set(collective(test + text, values).tolist()) == {want}
    # Within a branch only the lanes that took it.
    text = test + "mov.b32 %r9, 0; @!%p1 bra E; activemask.b32 %r9; E:"
    got = collective(text, VALUES)
    want = [ballots[i // 32] if flags[i] else 0 for i in range(64)]
    assert got.tolist() == want


@pytest.mark.parametrize(
    "kind", ["add.u32", "min.u32", "max.u32", "min.s32", "max.s32", "and.b32", "or.b32", "xor.b32"]
)
def test_redux(kind):
    values = VALUES.astype(np.uint32)
    rows = values.reshape(2, 32)
    rows = rows.view(np.int32) if "s32" in kind else rows
    function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
                "or": np.bitwise_or, "xor": np.bitwise_xor}[kind[:3].strip(".")]  # fmt: skip
    want = function.reduce(rows, axis=1, dtype=rows.dtype).view(np.uint32).repeat(32)
    assert (collective(f"redux.sync.{kind} %r9, %r1, -1;", values) == want).all()


def test_redux_of_parts_of_a_warp():
    """Two masks at once in one warp: each half gets its own sum."""
    text = (
        "setp.lt.u32 %p1, %r0, 16; selp.b32 %r2, 0xFFFF, 0xFFFF0000, %p1;"
        "redux.sync.add.u32 %r9, %r1, %r2;"
    )
    got = collective(text, VALUES[:32], threads=32)
    want = [int(VALUES[:16].sum()) & 0xFFFFFFFF] * 16 + [int(VALUES[16:32].sum()) & 0xFFFFFFFF] * 16
    assert got.tolist() == want


def test_match_and_elect():
    values = VALUES % 5
    got = collective("match.any.sync.b32 %r9, %r1, -1;", values)
    for i in range(64):
        base = i // 32 * 32
        assert got[i] == sum(1 << j for j in range(32) if values[base + j] == values[i])
    text = "elect.sync %r2|%p1, 0xFFFFFFF0; selp.b32 %r9, %r2, 99, %p1;"
    got = collective(
        "setp.lt.u32 %p2, %r0, 4; mov.b32 %r9, 7; @%p2 bra E;" + text + "E:", values, 32
    )
    assert got.tolist() == [7] * 4 + [4] + [99] * 27


# Matrix instructions. Fragments follow the figures of the ISA, written out
# element by element.


def fragment(kind: str, lane: int, i: int, size: int) -> tuple[int, int]:
    """(row, column) of element i that a lane holds, by the ISA's formulas."""
    group, member = lane >> 2, lane & 3
    if kind == "c":
        return group + (8 if i >= 2 else 0), member * 2 + (i & 1)
    if size == 2:
        if kind == "a":
            row = group if i < 2 or 4 <= i < 6 else group + 8
            return row, member * 2 + (i & 1) + (8 if i >= 4 else 0)
        return member * 2 + (i & 1) + (8 if i >= 2 else 0), group
    if size == 4:
        if kind == "a":
            return group + (8 if i in (1, 3) else 0), member + (4 if i >= 2 else 0)
        return member + (4 if i == 1 else 0), group
    if kind == "a":
        row = group if i < 4 or 8 <= i < 12 else group + 8
        return row, member * 4 + (i & 3) + (16 if i >= 8 else 0)
    return member * 4 + (i & 3) + (16 if i >= 4 else 0), group


MMA = [
    ("m16n8k8", "f32", "f16", 8), ("m16n8k16", "f32", "f16", 16), ("m16n8k16", "f16", "f16", 16),
    ("m16n8k8", "f32", "bf16", 8), ("m16n8k16", "f32", "bf16", 16),
    ("m16n8k4", "f32", "tf32", 4), ("m16n8k8", "f32", "tf32", 8),
    ("m16n8k16", "s32", "s8", 16), ("m16n8k32", "s32", "s8", 32), ("m16n8k32", "s32", "u8", 32),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "acc", "kind", "k"), MMA)
def test_mma(shape, acc, kind, k):
    """Small integers, which every format holds: the product is exact, so any wrong place shows."""
    rng = np.random.default_rng(k)
    low = 0 if kind == "u8" else -3
    a, b = rng.integers(low, 4, (16, k)), rng.integers(low, 4, (k, 8))
    c = rng.integers(-9, 9, (16, 8))
    size = {"f16": 2, "bf16": 2, "tf32": 4, "s8": 1, "u8": 1}[kind]
    torch_kind = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32,
                  "s8": torch.int8, "u8": torch.uint8, "f32": torch.float32,
                  "s32": torch.int32}  # fmt: skip

    def spread(matrix, which, count, dtype):
        values = [
            [matrix[fragment(which, lane, i, size)] for i in range(count)] for lane in range(32)
        ]
        return torch.tensor(np.array(values)).to(dtype).view(torch.int32).contiguous()

    na, nb = 16 * k // 32, 8 * k // 32
    fa, fb = spread(a, "a", na, torch_kind[kind]), spread(b, "b", nb, torch_kind[kind])
    fc = spread(c, "c", 4, torch_kind[acc])
    ra, rb, rc = fa.shape[1], fb.shape[1], fc.shape[1]
    out = torch.zeros_like(fc)

    def registers(first, count):
        return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"

    body = ""
    for tensor, first, count in ((0, 10, ra), (1, 14, rb), (2, 20, rc)):
        body += f"mad.wide.u32 %d8, %r0, {4 * count}, %d{tensor};"
        body += "".join(f"ld.global.b32 %r{first + i}, [%d8+{4 * i}];" for i in range(count))
    body += (
        f"mma.sync.aligned.{shape}.row.col.{acc}.{kind}.{kind}.{acc} {registers(24, rc)},"
        f"{registers(10, ra)}, {registers(14, rb)}, {registers(20, rc)};"
        f"mad.wide.u32 %d8, %r0, {4 * rc}, %d3;"
    )
    body += "".join(f"st.global.b32 [%d8+{4 * i}], %r{24 + i};" for i in range(rc))
    report = run(body, fa, fb, fc, out)
    got = out.view(torch_kind[acc]).reshape(32, 4).double().numpy()
    want = a @ b + c
    for lane in range(32):
        for i in range(4):
            assert got[lane, i] == want[fragment("c", lane, i, size)]
    assert report.total.multiply_adds == 16 * 8 * k


def test_mma_reads_tf32_without_the_low_bits():
    """The tensor core sees 19 bits of a tf32 operand."""
    x = torch.full((32, 4), 1.0).view(torch.int32) | 0x1FFF
    y, c, out = torch.ones(32, 2), torch.zeros(32, 4), torch.zeros(32, 4)
    body = "mad.wide.u32 %d8, %r0, 16, %d0; ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d8];"
    body += "mad.wide.u32 %d8, %r0, 8, %d1; ld.global.v2.b32 {%r14, %r15}, [%d8];"
    body += "mov.f32 %f0, 0f00000000; mad.wide.u32 %d8, %r0, 16, %d3;"
    body += "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1, %f2, %f3, %f4},"
    body += "{%r10, %r11, %r12, %r13}, {%r14, %r15}, {%f0, %f0, %f0, %f0};"
    body += "st.global.v4.f32 [%d8], {%f1, %f2, %f3, %f4};"
    run(body, x, y, c, out)
    assert (out == 8).all()


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count, trans):
    """Lanes 8j..8j+7 point at the rows of matrix j; lane l gets row l/4, columns 2(l%4)+i."""
    rows = torch.arange(8 * count * 8, dtype=torch.int16).reshape(8 * count, 8)
    out = torch.zeros(32, count, dtype=torch.int32)
    back = torch.zeros_like(rows)
    regs = "{" + ", ".join(f"%r{10 + i}" for i in range(count)) + "}"
    dot = ".trans" if trans else ""
    body = f"""
    mov.u32 %r1, buffer; and.b32 %r3, %r0, {8 * count - 1}; mad.lo.u32 %r1, %r3, 16, %r1;
    mad.wide.u32 %d8, %r3, 16, %d0;
    ld.global.v4.b32 {{%r5, %r6, %r7, %r8}}, [%d8];
    st.shared.v4.b32 [%r1], {{%r5, %r6, %r7, %r8}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x{count}{dot}.shared.b16 {regs}, [%r1];
    mad.wide.u32 %d9, %r0, {4 * count}, %d1;
    """
    body += "".join(f"st.global.b32 [%d9+{4 * i}], %r{10 + i};" for i in range(count))
    body += f"""
    stmatrix.sync.aligned.m8n8.x{count}{dot}.shared.b16 [%r1+512], {regs};
    bar.sync 0;
    ld.shared.v4.b32 {{%r5, %r6, %r7, %r8}}, [%r1+512];
    mad.wide.u32 %d8, %r3, 16, %d2;
    st.global.v4.b32 [%d8], {{%r5, %r6, %r7, %r8}};
    """
    run(body, rows, out, back, declarations=".shared .align 16 .b8 buffer[1024];")
    got = out.view(torch.int16).reshape(32, count, 2)
    for lane in range(32):
        for j in range(count):
            for i in range(2):
                row, column = lane // 4, 2 * (lane % 4) + i
                if trans:
                    row, column = column, row
                assert got[lane, j, i] == rows[8 * j + row, column]
    assert torch.equal(back, rows)


ATOMICS = {
    "add.u32": lambda old, v: (old + v) % 2**32, "max.u32": max, "min.u32": min,
    "exch.b32": lambda old, v: v, "and.b32": lambda old, v: old & v,
    "or.b32": lambda old, v: old | v, "xor.b32": lambda old, v: old ^ v,
    "inc.u32": lambda old, v: 0 if old >= v else old + 1,
    "dec.u32": lambda old, v: v if old == 0 or old > v else old - 1,
}  # fmt: skip


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("kind", ATOMICS)
def test_atomics(kind, space):
    """64 threads on three cells: the old values are a chain from the first to the last."""
    cells = torch.tensor([5, 1000, -1], dtype=torch.int32)
    values = torch.from_numpy(VALUES.astype(np.uint32).view(np.int32).copy()) % 1000
    olds = torch.zeros(64, dtype=torch.int32)
    inner = f"atom.global.{kind} %r9, [%d8], %r1;"
    declarations = ""
    if space == "shared":
        declarations = ".shared .align 4 .b8 cell[12];"
        inner = f"""
        mov.u64 %d7, cell; mad.wide.u32 %d6, %r2, 4, %d7; setp.lt.u32 %p1, %r0, 3;
        @%p1 ld.global.b32 %r4, [%d8]; @%p1 st.shared.b32 [%d6], %r4; bar.sync 0;
        atom.shared.{kind} %r9, [%d6], %r1; bar.sync 0;
        @%p1 ld.shared.b32 %r4, [%d6]; @%p1 st.global.b32 [%d8], %r4;
        """
    body = LOAD + f"rem.u32 %r2, %r0, 3; mad.wide.u32 %d8, %r2, 4, %d2;{inner}" + STORE.format(n=1)
    before = cells.numpy().view(np.uint32).tolist()
    report = run(body, values, olds, cells, threads=64, declarations=declarations)
    for cell in range(3):
        at = before[cell]
        for thread in range(cell, 64, 3):
            assert olds.numpy().view(np.uint32)[thread] == at
            at = ATOMICS[kind](at, int(values.numpy().view(np.uint32)[thread]))
        assert cells.numpy().view(np.uint32)[cell] == at
    assert report.total.atomics == 64


def test_float_atomics_and_compare_and_swap():
    cells = torch.tensor([0.5, 0.0])
    run(
        "cvt.rn.f32.u32 %f1, %r0; red.global.add.f32 [%d0], %f1;"
        "mov.b32 %r5, 0; mov.b32 %r6, 0f40000000; atom.global.cas.b32 %r7, [%d0+4], %r5, %r6;",
        cells, threads=64,
    )  # fmt: skip
    assert cells.tolist() == [0.5 + sum(range(64)), 2.0]
    halves = torch.zeros(2, dtype=torch.bfloat16)
    run("mov.b32 %r1, 0x3F803F80; red.global.add.noftz.bf16x2 [%d0], %r1;", halves)
    assert halves.tolist() == [32.0, 32.0]


def test_generic_addresses_reach_every_space():
    out = torch.zeros(32, dtype=torch.int32)
    body = """
    mov.u64 %d5, s; cvta.shared.u64 %d6, %d5; mad.wide.u32 %d6, %r0, 4, %d6;
    mov.u64 %d5, l; cvta.local.u64 %d7, %d5;
    mov.u64 %d5, t; mad.wide.u32 %d4, %r0, 4, %d0;
    add.u32 %r2, %r0, 100; st.b32 [%d6], %r0; st.b32 [%d7+4], %r2;
    and.b32 %r3, %r0, 1; setp.eq.u32 %p1, %r3, 0; selp.b64 %d8, %d6, %d5, %p1;
    ld.b32 %r4, [%d8]; ld.b32 %r5, [%d7+4]; add.u32 %r4, %r4, %r5; st.b32 [%d4], %r4;
    """
    declarations = ".shared .b32 s[32]; .global .align 4 .b32 t[1] = {7000};"
    run(".local .align 4 .b8 l[8];" + body, out, declarations=declarations)
    want = [i + 100 + (7000 if i % 2 else i) for i in range(32)]
    assert out.tolist() == want


def test_byte_and_vector_accesses_extend_and_keep_order():
    x = torch.tensor([-1, 2, -3, 4], dtype=torch.int8)
    out = torch.zeros(4, dtype=torch.int32)
    run(
        "ld.global.s8 %r1, [%d0]; ld.global.u8 %r2, [%d0+2]; ld.global.v2.s8 {%r3, %r4}, [%d0+2];"
        "setp.eq.u32 %p1, %r0, 0; @%p1 st.global.v4.b32 [%d1], {%r1, %r2, %r3, %r4};",
        x, out,
    )  # fmt: skip
    assert out.tolist() == [-1, 253, -3, 4]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("tanhx.approx.f32 %f1, %f2;", "tanhx"),
        ("add.weird.s32 %r1, %r1, %r1;", r"\.weird of add"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.e4m3.e4m3.f32 {%f1}, {%r1}, {%r1}, {%f1};", "e4m3"),
        ("add.s32 %h1, %h1, %h1;", "16-bit register %h1"),
        ("tcgen05.fence::before_thread_sync;", "tcgen05"),
        ("mov.u32 %r1, %clock;", "%clock"),
        ("cp.async.ca.shared.global [%r1], [%d0], 12;", "size 12"),
    ],
)
def test_unsupported_text_is_named_with_its_line(text, named):
    with pytest.raises(UnsupportedPtx, match=rf"{named}[\s\S]*PTX line \d+"):
        run("mov.f32 %f2, 0f00000000; mov.b32 %r1, 0; mov.b16 %h1, 0;" + text, torch.zeros(1))
