"""mbarriers, the cluster barrier and proxy fences in the emulator, against what the ISA says."""

from __future__ import annotations

import pytest
import torch
from ptx_text import run

from kimi_ops.testing.ptx import (
    Deadlock,
    Divergence,
    MbarrierError,
    Misaligned,
    MissingWait,
    OutOfBounds,
    PtxError,
    Race,
    Uninitialised,
    UnsupportedPtx,
)

SHARED = ".shared .align 128 .b8 buffer[1024]; .shared .align 8 .b8 bars[64];"
ZERO = "setp.eq.u32 %p1, %r0, 0; mov.u32 %r1, bars; mov.u32 %r2, buffer;"
INIT = ZERO + "@%p1 mbarrier.init.shared::cta.b64 [%r1], {count}; bar.sync 0;"
WAIT = "{{ .reg .pred q; L: mbarrier.try_wait.parity.shared::cta.b64 q, [%r1], {}; @!q bra L; }}"
SEEDS = [None, 0, 1]


def go(body: str, out: torch.Tensor | None = None, threads: int = 32, **options):
    tensors = [torch.zeros(max(threads, 8), dtype=torch.int32) if out is None else out]
    return run(body, *tensors, threads=threads, declarations=SHARED, **options)


def values(body: str, *registers: str) -> list[int]:
    """Registers of lane 0, as the kernel leaves them."""
    out = torch.zeros(32, dtype=torch.int32)
    stores = "".join(
        f"@%p1 st.global.b32 [%d0+{4 * i}], {name};" for i, name in enumerate(registers)
    )
    go(body + stores, out)
    return out[: len(registers)].tolist()


@pytest.mark.parametrize("count", [1, 5, 32])
def test_phases_and_states(count):
    """A model of the ISA's counting in Python, step by step against test_wait and pending_count."""
    steps = 2 * count + 3
    body = INIT.format(count=count)
    for i in range(steps):
        body += (
            "@%p1 mbarrier.arrive.shared::cta.b64 %d9, [%r1];"
            "@%p1 mbarrier.pending_count.b64 %r5, %d9;"
            "mbarrier.test_wait.parity.shared::cta.b64 %p2, [%r1], 0; selp.b32 %r6, 1, 0, %p2;"
            "mbarrier.test_wait.parity.shared::cta.b64 %p3, [%r1], 1; selp.b32 %r7, 1, 0, %p3;"
            "@%p1 mbarrier.test_wait.shared::cta.b64 %p4, [%r1], %d9;"
            "@%p1 selp.b32 %r8, 1, 0, %p4;"
        )
        body += "".join(f"@%p1 st.global.b32 [%d0+{16 * i + 4 * j}], %r{5 + j};" for j in range(4))
    out = torch.zeros(4 * steps, dtype=torch.int32)
    go(body, out)
    want, phase, pending = [], 0, count
    for _ in range(steps):
        before, at = pending, phase
        pending -= 1
        if pending == 0:
            phase, pending = phase + 1, count
        # The wait for a parity is over when the current phase has the other one.
        want += [before, int(phase % 2 != 0), int(phase % 2 != 1), int(phase > at)]
    assert out.tolist() == want


def test_every_form_of_arrive():
    body = INIT.format(count=40) + (
        "@%p1 mbarrier.arrive.release.cta.shared::cta.b64 %d8, [%r1], 3;"
        "@%p1 mbarrier.arrive.noComplete.release.cta.shared::cta.b64 %d9, [%r1], 4;"
        "@%p1 mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [%r1], 100;"
        "@%p1 mbarrier.arrive.relaxed.cta.b64 %d7, [%r1];"
        "@%p1 mbarrier.arrive_drop.shared::cta.b64 %d6, [%r1], 20;"
        "@%p1 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r1], 28;"
        "@%p1 mbarrier.pending_count.b64 %r3, %d6; @%p1 mbarrier.pending_count.b64 %r4, %d7;"
        "@%p1 mbarrier.arrive.shared.b64 %d5, [%r1], 11;"
        "@%p1 mbarrier.test_wait.shared::cta.b64 %p2, [%r1], %d5; @%p1 selp.b32 %r5, 1, 0, %p2;"
        "@%p1 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r1], 128;"
        "@%p1 mbarrier.test_wait.acquire.cta.shared::cta.b64 %p2, [%r1], %d5;"
        "@%p1 selp.b32 %r6, 1, 0, %p2;"
        # Twenty of the forty have left for good.
        "@%p1 mbarrier.arrive.shared.b64 %d5, [%r1], 20;"
        "@%p1 mbarrier.try_wait.shared::cta.b64 %p2, [%r1], %d5, 1000;"
        "@%p1 selp.b32 %r7, 1, 0, %p2;"
    )
    assert values(body, "%r3", "%r4", "%r5", "%r6", "%r7") == [31, 32, 0, 1, 1]


def test_generic_addresses_name_the_same_mbarrier():
    body = INIT.format(count=1) + (
        "cvta.shared.u64 %d9, %d8; @%p1 mbarrier.arrive.b64 %d7, [%d9];"
        "mbarrier.test_wait.parity.shared::cta.b64 %p2, [%r1], 0; selp.b32 %r3, 1, 0, %p2;"
    )
    assert values(body.replace("cvta.shared", "mov.u64 %d8, bars; cvta.shared"), "%r3") == [1]


# Warp 0 writes, arrives; warp 1 waits, reads, and the other way round in the next phase.
HANDOVER = (
    ZERO
    + """@%p1 mbarrier.init.shared::cta.b64 [%r1], 32;
@%p1 mbarrier.init.shared::cta.b64 [%r1+8], 1;
bar.sync 0; // init
shl.b32 %r3, %r0, 2; and.b32 %r3, %r3, 127; add.u32 %r3, %r3, %r2;
setp.ge.u32 %p2, %r0, 32; @%p2 bra READER;
st.shared.b32 [%r3], %r0;
mbarrier.arrive.shared::cta.b64 _, [%r1]; // full
W: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r1+8], 0; @!%p3 bra W; // empty
st.shared.b32 [%r3], 7;
bra E;
READER:
R: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r1], 0; @!%p3 bra R; // wait
ld.shared.b32 %r4, [%r3];
mad.wide.u32 %d9, %r0, 4, %d0; st.global.b32 [%d9+-128], %r4;
bar.warp.sync -1;
setp.eq.u32 %p4, %r0, 32; @%p4 mbarrier.arrive.shared::cta.b64 _, [%r1+8]; // used
E:
"""
)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_arrival_hands_data_over(seed):
    out = torch.zeros(64, dtype=torch.int32)
    go(HANDOVER, out, 64, seed=seed)
    assert out[:32].tolist() == list(range(32))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        ("bar.sync 0; // init", "", (Race, MbarrierError), "mbarrier"),
        ("arrive.shared::cta.b64 _, [%r1]; // full", "arrive.relaxed.cta.shared::cta.b64 _, [%r1];",
         (Race, Uninitialised), "shared memory"),
        ("try_wait.parity.shared::cta.b64 %p3, [%r1], 0",
         "try_wait.parity.relaxed.cta.shared::cta.b64 %p3, [%r1], 0", Race, "write by warp 0"),
        ("@!%p3 bra R; // wait", "", (Race, Uninitialised), "shared memory"),
        ("@!%p3 bra W; // empty", "", Race, "shared memory"),
        ("[%r1], 0; @!%p3 bra R;", "[%r1], 1; @!%p3 bra R;",
         (Race, Uninitialised, Deadlock), "shared"),
        ("[%r1+8], 0;", "[%r1+8], 1;", Race, "shared memory"),
        ("mbarrier.arrive.shared::cta.b64 _, [%r1]; // full", "", Deadlock,
         r"mbarrier at shared memory \+ \d+ is in phase 0, which still expects 32 of 32 arrivals "
         r"and 0 bytes"),
        ("@%p4 mbarrier.arrive.shared::cta.b64 _, [%r1+8]; // used", "", Deadlock,
         "1 of 1 arrivals"),
        ("[%r1], 32;", "[%r1], 33;", Deadlock, "1 of 33 arrivals"),
        ("[%r1+8], 1;", "[%r1+4], 1;", Misaligned, "8-byte access at mbarrier address"),
    ],
)  # fmt: skip
def test_bugs_of_a_handover(old, new, error, message, seed):
    assert HANDOVER.count(old) == 1
    with pytest.raises(error, match=message):
        go(HANDOVER.replace(old, new), torch.zeros(64, dtype=torch.int32), 64, seed=seed)


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1+8];", MbarrierError, "nothing has init"),
        ("@%p1 mbarrier.init.shared::cta.b64 [%r1], 1;", MbarrierError, "lives since PTX line"),
        ("@%p1 mbarrier.inval.shared::cta.b64 [%r1];"
         "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1];", MbarrierError, "inval at PTX line"),
        ("@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1], 3;", MbarrierError,
         "3 arrivals at once, but mbarrier"),
        ("@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1], 0;", MbarrierError, "count of 0"),
        ("@%p1 mbarrier.arrive.noComplete.shared::cta.b64 %d9, [%r1], 2;", MbarrierError,
         "noComplete"),
        ("@%p1 mbarrier.expect_tx.shared::cta.b64 [%r1], 1048576;", MbarrierError, "tx-count"),
        ("@%p1 mbarrier.init.shared::cta.b64 [%r1+8], 0;", MbarrierError, "count of 0"),
        ("@%p1 mbarrier.init.shared::cta.b64 [%r1+8], 1048576;", MbarrierError, "1048576"),
        ("@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1+4096];", OutOfBounds, "shared memory"),
        ("@%p1 mbarrier.expect_tx.shared::cta.b64 [%r1], 16; @%p1 ld.shared.b64 %d9, [%r1];",
         MbarrierError, "ordinary access"),
        ("@%p1 mbarrier.expect_tx.shared::cta.b64 [%r1], 16; @%p1 st.shared.b64 [%r1], %d0;",
         MbarrierError, "ordinary access"),
        ("\n@%p1 st.shared.b64 [%r1], %d0; @%p1 mbarrier.expect_tx.shared::cta.b64 [%r1], 16;",
         MbarrierError, "overwritten since"),
        ("@%p1 mbarrier.inval.shared::cta.b64 [%r1]; @%p1 ld.shared.b64 %d9, [%r1];",
         Uninitialised, "never written"),
        ("@%p1 mbarrier.arrive.shared::cta.b64 %d9, [%r1], 2;"
         "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1], 2;"
         "@%p1 mbarrier.test_wait.shared::cta.b64 %p2, [%r1], %d9;", MbarrierError, "last two"),
    ],
)  # fmt: skip
def test_what_an_mbarrier_is_not_for(body, error, message):
    go(INIT.format(count=2))
    with pytest.raises(error, match=message):
        go(INIT.format(count=2) + body)


def test_memory_may_be_an_mbarrier_again():
    again = (
        "@%p1 mbarrier.inval.shared::cta.b64 [%r1]; @%p1 mbarrier.init.shared::cta.b64 [%r1], 1;"
    )
    body = INIT.format(count=1) + again + "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1];"
    go(body + "bar.sync 0;" + WAIT.format(0))
    wait_here = INIT.format(count=1) + "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1];"
    with pytest.raises(Race, match="not ordered after the read by warp"):
        go(wait_here + WAIT.format(0) + again, threads=64)


def test_what_triton_does_to_mbarriers_before_their_first_use():
    """The same init twice, and other data over an mbarrier that nothing ever uses."""
    go(INIT.format(count=2) + "@%p1 mbarrier.init.shared::cta.b64 [%r1], 2;")
    go(INIT.format(count=2) + "@%p1 st.shared.b64 [%r1], %d0; @%p1 ld.shared.b64 %d9, [%r1];")


@pytest.mark.parametrize("kind", ["test_wait", "try_wait"])
def test_a_wait_that_can_never_end_is_a_deadlock(kind):
    body = INIT.format(count=2) + "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 64;"
    with pytest.raises(Deadlock, match="phase 0, which still expects 1 of 2 arrivals and 64 bytes"):
        go(body + WAIT.format(0).replace("try_wait", kind))


def test_a_wait_may_answer_false_once():
    """Code that does not ask again uses data that nobody has promised."""
    body = INIT.format(count=1) + (
        "setp.ge.u32 %p2, %r0, 32; @%p2 bra B; @%p1 st.shared.b32 [%r2], 5;"
        "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1]; bra E; B:"
        "mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r1], 0; {} ld.shared.b32 %r4, [%r2]; E:"
    )
    for seed in SEEDS:
        go(body.format("@!%p3 bra B;"), threads=64, seed=seed)
        with pytest.raises((Race, Uninitialised)):
            go(body.format(""), threads=64, seed=seed)


# Copies by cp.async whose landing an mbarrier counts.
COPIES = (
    ZERO
    + """@%p1 mbarrier.init.shared::cta.b64 [%r1], 32; bar.sync 0;
shl.b32 %r3, %r0, 4; and.b32 %r3, %r3, 511; add.u32 %r3, %r3, %r2; mad.wide.u32 %d9, %r0, 16, %d0;
setp.ge.u32 %p2, %r0, 32; @%p2 bra USE;
cp.async.cg.shared.global [%r3], [%d9], 16;
cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r1]; // arrive
bra E;
USE: W: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r1], 0; @!%p3 bra W;
ld.shared.b32 %r4, [%r3]; mad.wide.u32 %d8, %r0, 4, %d1; st.global.b32 [%d8+-128], %r4;
E:
"""
)


def copies(body: str, seed: int | None = None) -> torch.Tensor:
    x, out = torch.arange(128, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    run(body, x, out, threads=64, declarations=SHARED, seed=seed)
    return out


@pytest.mark.parametrize("seed", SEEDS)
def test_copies_that_arrive_at_an_mbarrier(seed):
    assert copies(COPIES, seed).tolist() == [4 * i for i in range(32)]
    # Without .noinc the copies' arrivals come on top of the 32, which nobody makes.
    counted = COPIES.replace("; // arrive", "; mbarrier.arrive.shared::cta.b64 _, [%r1];")
    assert copies(counted.replace(".noinc", ""), seed).tolist() == [4 * i for i in range(32)]
    for old, new, error in (
        (".noinc", "", Deadlock),
        ("@!%p3 bra W;", "", (MissingWait, Uninitialised, Race)),
        ("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r1];",
         "mbarrier.arrive.shared::cta.b64 _, [%r1];", MissingWait),
        ("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r1];", "", (Deadlock, MissingWait)),
    ):  # fmt: skip
        with pytest.raises(error):
            copies(COPIES.replace(old, new), seed)


def test_a_copy_by_cp_async_that_nobody_waits_for():
    body = ZERO + "mad.wide.u32 %d9, %r0, 4, %d0; shl.b32 %r3, %r0, 2; add.u32 %r3, %r3, %r2;"
    body += "cp.async.ca.shared.global [%r3], [%d9], 4; cp.async.commit_group;"
    go(body + "cp.async.wait_group 0;")
    with pytest.raises(MissingWait, match="freed while a copy into it is in flight"):
        go(body)


CLUSTER = (
    ZERO
    + """shl.b32 %r3, %r0, 2; add.u32 %r3, %r3, %r2; xor.b32 %r4, %r3, 128;
st.shared.b32 [%r3], %r0;
barrier.cluster.arrive.release.aligned;
barrier.cluster.wait.acquire.aligned;
ld.shared::cluster.b32 %r5, [%r4]; mad.wide.u32 %d9, %r0, 4, %d0; st.global.b32 [%d9], %r5;
"""
)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_barrier_of_a_cluster_of_one(seed):
    out = torch.zeros(64, dtype=torch.int32)
    go(CLUSTER, out, 64, seed=seed)
    assert out.tolist() == [i ^ 32 for i in range(64)]
    for broken, error in (
        (CLUSTER.replace("arrive.release", "arrive.relaxed"), Race),
        (CLUSTER.replace("barrier.cluster.wait.acquire.aligned;", ""), (Race, Uninitialised)),
        (CLUSTER.replace("barrier.cluster.arrive.release.aligned;", ""), Divergence),
        (CLUSTER.replace("barrier.cluster.wait", "barrier.cluster.arrive.aligned; //"), Divergence),
        (CLUSTER.replace("barrier.cluster.a", "setp.ge.u32 %p2, %r0, 32; @%p2 bra Z;"
                         "barrier.cluster.a") + "Z: bar.sync 0;", Deadlock),
    ):  # fmt: skip
        with pytest.raises(error):
            go(broken, torch.zeros(64, dtype=torch.int32), 64, seed=seed)


def test_names_of_a_cluster_of_one():
    body = ZERO + (
        "mapa.shared::cluster.u32 %r3, %r2, 0; sub.u32 %r3, %r3, %r2;"
        "getctarank.shared::cluster.u32 %r4, %r2; mov.u32 %r5, %cluster_nctaid.x;"
        "mov.u32 %r6, %cluster_ctarank; fence.acq_rel.cluster;"
    )
    assert values(body, "%r3", "%r4", "%r5", "%r6") == [0, 0, 1, 0]
    with pytest.raises(OutOfBounds, match="mapa of a CTA other than 0"):
        go(ZERO + "mapa.shared::cluster.u32 %r3, %r2, 1;")


def test_a_fenced_init_is_known_after_a_relaxed_cluster_barrier():
    body = ZERO + (
        "@%p1 mbarrier.init.shared::cta.b64 [%r1], 64; {}"
        "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;"
        "mbarrier.arrive.shared::cta.b64 _, [%r1];"
    )
    fence = "fence.mbarrier_init.release.cluster;"
    go(body.format(fence) + WAIT.format(0), threads=64)
    with pytest.raises(Race, match="mbarrier at shared memory"):
        go(body.format("") + WAIT.format(0), threads=64)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("mbarrier.arrive.release.gpu.shared::cta.b64 _, [%r1];", "gpu"),
        ("mbarrier.arrive.expect_tx.noComplete.b64 %d9, [%r1], 1;", "noComplete"),
        ("fence.proxy.async::generic.acquire.sync_restrict::shared::cluster.cluster;", "fence"),
        ("multimem.red.global.add.u32 [%d0], 1;", "multimem"),
        ("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r2], 1, [%r1];", "async"),
    ],
)
def test_what_is_not_supported_is_named(text, what):
    with pytest.raises((UnsupportedPtx, PtxError), match=what):
        go(ZERO + text)
