"""Modelled costs: hand-computed kernels, every resource binding once, errors, labels."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections import Counter
from functools import cache
from unittest import mock

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton: pip install 'triton>=3.4'")
# Decorating under the interpreter would make no compiled kernels.
_INTERPRET = os.environ.pop("TRITON_INTERPRET", None)
import triton.language as tl  # noqa: E402
from ptx_text import kernel_text  # noqa: E402

from kimi_ops.testing.cost import RATES, CostError, CostTable, Latencies, cost  # noqa: E402
from kimi_ops.testing.cost import machine_code as machine_code_module  # noqa: E402
from kimi_ops.testing.cost import rates_of as rates  # noqa: E402
from kimi_ops.testing.cost.devices import ASSUMED  # noqa: E402
from kimi_ops.testing.cost.latency import chain_cycles  # noqa: E402
from kimi_ops.testing.cost.machine_code import machine_code  # noqa: E402
from kimi_ops.testing.cost.model import busiest_share  # noqa: E402
from kimi_ops.testing.devices import device as static_device  # noqa: E402
from kimi_ops.testing.ptx import Kernel, Report  # noqa: E402
from kimi_ops.testing.ptx import trace as trace_module  # noqa: E402
from kimi_ops.testing.ptx.counters import Counts  # noqa: E402
from kimi_ops.testing.runner import run_triton  # noqa: E402
from kimi_ops.testing.static import KernelReport, report_triton, signature_of  # noqa: E402
from kimi_ops.testing.static.report import report_cubin  # noqa: E402
from kimi_ops.testing.static.toolchain import assemble, read_ptxas_log  # noqa: E402

ARCH = {name: r.arch for name, r in RATES.items()}


@cache
def compiled(text: str) -> KernelReport:
    """The static report of a PTX text with one kernel ``k``."""
    arch = text.split(".target ")[1].split("\n")[0]
    cubin, log = assemble(text, arch)
    limits = static_device(arch)
    return report_cubin(
        "k",
        case="k",
        language="cuda",
        device=limits,
        cubin=cubin,
        ptx=text,
        log=read_ptxas_log(log),
        threads_per_block=32,
    )


def executed(
    body: str,
    *tensors: torch.Tensor,
    grid: int = 1,
    threads: int = 32,
    declarations: str = "",
    arch: str = "sm_80",
) -> tuple[Report, KernelReport]:
    """A body of `kernel_text` emulated and compiled."""
    text = kernel_text(body, len(tensors), 0, declarations).replace("sm_80", arch)
    return Kernel(text).launch((grid,), (threads,), [*tensors]), compiled(text)


THREAD = "mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mad.lo.u32 %r3, %r1, %r2, %r0;"
COPY = (
    THREAD + "mad.wide.u32 %d4, %r3, 16, %d0; mad.wide.u32 %d5, %r3, 16, %d1;"
    "ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%d4];"
    "st.global.v4.b32 [%d5], {%r4, %r5, %r6, %r7};"
)


def copied(grid: int) -> tuple[Report, KernelReport]:
    x = torch.arange(grid * 128 * 4, dtype=torch.int32)
    return executed(COPY, x, torch.empty_like(x), grid=grid, threads=128)


def test_a_copy_by_hand():
    """64 CTAs of 4 warps on 108 SMs: at most one per SM, each warp moves 512 bytes each way."""
    got = cost(*copied(64), "A100")
    moved = 64 * 128 * 16 * 2
    us_of_clock = 1 / 1410
    expected = {
        "dram": moved / 2.039e6,
        "l2": moved / 5.4e6,
        "l2 port": 2 * 4 * 512 / 64 * us_of_clock,
        "shared": 4 * 4 * us_of_clock,  # loads come in through L1, 4 lines each
        "l1 tags": 2 * 4 * 4 / 4 * us_of_clock,
        "load_store": 2 * 4 * us_of_clock,
        "int32": 4 * 3 / 2 * us_of_clock,  # three multiply-adds, 64 lanes
        "issue": 4 * 6 / 4 * us_of_clock,  # and load, store, ret
        "fp32": 0,
        "special": 0,
        "tensor": 0,
        "atomics": 0,
        "launch": 1,
    }
    assert {n: r.us for n, r in got.resources.items() if n != "latency"} == pytest.approx(expected)
    # address 5, load from DRAM 466, store 10, around the CTA 200; then its ret.
    assert got.chain_cycles == pytest.approx(5 + 5 + 466 + 10 + 200, abs=10)
    assert got.bound == "latency"
    assert got.low_us == got.resources["latency"].us
    groups = [got.resources["dram"].us, got.resources["latency"].us]
    assert got.up_us == pytest.approx(sum(groups))


def test_a_large_copy_is_bound_by_dram():
    got = cost(*copied(2048), "A100")
    assert got.bound == "dram"
    assert got.low_us == pytest.approx(2048 * 128 * 16 * 2 / 2.039e6)
    assert cost(*copied(2048), "A100", dram_bytes=1).resources["dram"].us < 1e-3


MMA = (
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
    "{{{c}}}, {{%r4, %r5, %r6, %r7}}, {{%r8, %r9}}, {{{c}}};"
)


def multiplied(count: int, *, accumulators: int, threads: int = 128, arch: str = "sm_80"):
    names = [f"%a{i}" for i in range(4 * accumulators)]
    fields = [", ".join(names[4 * i : 4 * i + 4]) for i in range(accumulators)]
    body = f".reg .f32 {', '.join(names)};"
    body += "".join(f"mov.f32 {n}, 0f00000000;" for n in names)
    body += "".join(f"mov.b32 %r{i}, 0;" for i in range(4, 10))
    body += "mov.u32 %r10, 0;\nLOOP:\n"
    body += "".join(MMA.format(c=f) for f in fields)
    body += f"add.u32 %r10, %r10, 1; setp.lt.u32 %p1, %r10, {count}; @%p1 bra LOOP;"
    body += "st.global.f32 [%d0], %a0;"
    return executed(body, torch.zeros(4), threads=threads, arch=arch)


def test_matrix_products_by_hand():
    """4 warps, 16 rounds of 8 products of 16 x 8 x 16 at 1024 multiply-adds per clock."""
    got = cost(*multiplied(16, accumulators=8), "A100")
    clocks = 4 * 16 * 8 * 16 * 8 * 16 / 1024
    assert got.resources["tensor"].work == clocks
    assert got.resources["tensor"].us == pytest.approx(clocks / 1410)
    long = cost(*multiplied(64, accumulators=8), "A100")
    assert long.bound == "tensor"
    # One warp has one of four partitions.
    single = cost(*multiplied(16, accumulators=8, threads=32), "A100")
    assert single.resources["tensor"].us == pytest.approx(clocks / 1410)
    hopper = cost(*multiplied(64, accumulators=8, arch="sm_90a"), "H200")
    slower = 1024 / (0.629 * 2048) * 1410 / 1755
    assert hopper.resources["tensor"].us == pytest.approx(long.resources["tensor"].us * slower)


def test_dependent_products_take_their_latency():
    short = cost(*multiplied(8, accumulators=1), "A100")
    long = cost(*multiplied(24, accumulators=1), "A100")
    # 33 clocks each, and between them the few of the loop's own instructions.
    assert long.bound == "latency"
    assert 16 * 33 <= long.chain_cycles - short.chain_cycles <= 16 * 50


SHARED = ".shared .align 16 .b8 buffer[32768];"


def conflicting(stride: int) -> tuple[Report, KernelReport]:
    """Loads of one word per lane, ``stride`` words apart, all of shared memory written before."""
    body = "mov.u32 %r1, buffer; mov.u32 %r2, 0;"
    body += "mad.lo.u32 %r3, %r0, 4, %r1;\n"
    body += "".join(f"st.shared.b32 [%r3+{128 * i}], %r2;" for i in range(32))
    body += f"bar.sync 0; mad.lo.u32 %r3, %r0, {4 * stride}, %r1;"
    body += "".join("ld.shared.b32 %r4, [%r3];" for _ in range(64))
    body += "st.global.b32 [%d0], %r4;"
    return executed(body, torch.zeros(1, dtype=torch.int32), declarations=SHARED)


def test_more_conflicts_never_cost_less():
    before = None
    for stride in (1, 4, 32):
        got = cost(*conflicting(stride), "A100")
        assert got.resources["shared"].work == 32 + 64 * stride
        if before is not None:
            assert got.low_us >= before.low_us
            assert got.up_us > before.up_us
        before = got
    assert before.bound == "shared"
    assert before.low_us == pytest.approx((32 + 64 * 32) / 1410)


def many(instruction: str, count: int = 256, *, arch: str = "sm_80", grid: int = 1):
    """The same instruction on every one of 32 warps, results round-robin over 8 registers."""
    body = "".join(f"mov.b32 %r{i}, 0; mov.f32 %f{i - 4}, 0f3F800000;" for i in range(4, 12))
    body += "".join(instruction.format(r=f"%r{4 + i % 8}", f=f"%f{i % 8}") for i in range(count))
    return executed(body, torch.zeros(1), threads=1024, arch=arch, grid=grid)


ADDRESS = "mad.wide.u32 %d4, %r0, 16, %d0;"


def spread_atomics() -> tuple[Report, KernelReport]:
    """Every lane adds to a sector of its own, the same ones in each CTA."""
    body = "mad.wide.u32 %d4, %r0, 32, %d0;" + "red.global.add.u32 [%d4], 1;" * 32
    return executed(body, torch.zeros(1024, dtype=torch.int32), grid=216, threads=128)


def narrow_copies() -> tuple[Report, KernelReport]:
    """Words of 32 different lines by each cp.async, all of them in L1 after the first."""
    body = "mad.wide.u32 %d4, %r0, 128, %d0; mov.u32 %r1, buffer; mad.lo.u32 %r1, %r0, 4, %r1;"
    body += "cp.async.ca.shared.global [%r1], [%d4], 4; cp.async.wait_all;" * 24
    x = torch.zeros(32 * 1024, dtype=torch.int32)
    return executed(body, x, threads=1024, declarations=SHARED)


def reread(grid: int) -> tuple[Report, KernelReport]:
    """Every CTA reads the same 64 KiB, past L1."""
    body = ADDRESS + "".join(
        f"ld.global.cg.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d4+{16384 * i}];" for i in range(4)
    )
    return executed(body * 2, torch.zeros(1 << 14, dtype=torch.int32), grid=grid, threads=1024)


def chased() -> tuple[Report, KernelReport]:
    body = "ld.global.b64 %d1, [%d0];" + "add.u64 %d2, %d0, %d1; ld.global.b64 %d1, [%d2];" * 8
    return executed(body, torch.zeros(4, dtype=torch.int64))


BINDING = {
    "dram": (lambda: copied(2048), "A100"),
    "l2": (lambda: reread(108), "A100"),
    "l2 port": (lambda: reread(1), "A100"),
    "atomics": (spread_atomics, "A100"),
    "shared": (lambda: conflicting(32), "A100"),
    "l1 tags": (narrow_copies, "A100"),
    "load_store": (lambda: many("shfl.sync.idx.b32 {r}, {r}, 0, 31, -1;"), "A100"),
    "tensor": (lambda: multiplied(64, accumulators=8), "A100"),
    "issue": (
        # Two CTAs on each SM: of one alone the latency includes all of its issue.
        lambda: many(
            "add.u32 {r}, {r}, 1;" + "fma.rn.f32 {f}, {f}, {f}, {f};" * 3,
            64,
            arch="sm_90a",
            grid=264,
        ),
        "H100",
    ),
    "fp32": (lambda: many("fma.rn.f32 {f}, {f}, {f}, {f};"), "A100"),
    "int32": (lambda: many("add.u32 {r}, {r}, 1;"), "A100"),
    "special": (lambda: many("ex2.approx.f32 {f}, {f};"), "A100"),
    "latency": (chased, "A100"),
}


@pytest.mark.parametrize("resource", BINDING)
def test_each_resource_binds_somewhere(resource):
    make, device = BINDING[resource]
    got = cost(*make(), device)
    assert got.bound == resource, str(got)
    assert set(BINDING) | {"launch"} == set(got.resources)
    assert got.low_us == got.resources[resource].us <= got.up_us


COUNTED = [f.name for f in dataclasses.fields(Counts) if f.type == "int"]


@pytest.mark.parametrize("device", ["A100", "H100", "H200", "B200", "RTX 4090", "RTX 5090"])
def test_low_is_never_above_up_and_more_work_never_costs_less(device):
    x = torch.arange(128 * 4, dtype=torch.int32)
    base, static = executed(COPY, x, torch.empty_like(x), threads=128, arch=ARCH[device])
    random = np.random.default_rng(0)
    kinds = list(rates(device).tensor)
    for _ in range(60):
        report = copy.copy(base)
        report.total = copy.deepcopy(base.total)
        for name in COUNTED:
            setattr(report.total, name, int(10 ** random.uniform(0, 9)))
        for kind in kinds:
            report.total.tensor[kind] = int(10 ** random.uniform(0, 12))
        report.unique_read_bytes = int(10 ** random.uniform(0, 9))
        chain = 10 ** random.uniform(2, 6)
        got = cost(report, static, device, chain=chain)
        assert 0 < got.low_us <= got.up_us <= 2 * got.low_us * (1 + 1e-9)
        more = copy.copy(report)
        more.total = copy.deepcopy(report.total)
        name = str(random.choice([*COUNTED, *kinds]))
        if name in kinds:
            more.total.tensor[name] *= 10
        else:
            setattr(more.total, name, 10 * getattr(more.total, name))
        after = cost(more, static, device, chain=chain)
        assert after.low_us >= got.low_us
        assert after.up_us >= got.up_us


def test_tail_of_the_last_wave():
    assert busiest_share(np.ones(108), 108) == 1 / 108
    assert busiest_share(np.ones(109), 108) == 2 / 109
    assert busiest_share(np.ones(1), 108) == 1
    # The long one goes last, to an SM that has done one already.
    assert busiest_share(np.array([1, 1, 1, 9]), 3) == 10 / 12
    full, _ = copied(108)
    over, static = copied(109)
    a, b = cost(full, static, "A100"), cost(over, static, "A100")
    assert b.resources["issue"].us == pytest.approx(2 * a.resources["issue"].us)
    assert b.waves == 1
    # 16 CTAs of 4 warps fill an SM: one more than that on all SMs is another wave.
    assert cost(over, static, "A100", ctas=108 * 16 + 1, dram_bytes=1).waves == 2


def test_a_sample_stands_for_its_grid():
    whole, static = copied(512)
    part, _ = copied(64)
    moved = 512 * 128 * 16 * 2
    a = cost(whole, static, "A100")
    b = cost(part, static, "A100", ctas=512, dram_bytes=moved)
    for name, resource in a.resources.items():
        assert b.resources[name].us == pytest.approx(resource.us), name
    assert (a.low_us, a.up_us) == pytest.approx((b.low_us, b.up_us))
    assert "512 CTAs, 64 of them executed" in str(b)
    with pytest.raises(CostError, match="needs dram_bytes"):
        cost(part, static, "A100", ctas=512)
    with pytest.raises(CostError, match="0 CTAs"):
        cost(part, static, "A100", ctas=0, dram_bytes=1)


def chain(body: str, *tensors: torch.Tensor, threads: int = 32, **more) -> float:
    tensors = tensors or (torch.zeros(64, dtype=torch.int64),)
    report, _ = executed(body, *tensors, threads=threads, **more)
    return chain_cycles(report.trace, rates("A100"), Latencies(), 1.0)


@pytest.mark.parametrize(
    ("instruction", "clocks"),
    [
        ("add.u32 %r1, %r1, 1;", 5),
        ("fma.rn.f32 %f1, %f1, %f1, %f1;", 5),
        ("ex2.approx.f32 %f1, %f1;", 20),
        ("shfl.sync.idx.b32 %r1, %r1, 0, 31, -1;", 24),
        ("cvt.rn.f32.u32 %f1, %r1; cvt.rzi.u32.f32 %r1, %f1;", 12),
        ("div.u32 %r1, %r1, 3;", 60),
        # Nothing but moves: the hardware renames or does them for free.
        ("mov.b32 %r1, %r1;", 0),
    ],
)
def test_a_chain_grows_by_its_latency(instruction, clocks):
    setup = "mov.b32 %r1, 1; mov.f32 %f1, 0f3F800000;"
    grown = chain(setup + instruction * 24) - chain(setup + instruction * 8)
    # Issue of one instruction per clock is what a chain of nothing takes.
    assert grown == pytest.approx(16 * clocks, abs=16)


def test_loads_take_as_long_as_the_level_they_reach():
    first = "ld.global.b64 %d1, [%d0]; add.u64 %d2, %d0, %d1;"
    again = "ld.global.b64 %d1, [%d2]; add.u64 %d2, %d0, %d1;"
    past = "ld.global.cg.b64 %d1, [%d2]; add.u64 %d2, %d0, %d1;"
    other = "ld.global.b64 %d1, [%d2+256]; add.u64 %d2, %d0, %d1;"
    r = rates("A100")
    base = chain(first)
    assert base == pytest.approx(466 + 5 + 200, abs=10)
    assert chain(first + again) - base == r.l1_latency.value + 5
    assert chain(first + past) - base == r.l2_latency.value + 5
    assert chain(first + other) - base == r.dram_latency.value + 5


def test_copies_in_flight_hide_behind_work():
    copies = "mov.u32 %r1, buffer; cp.async.ca.shared.global [%r1], [%d0], 16;"
    setup, wait = "mov.b32 %r2, 1;", "cp.async.wait_all;"
    work = "add.u32 %r2, %r2, 1;" * 60
    body = "setp.ne.u32 %p1, %r0, 0; @%p1 exit;"
    alone = chain(body + copies + wait, declarations=SHARED)
    hidden = chain(body + setup + copies + work + wait, declarations=SHARED)
    after = chain(body + setup + copies + wait + work, declarations=SHARED)
    assert hidden == pytest.approx(alone, abs=66)
    assert after == pytest.approx(alone + 60 * 5, abs=10)


def test_a_barrier_waits_for_the_slower_warp():
    def split(work: int) -> float:
        slow = "add.u32 %r2, %r2, 1;" * work
        body = "mov.b32 %r2, 1; setp.lt.u32 %p1, %r0, 32; @%p1 bra QUICK;" + slow
        return chain(body + "\nQUICK:\nbar.sync 0;" + "add.u32 %r2, %r2, 1;" * 10, threads=64)

    assert split(100) - split(40) == pytest.approx(60 * 5, abs=5)


def test_after_a_barrier_warps_go_on_side_by_side():
    def both(work: int) -> float:
        one = "add.u32 %r2, %r2, 1;" * work
        body = "mov.b32 %r2, 1; setp.lt.u32 %p1, %r0, 32; bar.sync 0; @%p1 bra OTHER;"
        body += f"{one} bra END;\nOTHER:\n{one}\nEND:\nbar.sync 0;"
        return chain(body, threads=64)

    assert both(100) - both(40) == pytest.approx(60 * 5, abs=5)


def test_longest_cta_is_walked():
    """CTA 3 of 8 loops 50 times, the others once."""
    body = THREAD + "mov.b32 %r4, 0; setp.eq.u32 %p1, %r1, 3; selp.u32 %r5, 50, 1, %p1;\nLOOP:\n"
    body += "add.u32 %r4, %r4, 1; setp.lt.u32 %p2, %r4, %r5; @%p2 bra LOOP;"
    report, static = executed(body, torch.zeros(1, dtype=torch.int32), grid=8)
    assert report.trace.cta == 3
    assert report.cta_instructions.argmax() == 3
    assert report.cta_instructions.sum() == report.total.warp_instructions
    got = cost(report, static, "A100")
    assert got.chain_cycles > 50 * 10
    # The SM that has the long CTA, not the average one.
    share = report.cta_instructions.max() / report.cta_instructions.sum()
    assert got.resources["issue"].work == pytest.approx(
        share * (report.total.warp_instructions - 8 * 5), rel=0.1
    )


def test_sectors_that_reach_l2():
    """Two warps of each of 3 CTAs read the same 512 bytes, three times."""
    plain = "ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%d4];"
    setup = "and.b32 %r3, %r0, 31; mad.wide.u32 %d4, %r3, 16, %d0;"
    x = torch.zeros(128, dtype=torch.int32)
    report, _ = executed(setup + plain * 3, x, grid=3, threads=64)
    assert report.total.global_sectors == 3 * 2 * 3 * 16
    assert report.total.l2_sectors == 3 * 16
    assert report.total.l1_lines == report.total.l1_wavefronts == 3 * 2 * 3 * 4
    report, _ = executed(setup + plain.replace("global", "global.cg") * 3, x, grid=3, threads=64)
    assert report.total.l2_sectors == report.total.global_sectors
    # A store, then an atomic of one sector per lane.
    report, _ = executed(setup + "st.global.b32 [%d4], %r3;", x)
    assert report.total.l2_sectors == 16
    report, _ = executed(ADDRESS + "red.global.add.u32 [%d4], 1;", x)
    assert report.total.l2_sectors == report.total.atomic_sectors == 16


def test_loads_that_run_as_one_count_as_each_alone():
    """Pairs of loads of the same addresses: the first of a pair fetches, the second has it."""
    load = "ld.global.v4.b32 {{%r{}, %r{}, %r{}, %r{}}}, [%d4+{}];"
    body = ADDRESS + "".join(
        load.format(*(4 + 4 * (i % 2) + j for j in range(4)), 512 * (i // 2)) for i in range(8)
    )
    kernel, x = Kernel(kernel_text(body, 1)), torch.zeros(4096, dtype=torch.int32)
    found = []
    for fuse in (True, False):
        report = kernel.launch((3,), (64,), [x], fuse=fuse)
        found.append((report.total, report.trace.events, report.cta_instructions.tolist()))
        assert report.total.l2_sectors == 3 * 5 * 16
        assert [level for e in report.trace.events for _, level in e.levels] == [3, 1] * 4
    assert found[0] == found[1]


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, k, BM: tl.constexpr):
    m, offs = tl.arange(0, BM), tl.arange(0, 64)
    acc = tl.zeros([BM, 64], tl.float32)
    for start in range(0, k, 64):
        a = tl.load(a_ptr + m[:, None] * k + (start + offs)[None, :])
        b = tl.load(b_ptr + (start + offs)[:, None] * 64 + offs[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + m[:, None] * 64 + offs[None, :], acc)


@triton.jit
def sums_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        acc += tl.load(x_ptr + start + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.arange(0, BLOCK), acc)


if _INTERPRET is not None:
    os.environ["TRITON_INTERPRET"] = _INTERPRET


@cache
def product() -> tuple[Report, KernelReport]:
    """64 x 64 x 512 by one CTA."""
    a, b = torch.ones(64, 512).bfloat16(), torch.ones(512, 64).bfloat16()
    c = torch.empty(64, 64)
    arguments = {"a_ptr": a, "b_ptr": b, "c_ptr": c, "k": 512, "BM": 64}
    signature, constants = signature_of(product_kernel, arguments)
    report = run_triton(product_kernel, (1,), **arguments)
    assert (c == 512).all()
    return report, report_triton(
        product_kernel, 80, signature=signature, constexprs=constants, num_warps=4
    )


def test_machine_instructions_of_a_matrix_product():
    report, static = product()
    code = machine_code(report, static)
    assert code.source == "SASS"
    # m16n8k16 each; memory instructions survive ptxas one by one too.
    assert code.tensor_check == 1
    assert code.pipes["tensor"] == 64 * 64 * 512 / (16 * 8 * 16)
    moved = sum(
        n
        for op, n in report.total.opcodes.items()
        if op.startswith(("ld", "st", "cp.async")) and "param" not in op and "group" not in op
    )
    assert moved <= code.pipes["load_store"] <= 1.1 * moved
    # In the loop alone there are more machine instructions than matrix instructions.
    assert code.issued > sum(code.pipes.values()) > code.pipes["tensor"]
    # Accumulators are set to zero once, though their line is that of the loop.
    lines = machine_code_module._lines(static.artifacts["cubin"], static.kernel)
    assert sum(mine.once.total() for mine in lines.values()) >= 64 * 64 / 128 / 2
    got = cost(report, static, "A100")
    assert got.instructions == "SASS"
    assert got.resources["issue"].work == code.issued
    assert "SASS (tensor check 1.00)" in str(got)


def test_loops_that_ptxas_unrolls_count_once_per_copy():
    x, out = torch.ones(128 * 64), torch.empty(128)
    arguments = {"x_ptr": x, "out_ptr": out, "n": 128 * 64, "BLOCK": 128}
    signature, constants = signature_of(sums_kernel, arguments)
    report = run_triton(sums_kernel, (1,), **arguments)
    static = report_triton(sums_kernel, 80, signature=signature, constexprs=constants)
    code = machine_code(report, static)
    assert code.unrolled > 1
    # 4 warps load 64 times; a remainder loop and the store come on top.
    assert 4 * 64 <= code.pipes["load_store"] <= 1.5 * 4 * 64


def test_without_a_line_table_ptx_is_counted_and_said():
    got = cost(*copied(64), "A100")
    assert got.instructions == "PTX"
    assert any("PTX" in note for note in got.notes)
    assert not any("PTX" in note for note in cost(*product(), "A100").notes)


def test_a_bad_estimate_is_noted():
    report, static = product()
    assert not any("badly" in note for note in cost(report, static, "A100").notes)
    # As if ptxas had kept only half of the matrix instructions.
    sass = static.artifacts["cubin"]
    lines = machine_code_module._lines(sass, static.kernel)
    halved = {
        line: dataclasses.replace(
            mine, looped=Counter(mine.looped | {"tensor": mine.looped["tensor"] // 2})
        )
        if mine.looped["tensor"]
        else mine
        for line, mine in lines.items()
    }
    with mock.patch.object(machine_code_module, "_lines", return_value=halved):
        assert any("badly" in note for note in cost(report, static, "A100").notes)


def test_spills_and_assumed_rates_are_noted():
    report, static = copied(64)
    spilling = dataclasses.replace(static, spill_store_bytes=8, spill_load_bytes=12)
    assert any("20 B per thread" in note for note in cost(report, spilling, "A100").notes)
    assert not any("spills" in note for note in cost(report, static, "A100").notes)
    x = torch.arange(512, dtype=torch.int32)
    report, static = executed(COPY, x, torch.empty_like(x), threads=128, arch="sm_100a")
    notes = cost(report, static, "B200").notes
    assumed = [n for n, f in rates("B200").figures().items() if f.kind == ASSUMED]
    assert {"l2", "dram_latency"} <= set(assumed)
    assert all(any(note.startswith(f"{n} is assumed") for note in notes) for n in assumed)


def _without_artifact(static: KernelReport, name: str) -> KernelReport:
    left = {key: value for key, value in static.artifacts.items() if key != name}
    return dataclasses.replace(static, artifacts=left)


ERRORS = {
    "of no launch": lambda r, s: (dataclasses.replace(r, trace=None), s, "A100"),
    "report is of other": lambda r, s: (dataclasses.replace(r, kernel="other"), s, "A100"),
    "H100 is sm_90a": lambda r, s: (r, s, "H100"),
    "PTX for sm_90a": lambda r, s: (dataclasses.replace(r, target="sm_90a"), s, "A100"),
    "without its PTX": lambda r, s: (r, _without_artifact(s, "ptx"), "A100"),
    "needs the report's trace and the compiled cubin": lambda r, s: (
        r,
        _without_artifact(s, "cubin"),
        "A100",
    ),
    "another k than the compiled one": lambda r, s: (r, compiled(kernel_text("", 2)), "A100"),
    "cannot run on A100: registers": lambda r, s: (
        r,
        dataclasses.replace(s, registers=256),
        "A100",
    ),
    "too many blocks": lambda r, s: (
        dataclasses.replace(r, trace=dataclasses.replace(r.trace, events=[])),
        s,
        "A100",
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_what_is_missing_or_contradictory_is_an_error(message):
    report, static = copied(4)
    cost(report, static, "A100")
    with pytest.raises(CostError, match=message):
        cost(*ERRORS[message](report, static))


def test_unknown_devices_and_rates():
    report, static = copied(4)
    with pytest.raises(ValueError, match="no rates for 'V100'; there are A100, H100"):
        cost(report, static, "V100")
    report, static = multiplied(2, accumulators=1)
    without = dataclasses.replace(rates("A100"), tensor={})
    with pytest.raises(CostError, match=r"A100 has no published rate of mma\.sync bf16\.f32"):
        cost(report, static, without)
    assert cost(report, static, "a100").device == "A100"


def test_waits_on_mbarriers_need_a_chain():
    report, static = copied(4)
    code = (dataclasses.replace(report.trace.code[0], opcode="mbarrier.try_wait.shared.b64"),)
    trace = dataclasses.replace(report.trace, code=(*code, *report.trace.code[1:]))
    with pytest.raises(CostError, match=r"mbarrier\.try_wait.*give chain"):
        chain_cycles(trace, rates("A100"), Latencies(), 1.0)
    assert cost(report, static, "A100", chain=141_000).resources["latency"].us == 100


def test_a_trace_that_is_too_long_is_dropped():
    body = "mov.u32 %r1, 0;\nLOOP:\nadd.u32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, 40; @%p1 bra LOOP;"
    with mock.patch.object(trace_module, "EVENT_LIMIT", 20):
        report, static = executed(body, torch.zeros(1))
    assert not report.trace.events
    assert report.cta_instructions.sum() == report.total.warp_instructions
    with pytest.raises(CostError, match="too many blocks"):
        cost(report, static, "A100")


def test_everything_says_that_it_is_modelled():
    got = cost(*copied(2048), "A100")
    assert "MODELLED, not measured" in str(got)
    assert "us modelled" in str(got)
    for name in got.resources:
        assert name in str(got)
    table = CostTable()
    table.add("copy", got)
    table.add("product", cost(*product(), "A100"))
    text = str(table)
    assert "MODELLED, not measured" in text
    assert all(word in text for word in ("copy", "product_kernel", "A100", "dram", "note: A100: "))
    low, up = table.total_us()
    assert low == pytest.approx(sum(c.low_us for _, c in table) + 2)
    assert up == pytest.approx(sum(c.up_us for _, c in table) + 2)
    assert table.total_us(["copy"]) == pytest.approx((got.low_us + 1, got.up_us + 1))
    with pytest.raises(KeyError, match="no case 'other'"):
        table.total_us(["other"])
    table.add("copy", dataclasses.replace(got, device="H100"))
    with pytest.raises(ValueError, match="several devices"):
        table.total_us()


def test_every_figure_has_a_source_and_peaks_are_those_published():
    """Dense 16-bit products with float32 accumulation, TFLOP/s, within the rounding of a clock."""
    for r in RATES.values():
        for figure in [*r.figures().values(), *r.tensor.values()]:
            assert figure.value > 0
            assert figure.source
            assert figure.kind in ("vendor", "measured", "recalled", "fitted", "assumed")
    peaks = {"A100": 312, "RTX 4090": 165.2, "RTX 5090": 209.5}
    for name, peak in peaks.items():
        r = rates(name)
        flops = 2 * r.sms.value * r.clock.value * r.tensor["mma.sync bf16.f32"].value
        assert flops / 1e12 == pytest.approx(peak, rel=2e-3)
        whole = 2 * r.sms.value * r.clock.value * r.tensor["mma.sync s8.s32"].value
        assert whole / 1e12 == pytest.approx({"A100": 624}.get(name, 4 * peak), rel=2e-3)
    r = rates("H100")
    assert 2 * 132 * 1.83e9 * r.tensor["wgmma bf16.f32"].value / 1e12 == pytest.approx(
        989.4, rel=1e-3
    )
