"""Runs of like instructions executed as one: the same results, counts and reports as one by one."""

from __future__ import annotations

import dataclasses
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from ptx_text import kernel_text

from kimi_ops.testing.ptx import (
    Kernel,
    Misaligned,
    MissingWait,
    OutOfBounds,
    PtxError,
    Race,
    Report,
    Uninitialised,
)
from kimi_ops.testing.ptx.parser import parse
from kimi_ops.testing.ptx.program import link
from kimi_ops.testing.ptx.text import Text


def comparable(report: Report) -> tuple:
    """All that a report says, to be compared."""
    return (
        dataclasses.asdict(report.total),
        {line: dataclasses.asdict(counts) for line, counts in report.lines.items()},
        (report.unique_read_bytes, report.unique_written_bytes),
        report.cta_instructions.tolist(),
        report.trace,
    )


def both(text: str, tensors, grid=1, threads=128, seed=None, **options):
    """Runs a kernel fused and not; returns (results, report or error text) of each."""
    found = []
    for fuse in (True, False):
        copies = [t.clone() for t in tensors]
        said: object
        try:
            report = Kernel(text).launch(
                (grid,), (threads,), copies, seed=seed, fuse=fuse, **options
            )
            said = comparable(report)
        except PtxError as error:
            said = (type(error), str(error))
        found.append(([c.view(torch.uint8).tolist() for c in copies], said))
    return found


def longest_run(text: str) -> int:
    """Members of the largest run in the plans of a kernel."""
    program = Text(link(parse(text)))
    ends = [0, *(i + 1 for i, entry in enumerate(program.entries) if entry.control)]
    plans = [program.fusion.plan(a, b - 1) for a, b in pairwise(ends)]
    return max(len(part.members) for plan in plans for part in plan)


# Random programs

_OPS = (
    "add.s32 {d}, {a}, {b};", "sub.s32 {d}, {a}, {i};", "mul.lo.s32 {d}, {a}, {b};",
    "xor.b32 {d}, {a}, {i};", "and.b32 {d}, {a}, {b};", "shl.b32 {d}, {a}, 3;",
    "shr.u32 {d}, {a}, {b};", "mad.lo.s32 {d}, {a}, {b}, {c};", "min.s32 {d}, {a}, {b};",
    "lop3.b32 {d}, {a}, {b}, {c}, 0x96;", "prmt.b32 {d}, {a}, {b}, 0x5410;", "mov.b32 {d}, {a};",
    "mov.b32 {d}, {i};", "bfe.u32 {d}, {a}, 3, 7;", "popc.b32 {d}, {a};",
    "setp.lt.s32 {p}, {a}, {b};", "setp.gt.and.u32 {p}|{q}, {a}, {i}, {p};",
    "selp.b32 {d}, {a}, {b}, {p};", "@{p} mov.b32 {d}, {a};", "@!{p} add.s32 {d}, {a}, {b};",
    "add.f32 {d}, {a}, {b};", "mul.f32 {d}, {a}, {b};", "fma.rn.f32 {d}, {a}, {b}, {c};",
    "max.f32 {d}, {a}, {b};", "ex2.approx.ftz.f32 {d}, {a};", "cvt.rn.f32.s32 {d}, {a};",
    "cvt.rzi.s32.f32 {d}, {a};", "cvt.rn.bf16x2.f32 {d}, {a}, {b};", "add.rn.bf16x2 {d}, {a}, {b};",
    "fma.rn.f16x2 {d}, {a}, {b}, {c};", "mov.b32 {{%h1, %h2}}, {a}; mov.b32 {d}, {{%h2, %h1}};",
    "mul.wide.s32 %d9, {a}, {b}; cvt.u32.u64 {d}, %d9;",
    "shfl.sync.bfly.b32 {d}, {a}, 4, 31, -1;", "shfl.sync.up.b32 {d}|{p}, {a}, 1, 0, -1;",
    "vote.sync.any.pred {p}, {q}, -1;",
    "st.shared.b32 [%r30+{o}], {a};", "ld.shared.b32 {d}, [%r30+{o}];",
    "ld.shared.v2.b32 {{{d}, {e}}}, [%r30+{o8}];", "st.shared.v2.b32 [%r30+{o8}], {{{a}, {b}}};",
    "ld.global.b32 {d}, [%d5+{o}];", "@{p} ld.global.b32 {d}, [%d5+{o}];",
    "st.global.b32 [%d6+{o}], {a};", "bar.sync 0;",
    "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
    "{{{a}, {b}, {c}, {d}}}, {{{b}, {c}}}, {{{c}}}, {{{a}, {b}, {c}, {d}}};",
)  # fmt: skip


def random_body(seed: int, length: int = 120) -> str:
    """Runs of random instructions on twelve registers; lanes have their own places in memory."""
    pick = random.Random(seed)
    lines = [
        ".shared .align 16 .b8 store[16384];",
        "mov.u32 %r31, store; shl.b32 %r30, %r0, 6; add.s32 %r30, %r30, %r31;",
        "mov.u32 %r28, %ctaid.x; mad.lo.s32 %r29, %r28, 128, %r0;",
        "mad.wide.u32 %d5, %r29, 64, %d0; mad.wide.u32 %d6, %r29, 64, %d1;",
        "mov.b32 %r29, 0;",
        *(f"ld.global.b32 %r{i}, [%d5+{4 * i}];" for i in range(1, 13)),
        *(f"st.shared.b32 [%r30+{4 * i}], %r29;" for i in range(16)),
        "setp.lt.s32 %p1, %r1, %r2; setp.lt.s32 %p2, %r3, %r4; bar.sync 0;",
    ]
    while len(lines) < length:
        op = pick.choice(_OPS)
        for _ in range(pick.choice((1, 1, 2, 4, 8))):
            a, b, c, d, e = (f"%r{n}" for n in pick.sample(range(1, 13), 5))
            lines.append(
                op.format(
                    a=a, b=b, c=c, d=d, e=e, p=pick.choice(("%p1", "%p2")),
                    q=pick.choice(("%p1", "%p2")) if "|" not in op else "%p3",
                    i=pick.choice((1, 7, 12345)), o=4 * pick.randrange(16),
                    o8=8 * pick.randrange(8),
                )
            )  # fmt: skip
    lines += [f"st.global.b32 [%d6+{4 * i}], %r{i};" for i in range(1, 13)]
    return "\n".join(lines)


@pytest.mark.parametrize("seed", range(24))
def test_random_programs(seed):
    text = kernel_text("mov.pred %p3, 0;" + random_body(seed))
    numbers = torch.from_numpy(
        np.random.default_rng(seed).integers(-(2**31), 2**31, (3, 128, 16), dtype=np.int32)
    )
    fused, plain = both(
        text, [numbers, torch.zeros_like(numbers)], grid=3, seed=seed if seed % 3 == 0 else None
    )
    assert fused == plain
    assert not isinstance(fused[1][0], type), fused[1]
    assert longest_run(text) >= 12


@pytest.mark.parametrize("seed", range(6))
def test_threads_that_part(seed):
    """Warps that are not whole run the text as it stands; others of the batch need not."""
    body = (
        "mov.pred %p3, 0;" + random_body(seed, 60).rsplit("bar.sync 0;", 1)[0] + "bar.sync 0;"
        "setp.lt.u32 %p4, %r0, 40; @%p4 bra ODD; add.s32 %r1, %r1, 1; add.s32 %r2, %r2, 2;"
        "mul.lo.s32 %r3, %r1, %r2; mul.lo.s32 %r4, %r2, %r5; ODD: add.s32 %r5, %r5, 1;"
        "add.s32 %r6, %r6, 2; st.global.b32 [%d6], %r1; st.global.b32 [%d6+4], %r3;"
        "st.global.b32 [%d6+8], %r4; st.global.b32 [%d6+12], %r5; st.global.b32 [%d6+16], %r6;"
        "setp.lt.u32 %p4, %r0, 70; @%p4 exit; add.s32 %r7, %r7, 1; add.s32 %r8, %r8, 2;"
        "st.global.b32 [%d6+20], %r7; st.global.b32 [%d6+24], %r8;"
    )
    numbers = torch.arange(2 * 128 * 16, dtype=torch.int32).reshape(2, 128, 16)
    fused, plain = both(
        kernel_text(body), [numbers, torch.zeros_like(numbers)], grid=2, seed=seed or None
    )
    assert fused == plain
    assert not isinstance(fused[1][0], type), fused[1]


@pytest.mark.parametrize("seed", range(8))
def test_plans_keep_dependences_and_the_order_of_memory(seed):
    text = Text(link(parse(kernel_text("mov.pred %p3, 0;" + random_body(seed)))))
    start = 0
    for end in range(len(text.entries)):
        if not text.entries[end].control:
            continue
        plan = text.fusion.plan(start, end)
        assert sorted(i for part in plan for i in part.members) == list(range(start, end))
        turn = {i: number for number, part in enumerate(plan) for i in part.members}
        for late in range(start, end):
            reads, writes = text.uses[late]
            for early in range(start, late):
                r, w = text.uses[early]
                if w & (reads | writes) or r & writes:
                    assert turn[early] < turn[late]
                memory = [text.entries[i].order in ("access", "ordered") for i in (early, late)]
                if all(memory):
                    assert turn[early] <= turn[late]
                if "fixed" in (text.entries[early].order, text.entries[late].order):
                    assert turn[early] < turn[late]
        for part in plan:
            if text.entries[part.members[0]].order == "fixed":
                assert part.fixed == part.members[0] - start
        start = end + 1


# Bugs inside a run: the report is that of the single instruction

_SHARED = (
    ".shared .align 16 .b8 store[2048]; mov.u32 %r31, store; shl.b32 %r30, %r0, 4;"
    "add.s32 %r30, %r30, %r31; mov.b32 %r1, 5; mov.b32 %r2, 5; mov.b32 %r3, 5; mov.b32 %r4, 5;"
    "mad.wide.u32 %d5, %r0, 16, %d0;"
)
_FILL = "".join(f"st.shared.b32 [%r30+{4 * i}], %r1;" for i in range(4)) + "bar.sync 0;"


def loads(places) -> str:
    return "".join(f"\nld.shared.b32 %r{10 + i}, {place};" for i, place in enumerate(places)) + "\n"


def planted(place: int, bad: str) -> list[str]:
    good = ["[%r30]", "[%r30+4]", "[%r30+8]", "[%r30+12]"]
    return [*good[:place], bad, *good[place + 1 :]]


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize(
    ("bad", "before", "error"),
    [
        ("[%r30+32]", _FILL, OutOfBounds),
        ("[%r30+2]", _FILL, Misaligned),
        ("[%r29]", _FILL + "shl.b32 %r29, %r0, 3; add.s32 %r29, %r29, 3000;", OutOfBounds),
        (
            "[%r30+12]",
            "st.shared.b32 [%r30], %r1; st.shared.b32 [%r30+4], %r1;"
            "st.shared.b32 [%r30+8], %r1; bar.sync 0;",
            Uninitialised,
        ),
        (
            "[%r28]",
            "xor.b32 %r28, %r30, 1024;" + _FILL + "st.shared.b32 [%r30], %r2;",
            Race,
        ),
        (
            "[%r30+4]",
            _FILL + "cp.async.ca.shared.global [%r30+4], [%d5], 4;",
            MissingWait,
        ),
    ],
)  # fmt: skip
def test_a_bug_in_a_run_of_loads(place, bad, before, error):
    if error is Uninitialised and place != 3:
        places = planted(place, bad)[:3]
    elif error is MissingWait:
        places = ["[%r30]", "[%r30+8]", "[%r30+12]"]
        places.insert(place, bad)
    else:
        places = planted(place, bad)
    text = kernel_text(_SHARED + before + loads(places))
    fused, plain = both(text, [torch.zeros(512), torch.zeros(4)])
    assert fused == plain
    assert fused[1][0] is error
    line = text.splitlines().index(loads(places).splitlines()[places.index(bad) + 1]) + 1
    if error is not Uninitialised:
        assert f"PTX line {line} " in fused[1][1]
    fixed = kernel_text(_SHARED + _FILL + loads(["[%r30]", "[%r30+4]", "[%r30+8]", "[%r30+12]"]))
    assert longest_run(fixed) >= 4
    fused, plain = both(fixed, [torch.zeros(512), torch.zeros(4)])
    assert fused == plain
    assert not isinstance(fused[1][0], type), fused[1]


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize(
    "kind",
    [
        "st.shared",
        "cp.async",
        "ld.global",
        "st.global",
        "ldmatrix.x4",
        "ldmatrix.x2",
        "ldmatrix.x1",
    ],
)
def test_a_bug_in_a_run_of_other_accesses(kind, place):
    lines = {
        "st.shared": "st.shared.b32 [%r30+{0}], %r1;",
        "cp.async": "cp.async.ca.shared.global [%r30+{0}], [%d5+{0}], 4;",
        "ld.global": "ld.global.b32 %r1{1}, [%d5+{0}];",
        "st.global": "st.global.b32 [%d5+{0}], %r1;",
        "ldmatrix.x4": "ldmatrix.sync.aligned.m8n8.x4.shared.b16 "
        "{{%r1{1}, %r2, %r3, %r4}}, [%r30+{2}];",
        "ldmatrix.x2": "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {{%r1{1}, %r2}}, [%r30+{2}];",
        "ldmatrix.x1": "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r1{1}}}, [%r30+{2}];",
    }[kind]
    matrix = kind.startswith("ldmatrix")
    step = 512 if matrix else 4
    body = _SHARED.replace("shl.b32 %r30, %r0, 4;", "and.b32 %r29, %r0, 31; shl.b32 %r30, %r29, 4;")
    body = body if matrix else _SHARED
    for bad in (None, place):
        offsets = [step * i + (4096 if i == bad else 0) for i in range(4)]
        run = "\n".join(lines.format(o, i, o) for i, o in enumerate(offsets))
        fill = _FILL if not matrix else (
            "shl.b32 %r28, %r0, 4; add.s32 %r28, %r28, %r31; st.shared.v4.b32 [%r28], "
            "{%r1, %r2, %r3, %r4}; bar.sync 0;"
        )  # fmt: skip
        wait = "\ncp.async.wait_all; bar.sync 0;" if kind == "cp.async" else ""
        text = kernel_text(body + fill + "\n" + run + wait)
        fused, plain = both(text, [torch.zeros(512), torch.zeros(4)])
        assert fused == plain
        if bad is None:
            assert not isinstance(fused[1][0], type), fused[1]
            assert longest_run(text) >= 4
        else:
            line = text.splitlines().index(run.splitlines()[place]) + 1
            assert fused[1][0] is OutOfBounds
            assert f"PTX line {line} " in fused[1][1]


def test_two_bugs_in_a_block_report_the_first():
    """Also where the second would be found first were the run moved."""
    text = kernel_text(
        _SHARED + _FILL + loads(["[%r30]", "[%r30+4]"]) + "ld.global.b32 %r20, [%d5+8192];\n"
        "ld.shared.b32 %r21, [%r30+4096];"
    )
    fused, plain = both(text, [torch.zeros(512), torch.zeros(4)])
    assert fused == plain
    assert "ld.global" in fused[1][1]


def test_stores_of_a_run_that_meet_keep_their_order():
    stores = "".join(f"st.shared.b32 [%r30+{4 * (i % 2)}], %r{i + 1};" for i in range(4))
    text = kernel_text(
        _SHARED.replace("mov.b32 %r4, 5", "mov.b32 %r4, 9") + stores + "bar.sync 0;"
        "ld.shared.b32 %r10, [%r30+4]; mad.wide.u32 %d7, %r0, 4, %d1; st.global.b32 [%d7], %r10;"
    )
    out = torch.zeros(128, dtype=torch.int32)
    assert longest_run(text) >= 4
    Kernel(text).launch((1,), (128,), [torch.zeros(512), out])
    assert (out == 9).all()
    fused, plain = both(text, [torch.zeros(512), out])
    assert fused == plain


def test_a_masked_run_of_loads_leaves_the_other_lanes_alone():
    """A guard that holds for some lanes, for none, and for all."""
    body = (
        _SHARED
        + _FILL
        + "".join(f"mov.b32 %r{20 + i}, {i};" for i in range(4))
        + "setp.lt.u32 %p1, %r0, {limit};"
        + "".join(f"@%p1 ld.shared.b32 %r{20 + i}, [%r30+{4 * i}];" for i in range(4))
        + "mad.wide.u32 %d7, %r0, 16, %d1;"
        "st.global.v4.b32 [%d7], {{%r20, %r21, %r22, %r23}};"
    )
    for limit in (0, 37, 128):
        text = kernel_text(
            body.replace("{limit}", str(limit)).replace("{{", "{").replace("}}", "}")
        )
        out = torch.zeros(128, 4, dtype=torch.int32)
        Kernel(text).launch((1,), (128,), [torch.zeros(512), out])
        want = torch.arange(4, dtype=torch.int32).repeat(128, 1)
        want[:limit] = 5
        assert torch.equal(out, want)
        fused, plain = both(text, [torch.zeros(512), out])
        assert fused == plain
