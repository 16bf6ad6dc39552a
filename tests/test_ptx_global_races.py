"""Races through global memory: what orders accesses of warps and CTAs, and what does not."""

from __future__ import annotations

import re

import pytest
import torch
from ptx_text import kernel_text, run

from kimi_ops.testing.ptx import Checks, Deadlock, Kernel, OutOfBounds, Race

SEEDS = [None, 0, 1]
# %r1 CTA, %r2 warp; %p1 lane 0 of its warp.
WHO = "mov.u32 %r1, %ctaid.x; shr.u32 %r2, %r0, 5; and.b32 %r3, %r0, 31; setp.eq.u32 %p1, %r3, 0;"


def data(*sizes: int) -> list[torch.Tensor]:
    return [torch.zeros(size, dtype=torch.int32) for size in sizes]


def without_gaps(body: str) -> str:
    """The text without the empty statements that empty replacements leave."""
    return re.sub(r"([;:])(\s*;)+", r"\1", body)


def outcome(body: str, *tensors: torch.Tensor, **launch: int | None) -> str:
    """ "right" or the report of a race."""
    try:
        run(without_gaps(body), *tensors, **launch)
    except Race as error:
        return error.message
    return "right"


# Two warps of one CTA: {} between what the first and the second do.
WARPS = f"""{WHO} setp.eq.u32 %p2, %r2, 0; @!%p2 bra SECOND; FIRST; SECOND: BETWEEN;
@%p2 bra END; THEN; END:"""
STORE, OTHER = "@%p1 st.global.b32 [%d0], 7", "@%p1 st.global.b32 [%d0], 8"
LOAD = "@%p1 ld.global.b32 %r9, [%d0]"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("first", "second", "report"),
    [
        (STORE, LOAD, "read, not ordered after a write by CTA number 0, warp 0"),
        (STORE, OTHER, "write, not ordered after a write"),
        (LOAD, STORE, "write, not ordered after a read by CTA number 0, warp 0"),
        ("@%p1 red.global.add.u32 [%d0], 1", LOAD, "read, not ordered after an atomic"),
        (LOAD, "@%p1 red.global.add.u32 [%d0], 1", "atomic, not ordered after a read"),
    ],
)  # fmt: skip
def test_warps_of_a_cta_need_a_barrier(first, second, report, seed):
    body = WARPS.replace("FIRST", first).replace("THEN", second)
    assert (
        outcome(body.replace("BETWEEN", "bar.sync 0"), *data(4), threads=64, seed=seed) == "right"
    )
    found = outcome(body.replace("BETWEEN", ""), *data(4), threads=64, seed=seed)
    # With a random schedule either may come first.
    reversed_kinds = ("ordered after" in found) if seed is not None else (report in found)
    assert found.startswith("race on argument 0 + 0: ")
    assert reversed_kinds, found


def test_the_report_says_where_both_are():
    body = WARPS.replace("FIRST", STORE).replace("THEN", LOAD)
    text = kernel_text(without_gaps(body.replace("BETWEEN", "")), 1)
    line = next(i for i, t in enumerate(text.splitlines(), 1) if "st.global.b32" in t)
    with pytest.raises(
        Race, match=rf"by CTA number 0, warp 0, at PTX line {line}\n.*warp 1, lane 0"
    ):
        Kernel(text).launch((1,), (64,), data(4))


@pytest.mark.parametrize("seed", SEEDS)
def test_one_value_written_twice_is_no_race_within_a_cta(seed):
    body = f"{WHO} mov.b32 %r4, 5; @%p1 st.global.b32 [%d0], %r4;"
    assert outcome(body, *data(1), threads=128, seed=seed) == "right"
    assert "race" in outcome(body, *data(1), threads=32, grid=2, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_reader_of_a_value_counts(seed):
    """All warps read, one writes: each of the others must have passed the barrier."""
    body = f"""{WHO} ld.global.b32 %r9, [%d0]; setp.eq.u32 %p2, %r2, 0; setp.eq.u32 %p3, %r2, 2;
    BARRIER; @!%p2 bra END; @%p1 st.global.b32 [%d0], 1; END:"""
    for barrier, right in (
        ("bar.sync 0", True),
        ("", False),
        ("@%p3 bra END; bar.sync 1, 96", False),
    ):
        found = outcome(body.replace("BARRIER", barrier), *data(1), threads=128, seed=seed)
        assert (found == "right") == right, (barrier, found)


# CTA 0 writes data and raises a flag, CTA 1 waits for the flag and reads.
MESSAGE = f"""{WHO} setp.ne.u32 %p2, %r0, 0; @%p2 exit; setp.eq.u32 %p3, %r1, 1; @%p3 bra WAIT;
st.global.b32 [%d0], 42; PUBLISH; exit;
WAIT: OBSERVE; setp.eq.u32 %p4, %r4, 0; @%p4 bra WAIT; AFTER; ld.global.b32 %r5, [%d0];
st.global.b32 [%d0+4], %r5;"""
FENCE = "fence.acq_rel.gpu"
PUT, RELEASE = (f"st.{sem}.gpu.global.b32 [%d1], 1" for sem in ("relaxed", "release"))
LOOK, ACQUIRE = (f"ld.{sem}.gpu.global.b32 %r4, [%d1]" for sem in ("relaxed", "acquire"))
# What is done after the data, what looks at the flag, what comes then; whether that is right.
ORDERS = {
    "release and acquire": (RELEASE, ACQUIRE, "", True),
    "no release": (PUT, ACQUIRE, "", False),
    "no acquire": (RELEASE, LOOK, "", False),
    "two fences": (f"{FENCE}; {PUT}",
                   LOOK, FENCE, True),
    "one fence, before": (f"{FENCE}; {PUT}",
                          LOOK, "", False),
    "one fence, after": (PUT,
                         LOOK, FENCE, False),
    "fence after the flag": (f"{PUT}; {FENCE}",
                             LOOK, FENCE, False),
    "fence and acquire": (f"{FENCE}; {PUT}",
                          ACQUIRE, "", True),
    "CTA scope of the release": ("st.release.cta.global.b32 [%d1], 1",
                                 ACQUIRE, "", False),
    "CTA scope of a fence": (f"fence.acq_rel.cta; {PUT}",
                             LOOK, FENCE, False),
    "volatile": ("st.volatile.global.b32 [%d1], 1", "ld.volatile.global.b32 %r4, [%d1]", "", False),
    "volatile and membar": ("membar.gl; st.volatile.global.b32 [%d1], 1",
                            "ld.volatile.global.b32 %r4, [%d1]", "membar.gl", True),
    "atomics of acquire-release": ("atom.acq_rel.gpu.global.exch.b32 %r6, [%d1], 1",
                                   "atom.acq_rel.gpu.global.or.b32 %r4, [%d1], 0", "", True),
    "reduction of release": ("red.release.gpu.global.add.u32 [%d1], 1",
                             "ld.acquire.sys.global.b32 %r4, [%d1]", "", True),
    "plain atomics": ("atom.global.exch.b32 %r6, [%d1], 1",
                      "atom.global.or.b32 %r4, [%d1], 0", "", False),
    "a plain flag": ("fence.acq_rel.gpu; st.global.b32 [%d1], 1",
                     ACQUIRE, "", False),
}  # fmt: skip


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("name", ORDERS)
def test_messages_between_ctas(name, seed):
    publish, observe, after, right = ORDERS[name]
    body = MESSAGE.replace("PUBLISH", publish).replace("OBSERVE", observe).replace("AFTER", after)
    found = outcome(body, *data(2, 1), grid=2, seed=seed)
    assert (found == "right") == right, found


@pytest.mark.parametrize("scope", ["cta", "gpu"])
def test_messages_between_warps_of_a_cta(scope):
    body = MESSAGE.replace("setp.ne.u32 %p2, %r0, 0", "not.pred %p2, %p1")
    body = body.replace("setp.eq.u32 %p3, %r1, 1", "setp.eq.u32 %p3, %r2, 1")
    for order in ("release", "relaxed"):
        text = body.replace("PUBLISH", f"st.{order}.{scope}.global.b32 [%d1], 1")
        text = text.replace("OBSERVE", f"ld.acquire.{scope}.global.b32 %r4, [%d1]")
        found = outcome(text.replace("AFTER", ""), *data(2, 1), threads=64)
        assert (found == "right") == (order == "release"), found


# What one warp has seen of another goes with its release, and on to others of the acquiring CTA.
CUMULATIVE = f"""{WHO} setp.eq.u32 %p2, %r1, 1; setp.eq.u32 %p3, %r0, 0; setp.eq.u32 %p5, %r0, 32;
@%p2 bra WAIT; @%p5 st.global.b32 [%d0], 42; EARLY; GIVE;
@%p3 fence.acq_rel.gpu; @%p3 st.relaxed.gpu.global.b32 [%d1], 1; exit;
WAIT: @!%p3 bra TAKE; L: ld.acquire.gpu.global.b32 %r4, [%d1]; setp.eq.u32 %p4, %r4, 0; @%p4 bra L;
TAKE: BARRIER; @%p5 ld.global.b32 %r5, [%d0];"""


@pytest.mark.parametrize("seed", [None, 1])
def test_knowledge_is_passed_on(seed):
    def found(early="", give="bar.sync 0", take="bar.sync 0", fence=True):
        body = CUMULATIVE.replace("EARLY", early).replace("GIVE", give).replace("BARRIER", take)
        if not fence:
            body = body.replace("@%p3 fence.acq_rel.gpu;", "")
        return outcome(body, *data(1, 1), grid=2, threads=64, seed=seed)

    assert found() == "right"
    assert "read, not ordered after a write" in found(give="")
    assert "read, not ordered after a write" in found(take="") or seed is not None
    # A fence of the writer alone, or of the thread that releases before the barrier, is not enough.
    assert "read, not ordered after a write" in found(early="fence.acq_rel.gpu", fence=False)


CHAIN = f"""{WHO} setp.ne.u32 %p2, %r0, 0; @%p2 exit; setp.eq.u32 %p3, %r1, 1; @%p3 bra SECOND;
setp.eq.u32 %p3, %r1, 2; @%p3 bra THIRD;
st.global.b32 [%d0], 42; st.release.gpu.global.b32 [%d1], 1; exit;
SECOND: ld.LOOK.gpu.global.b32 %r4, [%d1]; setp.ne.u32 %p4, %r4, 1; @%p4 bra SECOND;
HAND; exit;
THIRD: ld.relaxed.gpu.global.b32 %r4, [%dX]; setp.ne.u32 %p4, %r4, 2; @%p4 bra THIRD;
ld.acquire.gpu.global.b32 %r4, [%dX];
ld.global.b32 %r5, [%d0];"""


@pytest.mark.parametrize(
    ("look", "hand", "flag", "right"),
    [
        ("acquire", "st.release.gpu.global.b32 [%d2], 2", 2, True),
        ("acquire", "st.relaxed.gpu.global.b32 [%d2], 2", 2, False),
        ("relaxed", "st.release.gpu.global.b32 [%d2], 2", 2, False),
        # A read-modify-write goes on with the release of the first; a store ends it.
        ("relaxed", "atom.relaxed.gpu.global.add.u32 %r6, [%d1], 1", 1, True),
        ("relaxed", "st.relaxed.gpu.global.b32 [%d1], 2", 1, False),
    ],
)
def test_chains_of_three_ctas(look, hand, flag, right):
    body = CHAIN.replace("LOOK", look).replace("HAND", hand).replace("%dX", f"%d{flag}")
    found = outcome(body, *data(1, 1, 1), grid=3)
    assert (found == "right") == right, found


# All CTAs read the data, then the last to come overwrites it: legal if all have let go of it.
LAST_WRITES = f"""{WHO} ld.global.b32 %r4, [%d0]; RELEASE; bar.sync 0; setp.ne.u32 %p2, %r0, 0;
@%p2 exit; LET; atom.ORDER.gpu.global.add.u32 %r5, [%d1], 1; setp.ne.u32 %p3, %r5, 7; @%p3 exit;
st.global.b32 [%d0], 9;"""


@pytest.mark.parametrize("seed", SEEDS)
def test_memory_that_many_have_read_may_be_written_after_all_of_them(seed):
    def found(order="acq_rel", let="", release=""):
        body = LAST_WRITES.replace("ORDER", order).replace("LET", let).replace("RELEASE", release)
        return outcome(body, *data(1, 1), grid=8, threads=64, seed=seed)

    assert found() == "right"
    assert "write, not ordered after" in found("relaxed")
    assert "write, not ordered after" in found("release")
    assert "write, not ordered after" in found("acquire")
    # One CTA of the eight does not release what it has read.
    body = LAST_WRITES.replace("LET", "setp.eq.u32 %p4, %r1, 3; @%p4 bra PLAIN").replace(
        "RELEASE", ""
    )
    other = "bra NEXT; PLAIN: atom.relaxed.gpu.global.add.u32 %r5, [%d1], 1; NEXT: setp.ne.u32 %p3"
    body = body.replace("setp.ne.u32 %p3", other).replace("ORDER", "acq_rel")
    assert "write, not ordered after" in outcome(body, *data(1, 1), grid=8, threads=64, seed=seed)


def test_several_atomics_of_several_ctas_then_a_plain_read():
    """Without anything that could order them, who was last makes no difference."""
    body = f"{WHO} @%p1 red.global.add.u32 [%d0], 1; bar.sync 0; READ"
    assert outcome(body.replace("READ", ""), *data(1), grid=4, threads=64) == "right"
    read = "setp.eq.u32 %p2, %r1, 3; @%p2 ld.global.b32 %r4, [%d0];"
    assert outcome(body.replace("READ", read), *data(1), grid=1, threads=64) == "right"
    assert "read, not ordered after" in outcome(
        body.replace("READ", read), *data(1), grid=4, threads=64
    )
    # In one CTA the barrier orders the atomics of all its warps.
    read = "@%p1 ld.global.b32 %r4, [%d0];"
    assert outcome(body.replace("READ", read), *data(1), threads=128) == "right"
    assert "race" in outcome(
        body.replace("bar.sync 0;", "").replace("READ", read), *data(1), threads=128
    )


def test_atomics_of_cta_scope_do_not_reach_other_ctas():
    body = f"{WHO} @%p1 red.relaxed.SCOPE.global.add.u32 [%d0], 1;"
    assert outcome(body.replace("SCOPE", "gpu"), *data(1), grid=2, threads=64) == "right"
    assert outcome(body.replace("SCOPE", "cta"), *data(1), threads=64) == "right"
    assert "atomic, at the same time as one by CTA number" in outcome(
        body.replace("SCOPE", "cta"), *data(1), grid=2, threads=64
    )


# A barrier of the whole grid: arrive, wait for the count, go on.
GRID_BARRIER = """bar.sync 0; @%p3 bra SKIP#; fence.acq_rel.gpu;
red.relaxed.gpu.global.add.u32 [%d1], 1;
SPIN#: ld.relaxed.gpu.global.b32 %r8, [%d1]; setp.lt.u32 %p4, %r8, COUNT; @%p4 bra SPIN#;
fence.acq_rel.gpu; SKIP#: bar.sync 0;"""


def phases(count: int, *, second: bool = True) -> str:
    """Each CTA writes its number; all read the neighbour's; each writes again."""
    barrier = [GRID_BARRIER.replace("#", str(i)).replace("COUNT", str(i * count)) for i in (1, 2)]
    return (
        f"{WHO} setp.ne.u32 %p3, %r0, 0; mad.wide.u32 %d5, %r1, 4, %d0; add.u32 %r4, %r1, 1;"
        f"@!%p3 st.global.b32 [%d5], %r4; {barrier[0]} rem.u32 %r5, %r4, {count};"
        "mad.wide.u32 %d6, %r5, 4, %d0; ld.global.b32 %r6, [%d6];"
        f"{barrier[1] if second else ''} @!%p3 st.global.b32 [%d5], %r6;"
    )


@pytest.mark.parametrize("seed", [None, 1])
def test_a_cooperative_grid_may_wait_for_itself(seed):
    count = 12
    parts, counter = data(count, 1)
    Kernel(kernel_text(without_gaps(phases(count)))).launch(
        (count,), (1024,), [parts, counter], cooperative=True, seed=seed
    )
    assert parts.tolist() == [(i + 1) % count + 1 for i in range(count)]
    counter.zero_()
    with pytest.raises(Race, match=r"(read|write), not ordered after a (write|read)"):
        Kernel(kernel_text(without_gaps(phases(count, second=False)))).launch(
            (count,), (1024,), [parts, counter], cooperative=True, seed=seed
        )


def test_a_grid_that_waits_for_itself_must_be_cooperative():
    parts, counter = data(12, 1)
    with pytest.raises(Deadlock, match="cooperative=True"):
        Kernel(kernel_text(without_gaps(phases(12)))).launch(
            (12,), (1024,), [parts, counter], step_limit=4000
        )


def test_an_address_of_an_earlier_launch_is_named():
    kept, old = torch.zeros(1, dtype=torch.int64), torch.zeros(8, dtype=torch.int32)
    run("add.u64 %d2, %d0, 12; st.global.u64 [%d1], %d2;", old, kept, threads=1)
    follow = "ld.global.u64 %d2, [%d1]; ld.global.b32 %r1, [%d2];"
    with pytest.raises(OutOfBounds, match="byte 12 of argument 0 of an earlier launch of k"):
        run(follow, torch.zeros(8), kept, threads=1)
    with pytest.raises(OutOfBounds, match=r"address 0x\w+ is in no buffer\n"):
        run("mov.u64 %d2, 0x10; ld.global.b32 %r1, [%d2];", old, threads=1)


def test_races_may_be_left_unchecked():
    body = f"{WHO} @%p1 st.global.b32 [%d0], %r2;"
    run(body, *data(1), threads=64, checks=Checks(global_races=False))
