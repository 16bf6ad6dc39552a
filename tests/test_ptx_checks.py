"""What the emulator reports, each check shown to fire on a planted bug and not without it."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from ptx_text import HEADER, kernel_text, run

from kimi_ops.testing.ptx import (
    Checks,
    Deadlock,
    Divergence,
    DivisionByZero,
    Kernel,
    LaunchError,
    Misaligned,
    MissingWait,
    OutOfBounds,
    PtxError,
    PtxSyntaxError,
    Race,
    Uninitialised,
    UnsupportedPtx,
)

SHARED = ".shared .align 16 .b8 buffer[1024];"
AT = "mov.u32 %r1, buffer; mad.lo.u32 %r2, %r0, 4, %r1; mad.wide.u32 %d9, %r0, 4, %d0;"
# Threads hand values to their neighbour in the next warp, and back, through shared memory.
EXCHANGE = f"""{AT}
add.u32 %r3, %r0, 32; and.b32 %r3, %r3, 127; mad.lo.u32 %r3, %r3, 4, %r1;
st.shared.b32 [%r2], %r0;
bar.sync 0; // first
ld.shared.b32 %r4, [%r3];
bar.sync 0; // second
st.shared.b32 [%r2], %r4;
bar.sync 0; // third
ld.shared.b32 %r5, [%r3];
st.global.b32 [%d9], %r5;
"""
# Two stages of 16 bytes per thread, copied ahead of their use; each thread reads what its neighbour
# of the next warp copied.
PIPELINE = f"""{AT}
mad.lo.u32 %r2, %r0, 16, %r1; mad.wide.u32 %d5, %r0, 16, %d0;
add.u32 %r3, %r0, 32; and.b32 %r3, %r3, 63; mad.lo.u32 %r3, %r3, 16, %r1;
cp.async.cg.shared.global [%r2], [%d5], 16; cp.async.commit_group;
cp.async.cg.shared.global [%r2+2048], [%d5+1024], 16; cp.async.commit_group;
cp.async.wait_group 1;
bar.sync 0; // filled
ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r3];
bar.sync 0; // used
cp.async.cg.shared.global [%r2], [%d5], 16; cp.async.commit_group;
cp.async.wait_group 0; // last
bar.sync 0;
ld.shared.v4.b32 {{%r8, %r9, %r10, %r11}}, [%r3+2048];
add.u32 %r4, %r4, %r8;
mad.wide.u32 %d6, %r0, 4, %d1; st.global.b32 [%d6], %r4;
"""


def exchange(text: str = EXCHANGE, **options):
    out = torch.zeros(128, dtype=torch.int32)
    report = run(text, out, threads=128, declarations=SHARED, **options)
    return out, report


def pipeline(text: str = PIPELINE, **options):
    x = torch.arange(2 * 64 * 4, dtype=torch.int32)
    out = torch.zeros(64, dtype=torch.int32)
    declarations = SHARED.replace("1024", "4096")
    run(text, x, out, threads=64, declarations=declarations, **options)
    return out


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
def test_right_kernels_pass_in_every_schedule(seed):
    assert exchange(seed=seed)[0].tolist() == [(i + 64) % 128 for i in range(128)]
    want = [((i + 32) % 64) * 8 + 256 for i in range(64)]
    assert pipeline(seed=seed).tolist() == want


@pytest.mark.parametrize("which", ["first", "second", "third"])
@pytest.mark.parametrize("seed", [None, 1])
def test_a_missing_barrier_is_a_race_or_an_early_read(which, seed):
    broken = EXCHANGE.replace(f"bar.sync 0; // {which}", "")
    with pytest.raises((Race, Uninitialised)) as report:
        exchange(broken, seed=seed)
    assert re.search(
        r"PTX line \d+ \((ld|st)\.shared\.b32\), CTA \(0, 0, 0\), warp \d", str(report.value)
    )


def test_both_accesses_of_a_race_are_named():
    with pytest.raises(Race) as report:
        exchange(EXCHANGE.replace("bar.sync 0; // second", ""))
    text = str(report.value)
    assert re.search(
        r"shared memory \+ \d+: write, not ordered after the read by warp \d at PTX line \d+", text
    )
    lines = [int(n) for n in re.findall(r"PTX line (\d+)", text)]
    assert len(set(lines)) == 2


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("cp.async.wait_group 1;", "cp.async.wait_group 2;", MissingWait),
        ("cp.async.wait_group 1;", "", MissingWait),
        ("wait_group 0; // last", "wait_group 2;", MissingWait),
        ("bar.sync 0; // filled", "", Race),
        ("bar.sync 0; // used", "", Race),
        ("[%d5+1024], 16;", "[%d5+1032], 16;", Misaligned),
        ("[%r2+2048], [%d5", "[%r2+3088], [%d5", OutOfBounds),
        ("[%d5+1024]", "[%d5+1040]", OutOfBounds),
        ("[%r3+2048]", "[%r3+3072]", Uninitialised),
    ],
)
def test_bugs_of_an_asynchronous_pipeline(old, new, error):
    assert old in PIPELINE
    with pytest.raises(error):
        pipeline(PIPELINE.replace(old, new))


def test_zero_filled_copies_do_not_read_their_source():
    body = f"""{AT} mad.lo.u32 %r2, %r0, 16, %r1; mad.wide.u32 %d5, %r0, 16, %d0;
    setp.lt.u32 %p1, %r0, 16; selp.b32 %r3, 16, 0, %p1;
    cp.async.cg.shared.global [%r2], [%d5], 16, %r3; cp.async.wait_all;
    ld.shared.b32 %r4, [%r2+12]; mad.wide.u32 %d6, %r0, 4, %d1; st.global.b32 [%d6], %r4;"""
    x = torch.arange(64, dtype=torch.int32)
    out = torch.full((32,), -1, dtype=torch.int32)
    run(body, x, out, declarations=SHARED)
    assert out.tolist() == [4 * i + 3 for i in range(16)] + [0] * 16
    with pytest.raises(OutOfBounds):
        run(
            body.replace("selp.b32 %r3, 16, 0", "selp.b32 %r3, 16, 16"), x, out, declarations=SHARED
        )


COPY = """
mad.wide.u32 %d8, %r0, 4, %d0; mad.wide.u32 %d9, %r0, 4, %d1;
setp.lt.u32 %p1, %r0, %r30;
mov.b32 %r1, 0;
@%p1 ld.global.b32 %r1, [%d8]; @%p1 st.global.b32 [%d9], %r1;
"""


def copy(text: str = COPY, n: int = 50, uninitialised: bool = True, offset: int = 0):
    x = torch.arange(n + 8, dtype=torch.int32)[offset : n + offset]
    out = torch.zeros(n, dtype=torch.int32)
    run(text, x, out, threads=64, scalars=[n], uninitialised=[out] if uninitialised else [])
    assert torch.equal(out, x)


def test_bounds_of_global_memory():
    copy()
    copy(offset=3)
    for broken in (
        COPY.replace("@%p1 ld", "ld"),
        COPY.replace("@%p1 st", "st"),
        COPY.replace("[%d8]", "[%d8+4]"),
        COPY.replace("[%d8]", "[%d8+-4]"),
        COPY.replace("setp.lt.u32", "setp.le.u32"),
        COPY.replace("%d0;", "-16;", 1),
    ):
        with pytest.raises(
            OutOfBounds, match=r"argument \d \+ -?\d+ of 200 bytes|in no buffer|window"
        ):
            copy(broken, offset=3)


def test_views_of_one_storage_share_memory():
    x = torch.arange(64, dtype=torch.int32)
    run(COPY, x[:32], x[32:], threads=32, scalars=[32])
    assert torch.equal(x[:32], x[32:])


def test_every_element_of_an_output_must_be_written():
    with pytest.raises(
        Uninitialised, match=r"argument 1 \+ 196 was never written \(4 of 200 bytes\)"
    ):
        copy(COPY.replace("%r0, %r30;", "%r0, 49;"))
    copy_of = COPY.replace("st.global", "ld.global.b32 %r2, [%d9]; @%p1 st.global")
    with pytest.raises(Uninitialised, match="read of argument 1"):
        copy(copy_of)


def test_uninitialised_gaps_of_strided_tensors_are_no_ones():
    out = torch.zeros(32, 2, dtype=torch.int32)
    run("mad.wide.u32 %d9, %r0, 8, %d0; st.global.b32 [%d9], %r0;", out[:, 0], uninitialised=())
    view = out[:, 0]
    run("mad.wide.u32 %d9, %r0, 8, %d0; st.global.b32 [%d9], %r0;", view, uninitialised=[view])


@pytest.mark.parametrize("width", [".v2.b32 {%r1, %r2}", ".b64 %d2", ".b16 %h1"])
def test_alignment(width):
    size = 2 if "16" in width else 8
    text = f"ld.global{width}, [%d0+OFFSET];"
    x = torch.zeros(8, dtype=torch.int32)
    run(text.replace("OFFSET", str(size)), x)
    with pytest.raises(Misaligned, match=f"{size}-byte access at global address"):
        run(text.replace("OFFSET", str(size // 2)), x)


def test_alignment_of_shared_and_local_memory():
    body = "mov.u32 %r1, buffer; st.shared.v4.b32 [%r1+8], {%r0, %r0, %r0, %r0};"
    with pytest.raises(Misaligned, match="shared"):
        run(body, torch.zeros(1), declarations=SHARED)
    local = ".local .align 8 .b8 l[16]; mov.u64 %d1, l; st.local.b64 [%d1+{}], %d1;"
    run(local.format(8), torch.zeros(1))
    for offset, error in ((4, Misaligned), (16, OutOfBounds)):
        with pytest.raises(error, match="local"):
            run(local.format(offset), torch.zeros(1))


def test_bounds_and_content_of_shared_memory():
    body = f"{AT} st.shared.b32 [%r2+{{}}], %r0;"
    run(body.format(1024 - 128), torch.zeros(32), declarations=SHARED)
    with pytest.raises(OutOfBounds, match=r"shared memory \+ 1024 of 1024 bytes \(1 threads\)"):
        run(body.format(1024 - 124), torch.zeros(32), declarations=SHARED)
    read = (
        f"{AT} setp.lt.u32 %p1, %r0, 31; @%p1 st.shared.b32 [%r2], %r0; ld.shared.b32 %r3, [%r2];"
    )
    with pytest.raises(Uninitialised, match=r"shared memory \+ 124[\s\S]*lane 31"):
        run(read, torch.zeros(32), declarations=SHARED)
    run(read, torch.zeros(32), declarations=SHARED, checks=Checks(shared_initialised=False))


def test_registers_that_nobody_wrote():
    store = "mad.wide.u32 %d9, %r0, 4, %d0; setp.lt.u32 %p1, %r0, 7; @%p1 mov.b32 %r1, 5;"
    out = torch.zeros(32, dtype=torch.int32)
    run(store + "@%p1 st.global.b32 [%d9], %r1;", out)
    run(store + "selp.b32 %r2, %r1, 0, %p1; st.global.b32 [%d9], %r2;", out)
    for use in (
        "st.global.b32 [%d9], %r1;",
        "add.u32 %r2, %r1, 1; st.global.b32 [%d9], %r2;",
        "shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1; @%p1 st.global.b32 [%d9], %r2;",
        "setp.eq.u32 %p2, %r1, 0; @%p2 st.global.b32 [%d9], %r0;",
        "setp.eq.u32 %p2, %r1, 0; @%p2 bra E; E:",
        "selp.b32 %r2, 0, %r1, %p1; st.global.b32 [%d9], %r2;",
    ):
        with pytest.raises(Uninitialised, match="register"):
            run(store + use, out)
        run(store + use, out, checks=Checks(registers=False))
    # Halves and bytes that are dropped again.
    join = store + "mov.b32 %r2, {%h0, %h1}; {} st.global.b32 [%d9], %r3;"
    dropped = "mov.b16 %h0, 3; "
    run(dropped + join.replace("{}", "mov.b32 {%h2, _}, %r2; mov.b32 %r3, {%h2, %h0};"), out)
    run(dropped + join.replace("{}", "prmt.b32 %r3, %r2, %r0, 0x4510;"), out)
    for kept in (
        "mov.b32 {_, %h2}, %r2; mov.b32 %r3, {%h2, %h0};",
        "prmt.b32 %r3, %r2, 0, 0x0210;",
    ):
        with pytest.raises(Uninitialised, match="register"):
            run(dropped + join.replace("{}", kept), out)
    # A shuffle may carry what nobody uses.
    run(store + "shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1; @%p0 st.global.b32 [%d9], %r2;"
        .replace("@%p0", "setp.lt.u32 %p0, %r0, 6; @%p0"), out)  # fmt: skip


def test_divergent_collectives():
    half = "setp.lt.u32 %p1, %r0, 16; @%p1 bra E; {} E:"
    out = torch.zeros(32)
    for text, what in (
        ("bar.sync 0;", "divergent barrier"),
        ("shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;", "divergent shfl.sync"),
        ("vote.sync.any.pred %p2, %p1, -1;", "divergent vote.sync"),
        ("redux.sync.add.u32 %r1, %r0, -1;", "divergent redux.sync"),
        ("bar.warp.sync -1;", "divergent bar.warp.sync"),
    ):
        with pytest.raises(Divergence, match=rf"{what}: lanes 0x0000ffff of the warp never arrive"):
            run(half.format(text), out)
    for text in ("shfl.sync.bfly.b32 %r1, %r0, 1, 31, 0xFFFF0000;", "bar.warp.sync 0xFFFF0000;"):
        run(half.format(text), out)
    with pytest.raises(Divergence, match="does not take part"):
        run(half.format("shfl.sync.bfly.b32 %r1, %r0, 16, 31, 0xFFFF0000;"), out)
    with pytest.raises(Divergence, match="leaves it out"):
        run(half.format("shfl.sync.bfly.b32 %r1, %r0, 1, 31, 0xFF000000;"), out)


def test_a_collective_waits_for_lanes_on_their_way():
    """Two branches that meet at a shuffle laid out before one of them."""
    out = torch.zeros(32, dtype=torch.int32)
    run(
        "mad.wide.u32 %d9, %r0, 4, %d0; setp.lt.u32 %p1, %r0, 16; mov.b32 %r1, 1; @%p1 bra FAR;"
        "NEAR: shfl.sync.bfly.b32 %r2, %r1, 16, 31, -1; st.global.b32 [%d9], %r2; exit;"
        "FAR: mov.b32 %r1, 2; bra NEAR;",
        out,
    )
    assert out.tolist() == [1] * 16 + [2] * 16


def test_deadlocks():
    out = torch.zeros(64)
    two = "setp.lt.u32 %p1, %r0, 32; @%p1 bra A; {} bra E; A: {} E:"
    run(two.format("bar.sync 1, 64;", "bar.sync 1, 64;"), out, threads=64)
    run(two.format("bar.arrive 1, 64;", "bar.sync 1, 64;"), out, threads=64)
    with pytest.raises(Deadlock, match=r"warps \[\d\] of 2 wait at barrier"):
        run(two.format("bar.sync 1, 64;", "bar.sync 2, 64;"), out, threads=64)
    with pytest.raises(Divergence, match="divergent barrier 0: other warps"):
        run(two.format("bar.sync 0;", "bar.sync 0;"), out, threads=64)
    with pytest.raises(Divergence, match="different thread counts"):
        run(two.format("bar.sync 1, 96;", "bar.sync 1, 128;"), out, threads=64)
    with pytest.raises(Deadlock, match="no progress"):
        run("L: bra L;", out, step_limit=1000)
    # Who has exited is not waited for.
    gone = "setp.lt.u32 %p1, %r0, 32; @%p1 exit; {}"
    run(gone.format("bar.sync 0;"), out, threads=64)
    with pytest.raises(Deadlock, match=r"warps \[1\] of 2"):
        run(gone.format("bar.sync 0, 64;"), out, threads=64)


def test_a_spinning_warp_lets_the_others_go_on():
    flag = torch.zeros(2, dtype=torch.int32)
    run(
        "setp.lt.u32 %p1, %r0, 32; @!%p1 bra W;"
        "L: ld.volatile.global.b32 %r1, [%d0]; setp.eq.u32 %p2, %r1, 0; @%p2 bra L;"
        "st.global.b32 [%d0+4], %r1; exit; W: mov.b32 %r2, 9; st.volatile.global.b32 [%d0], %r2;",
        flag, threads=64, checks=Checks(global_races=False),
    )  # fmt: skip
    assert flag.tolist() == [9, 9]


def test_named_barriers_order_only_who_takes_part():
    """Producer and consumer warps with arrive and sync; a third warp is not ordered."""
    body = f"""{AT} shr.u32 %r3, %r0, 5; mov.u32 %r4, buffer;
    setp.eq.u32 %p1, %r3, 1; setp.eq.u32 %p2, %r3, 2; @%p1 bra USE; @%p2 bra THIRD;
    st.shared.b32 [%r4], %r0; bar.arrive 3, 64; bra E;
    USE: bar.sync 3, 64; ld.shared.b32 %r5, [%r4]; bra E;
    THIRD: {{}} E:"""
    body = body.replace("st.shared.b32 [%r4], %r0", "st.shared.b32 [%r4], 7")
    for seed in (None, 0, 1):
        run(body.format(""), torch.zeros(96), threads=96, declarations=SHARED, seed=seed)
        with pytest.raises((Race, Uninitialised)):
            run(body.format("ld.shared.b32 %r5, [%r4];"), torch.zeros(96), threads=96,
                declarations=SHARED, seed=seed)  # fmt: skip


def test_threads_that_write_one_place_at_once():
    out = torch.zeros(4, dtype=torch.int32)
    run("mov.b32 %r1, 3; st.global.b32 [%d0], %r1;", out)
    with pytest.raises(Race, match="two threads write different values"):
        run("st.global.b32 [%d0], %r0;", out)
    with pytest.raises(Race, match="two threads write different values"):
        run("mov.u32 %r1, buffer; st.shared.b32 [%r1], %r0;", out, declarations=SHARED)


def test_races_between_ctas():
    own = "mov.u32 %r1, %ctaid.x; mad.wide.u32 %d9, %r1, 4, %d0; setp.eq.u32 %p1, %r0, 0;"
    out = torch.zeros(64, dtype=torch.int32)
    run(own + "@%p1 st.global.b32 [%d9], %r1;", out, grid=64)
    for seed in (None, 1):
        for broken in (
            "@%p1 st.global.b32 [%d0], %r1;",
            "@%p1 st.global.b32 [%d9], %r1; @%p1 ld.global.b32 %r2, [%d0];",
            "@%p1 ld.global.b32 %r2, [%d0]; @%p1 st.global.b32 [%d9], %r1;",
            "@%p1 st.global.b32 [%d9], %r1; @%p1 red.global.add.u32 [%d0], 1;",
        ):
            with pytest.raises(Race, match="race on argument 0"):
                run(own + broken, out, grid=64, seed=seed)
            run(own + broken, out, grid=64, seed=seed, checks=Checks(global_races=False))
        run(own + "@%p1 red.global.add.u32 [%d0], 1;", out, grid=64, seed=seed)


LAST = """
mov.u32 %r1, %ctaid.x; mad.wide.u32 %d9, %r1, 4, %d0; setp.ne.u32 %p1, %r0, 0; @%p1 exit;
add.u32 %r2, %r1, 1; st.global.b32 [%d9], %r2; fence.acq_rel.gpu;
atom.global.add.u32 %r3, [%d1], 1; fence.acq_rel.gpu; setp.ne.u32 %p2, %r3, 15; @%p2 exit;
mov.b32 %r4, 0; mov.b32 %r5, 0;
L: mad.wide.u32 %d8, %r4, 4, %d0; ld.global.b32 %r6, [%d8]; add.u32 %r5, %r5, %r6;
add.u32 %r4, %r4, 1; setp.lt.u32 %p3, %r4, 16; @%p3 bra L;
st.global.b32 [%d1], %r5;
"""


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_the_last_cta_may_read_what_all_have_released(seed):
    parts, counter = torch.zeros(16, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    run(LAST, parts, counter, grid=16, seed=seed)
    assert counter.item() == sum(range(1, 17))
    counter.zero_()
    with pytest.raises(Race, match="not ordered after a write by CTA number"):
        run(LAST.replace("fence.acq_rel.gpu;", ""), parts, counter, grid=16, seed=seed)
    counter.zero_()
    with pytest.raises(Race):
        run(LAST.replace("setp.ne.u32 %p2, %r3, 15", "setp.ne.u32 %p2, %r3, 7"), parts, counter,
            grid=16, seed=seed)  # fmt: skip


def test_a_schedule_is_repeatable_and_seeds_differ():
    def order(seed):
        out = torch.zeros(33, dtype=torch.int32)
        run(
            "mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %r0, 0; @%p1 exit;"
            "atom.global.add.u32 %r2, [%d0], 1; mad.wide.u32 %d9, %r2, 4, %d0;"
            "st.global.b32 [%d9+4], %r1;",
            out, grid=32, seed=seed, checks=Checks(global_races=False),
        )  # fmt: skip
        return out[1:].tolist()

    assert order(None) == list(range(32))
    assert order(1) == order(1)
    assert order(1) != order(2)


def test_division_by_zero_and_traps():
    with pytest.raises(DivisionByZero, match="lane 0"):
        run("mov.b32 %r1, 1; div.u32 %r2, %r1, %r0;", torch.zeros(1))
    run("mov.b32 %r1, 1; setp.ne.u32 %p1, %r0, 0; @%p1 div.u32 %r2, %r1, %r0;", torch.zeros(1))
    with pytest.raises(PtxError, match="trap executed"):
        run("setp.eq.u32 %p1, %r0, 5; @%p1 trap;", torch.zeros(1))


def test_launches_that_do_not_fit():
    kernel = Kernel(kernel_text("", 1, 1))
    x = torch.zeros(4)
    for grid, block, args, message in (
        ((0,), (32,), [x, 1], "grid"),
        ((1,), (2048,), [x, 1], "allows 1024 threads"),
        ((1,), (32,), [x], "takes 2 arguments, got 1"),
        ((1,), (32,), [x, 1 << 40], "does not fit 4 bytes"),
        ((1,), (32,), [1.0, 1.0], None),
        ((1,), (32,), [x, x], "its parameter a pointer"),
        ((1,), (32,), [x, b"12345"], "has 4 bytes, got 5"),
    ):
        if message is None:
            continue
        with pytest.raises(LaunchError, match=message):
            kernel.launch(grid, block, args)
    with pytest.raises(LaunchError, match="no kernel 'other'; the module has k"):
        Kernel(kernel_text(""), "other")


def test_text_that_is_no_ptx():
    for broken, message in (
        (kernel_text("bra NOWHERE;"), "no label 'NOWHERE'"),
        (kernel_text("add.s32 %r1, %r1 %r1;"), r"line \d+: expected ','"),
        (HEADER + ".entry k() { ret; ", "expected"),
        (HEADER + ".nonsense", "unknown directive"),
        ("#include <x>", "line 1: cannot read"),
    ):
        with pytest.raises(PtxSyntaxError, match=message):
            Kernel(broken)


FUNCTIONS = """
.func (.param .b32 result) power(.param .b32 base, .param .b32 count) {
.reg .b32 %r<9>; .reg .pred %p<3>;
ld.param.b32 %r0, [base]; ld.param.b32 %r1, [count]; mov.b32 %r2, 1;
LOOP: setp.eq.u32 %p1, %r1, 0; @%p1 bra DONE;
mul.lo.u32 %r2, %r2, %r0; sub.u32 %r1, %r1, 1; bra LOOP;
DONE: st.param.b32 [result], %r2; ret;
}
"""


def test_device_functions_and_scopes():
    """Calls with divergent loops inside, twice, and names that inner scopes declare again."""
    call = """{{ .param .b32 a; .param .b32 b; .param .b32 c; .reg .b32 %r1;
    mov.b32 %r1, {base}; st.param.b32 [a], %r1; st.param.b32 [b], %r0;
    call.uni (c), power, (a, b); ld.param.b32 %r{out}, [c]; }}"""
    out = torch.zeros(32, dtype=torch.int32)
    body = "and.b32 %r0, %r0, 7; mov.b32 %r1, 1000;" + call.format(base=2, out=5)
    body += call.format(base=3, out=6) + "add.u32 %r5, %r5, %r6; add.u32 %r5, %r5, %r1;"
    body += "mov.u32 %r7, %tid.x; mad.wide.u32 %d9, %r7, 4, %d0; st.global.b32 [%d9], %r5;"
    run(body, out, declarations=FUNCTIONS)
    assert out.tolist() == [2 ** (i % 8) + 3 ** (i % 8) + 1000 for i in range(32)]
    recursive = FUNCTIONS.replace("DONE:", "call.uni (result), power, (base, count); DONE:")
    with pytest.raises(UnsupportedPtx, match="recursive call of power"):
        run(body, out, declarations=recursive)
    with pytest.raises(UnsupportedPtx, match="indirect call"):
        run("call.uni nowhere, ();", out)


def test_branch_tables():
    out = torch.zeros(32, dtype=torch.int32)
    body = """and.b32 %r1, %r0, 3; mov.b32 %r2, 0;
    TABLE: .branchtargets A, B, C, B;
    brx.idx %r1, TABLE;
    A: mov.b32 %r2, 10; bra E; B: mov.b32 %r2, 20; bra E; C: mov.b32 %r2, 30;
    E: mad.wide.u32 %d9, %r0, 4, %d0; st.global.b32 [%d9], %r2;"""
    run(body, out)
    assert out.tolist() == [10, 20, 30, 20] * 8


# Counters, on traffic known by hand.


def counted(body: str, **options):
    x = torch.zeros(4096, dtype=torch.int32)
    report = run(body, x, torch.zeros(4096, dtype=torch.int32), **options)
    return report


@pytest.mark.parametrize(
    ("stride", "width", "sectors", "ideal"),
    [(4, "b32 %r1", 4, 4), (8, "b32 %r1", 8, 4), (32, "b32 %r1", 32, 4), (0, "b32 %r1", 1, 1),
     (16, "v4.b32 {%r1, %r2, %r3, %r4}", 16, 16), (2, "b16 %h1", 2, 2), (128, "b64 %d3", 32, 8)],
)  # fmt: skip
def test_sectors_of_global_loads(stride, width, sectors, ideal):
    body = f"mad.wide.u32 %d8, %r0, {stride}, %d0; ld.global.{width}, [%d8];"
    report = counted(body, threads=64 if stride < 128 else 32)
    warps = report.threads // 32
    total = report.total
    if stride == 4:
        assert report.unique_read_bytes == 256
    # Warps with a stride of 0 read the same sector, each once.
    assert (total.global_sectors, total.global_sectors_ideal) == (warps * sectors, warps * ideal)
    size = {"b32": 4, "v4.": 16, "b16": 2, "b64": 8}[width[:3]]
    assert total.global_load_bytes == size * report.threads


@pytest.mark.parametrize(
    ("stride", "width", "wavefronts", "ideal"),
    [(4, "b32 {}", 1, 1), (8, "b32 {}", 2, 1), (128, "b32 {}", 32, 1), (132, "b32 {}", 1, 1),
     (0, "b32 {}", 1, 1), (8, "v2.b32 {{{0}, {0}}}", 2, 2),
     (16, "v4.b32 {{{0}, {0}, {0}, {0}}}", 4, 4),
     (128, "v4.b32 {{{0}, {0}, {0}, {0}}}", 32, 4)],
)  # fmt: skip
def test_wavefronts_of_shared_stores(stride, width, wavefronts, ideal):
    body = f"mov.u32 %r1, buffer; mov.b32 %r2, 7; mad.lo.u32 %r1, %r0, {stride}, %r1;"
    kind, _, operand = width.partition(" ")
    body += f"st.shared.{kind} [%r1], {operand.format('%r2')};"
    report = counted(body, declarations=".shared .align 16 .b8 buffer[8192];")
    assert (report.total.shared_wavefronts, report.total.shared_wavefronts_ideal) == (
        wavefronts,
        ideal,
    )


def test_counts_of_instructions_barriers_and_lines():
    body = (
        '.file 1 "kernel.py"\n.loc 1 5 0\nadd.u32 %r1, %r0, 1;\nsetp.lt.u32 %p1, %r0, 32;'
        "@%p1 bra L;\n.loc 1 6 0\nadd.u32 %r1, %r1, 1; add.u32 %r1, %r1, 1;\nL:\n.loc 1 7 0\n"
        "bar.sync 0; bar.sync 0;"
    )
    report = counted(body, threads=128, grid=3)
    lines = {line: counts for (_, line), counts in report.lines.items()}
    # Of four warps in each of three CTAs, one jumps over line 6.
    assert lines[5].instructions == {"integer": 24, "control": 12}
    assert lines[6].opcodes == {"add": 18}
    # The return of the kernel follows.
    assert lines[7].instructions == {"barrier": 24, "control": 12}
    assert report.total.barriers == 6
    assert report.ctas == 3
    assert next(file for file, line in report.lines if line == 5) == "kernel.py"


def test_arguments_that_are_no_numbers_of_their_type():
    kernel = Kernel(kernel_text("", 0, 1))
    kernel.launch((1,), (1,), [np.int32(3)])
    with pytest.raises(LaunchError, match="argument 0 of k: a str"):
        kernel.launch((1,), (1,), ["3"])
    with pytest.raises(LaunchError, match=r"argument 0 of k: a float for a parameter of type .u32"):
        kernel.launch((1,), (1,), [3.5])


def test_more_shared_memory_than_a_gpu_has():
    text = kernel_text("", 0)
    for target, most in (("sm_80", 163), ("sm_90a", 227), ("sm_120", 99)):
        kernel = Kernel(text.replace("sm_80", target))
        kernel.launch((1,), (1,), [], dynamic_shared_bytes=most << 10)
        with pytest.raises(LaunchError, match=f"a CTA of {target} has {most << 10}"):
            kernel.launch((1,), (1,), [], dynamic_shared_bytes=(most << 10) + 1)
    kernel = Kernel(text.replace("sm_80", "sm_75"))
    kernel.launch((1,), (1,), [], dynamic_shared_bytes=48 << 10)
    with pytest.raises(LaunchError, match="the shared memory of sm_75 is not known"):
        kernel.launch((1,), (1,), [], dynamic_shared_bytes=49 << 10)


def test_an_instruction_that_is_too_short_is_named():
    with pytest.raises(UnsupportedPtx, match=r"only 2 operands\n  at PTX line \d+: add.s32"):
        run("add.s32 %r1, %r0;")


def test_the_other_access_of_a_race_has_its_source_line():
    body = """
.loc 1 7 0
setp.lt.u32 %p1, %r0, 32;
@%p1 st.shared.b32 [s], 5;
.loc 1 9 0
ld.shared.b32 %r1, [s];"""
    declarations = '.file 1 "/a/b.cu"\n.shared .b32 s;'
    kernel = Kernel(kernel_text(body, 0, 0, declarations))
    kernel.launch((1,), (32,), [])
    with pytest.raises(Race, match=r"by warp 0 at PTX line \d+ \(b.cu:7\)\n  at k, b.cu:9, "):
        kernel.launch((1,), (64,), [])
