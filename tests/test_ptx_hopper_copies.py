"""Bulk copies in the emulator, by hand, from CUDA C++ and from Triton, and planted bugs."""

from __future__ import annotations

import os
import re

import hopper_kernels
import pytest
import torch
from hopper_kernels import kernel
from ptx_text import HEADER

from kimi_ops.testing.ptx import (
    Checks,
    Deadlock,
    Kernel,
    MbarrierError,
    Misaligned,
    MissingFence,
    MissingWait,
    OutOfBounds,
    PtxError,
    Race,
    TensorMap,
    Uninitialised,
    UnsupportedPtx,
)
from kimi_ops.testing.runner import run_triton

SEEDS = [None, 0, 1]
needs_nvrtc = pytest.mark.skipif(
    not hopper_kernels.available(), reason="needs NVRTC: pip install cuda-bindings and its wheels"
)


BULK = """@%p1 mbarrier.init.shared::cta.b64 [%r2], 1; bar.sync 0;
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 512;
@%p1 cp.async.bulk.prefetch.L2.global [%d0], 512;
@%p1 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%d0], 512, [%r2]; // load
W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0; @!%p2 bra W;
shl.b32 %r4, %r0, 4; add.u32 %r4, %r4, %r1; ld.shared.b32 %r5, [%r4]; // read
add.u32 %r5, %r5, 1; st.shared.b32 [%r4], %r5; // write
fence.proxy.async; // fence
bar.sync 0;
@%p1 cp.async.bulk.global.shared::cta.bulk_group [%d0], [%r1], 512; // store
@%p1 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%d0+512], [%r1], 512;
@%p1 cp.async.bulk.commit_group;
@%p1 cp.async.bulk.wait_group.read 0; // done
bar.sync 0; // last
st.shared.b32 [%r4], %r5;
"""


def bulk(body: str = BULK, seed: int | None = None, checks: Checks | None = None):
    x = torch.arange(256, dtype=torch.int32)
    map_of = TensorMap(torch.zeros(8, 8, dtype=torch.int32), (8, 8))
    arguments = [map_of, x, 0, 0, 0, 0, 0]
    report = kernel(body, 1, 512).launch((1,), (32,), arguments, seed=seed, checks=checks)
    return x, report


@pytest.mark.parametrize("seed", SEEDS)
def test_contiguous_copies(seed):
    x, report = bulk(seed=seed)
    want = torch.arange(256, dtype=torch.int32)
    want[:128:4] += 1
    want[128:] += want[:128]
    assert torch.equal(x, want)
    total = report.total
    assert (total.bulk_load_bytes, total.bulk_store_bytes) == (512, 1024)
    assert (total.global_load_bytes, total.global_store_bytes, total.atomics) == (512, 512, 128)
    # 16 sectors each: the load, the store, the reduction.
    assert total.global_sectors == total.global_sectors_ideal == 48
    # 4 lines of 128 bytes land; three accesses of all 16-byte chunks meet in 4 of 32 banks each.
    assert (total.shared_wavefronts, total.shared_wavefronts_ideal) == (4 + 3 * 4, 4 + 3)
    assert total.mbarrier_phases == 1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        ("[%d0], 512, [%r2]; // load", "[%d0+528], 512, [%r2];", OutOfBounds, "argument 1"),
        ("[%r1], [%d0], 512, [%r2];", "[%r1+1040], [%d0], 512, [%r2];", OutOfBounds, "shared mem"),
        ("[%d0], 512, [%r2];", "[%d0+8], 512, [%r2];", Misaligned, "multiples of 16"),
        ("[%d0], 512, [%r2];", "[%d0], 504, [%r2];", Misaligned, "504 bytes"),
        ("[%r1], [%d0], 512, [%r2];", "[%r1+8], [%d0], 512, [%r2];", Misaligned, "shared memory"),
        ("[%d0], 512, [%r2];", "[%d0], 0, [%r2];", Misaligned, "size not 0"),
        ("b64 _, [%r2], 512;", "b64 _, [%r2], 496;", Deadlock, "-16 bytes"),
        ("b64 _, [%r2], 512;", "b64 _, [%r2], 528;", Deadlock, "16 bytes"),
        ("@!%p2 bra W;", "", MissingWait, r"issued at PTX line \d+, is in flight"),
        ("[%r2], 0; @!", "[%r2], 1; @!", (MissingWait, Deadlock), "in flight|phase 1"),
        ("fence.proxy.async; // fence", "", MissingFence, "without a fence.proxy.async after the "
         r"write by warp 0 at PTX line \d+"),
        ("@%p1 cp.async.bulk.wait_group.read 0; // done", "", Race,
         r"while the asynchronous read issued at PTX line \d+ \(cp.async.bulk"),
        ("@%p1 cp.async.bulk.commit_group;", "", Race, "is in flight"),
        ("read 0; // done", "read 1;", Race, "is in flight"),
        ("[%r1], 512; // store", "[%r1+512], 512;", Uninitialised, "asynchronous read"),
        ("mbarrier.init", "mbarrier.init.shared::cta.b64 [%r2], 2; @%p1 mbarrier.init",
         MbarrierError, "lives since"),
        ("bar.sync 0;\n@%p1 mbarrier.arrive", "\n@%p1 mbarrier.arrive", MbarrierError,
         "without fence.mbarrier_init, fence.proxy.async or a barrier after its init"),
        ("@%p1 mbarrier.init.shared::cta.b64 [%r2], 1;", "", MbarrierError, "nothing has init"),
        ("W: mbarrier", "@%p1 mbarrier.inval.shared::cta.b64 [%r2]; W: mbarrier", MbarrierError,
         "copies to it in flight"),
    ],
)  # fmt: skip
def test_bugs_of_contiguous_copies(old, new, error, message, seed):
    assert BULK.count(old) == 1
    with pytest.raises(error, match=message):
        bulk(BULK.replace(old, new), seed)


def test_an_early_write_and_a_second_copy_meet_the_one_in_flight():
    load = next(line for line in BULK.splitlines() if "// load" in line)
    for early in ("@%p1 st.shared.b32 [%r1], %r0;", load):
        with pytest.raises(MissingWait, match="is in flight"):
            bulk(BULK.replace(load, load + "\n" + early))


@pytest.mark.parametrize(
    "fence", ["fence.mbarrier_init.release.cluster;", "fence.proxy.async.shared::cta;"]
)
def test_a_fence_publishes_an_init_without_a_barrier(fence):
    bulk(BULK.replace("bar.sync 0;\n@%p1 mbarrier.arrive", f"{fence}\n@%p1 mbarrier.arrive"))


def test_what_is_in_flight_at_exit():
    """Shared memory is freed while copies use it."""
    head, tail = BULK.split("W: mbarrier")
    with pytest.raises(MissingWait, match="nobody has waited for the phase of its mbarrier"):
        bulk(head)
    cut = tail[: tail.index("@%p1 cp.async.bulk.wait_group")]
    with pytest.raises(MissingWait, match="freed while an asynchronous read"):
        bulk(head + "W: mbarrier" + cut)
    bulk(head + "W: mbarrier" + cut + "@%p1 cp.async.bulk.wait_group 0;")


def test_a_store_arrives_when_it_is_waited_for():
    """wait_group.read says nothing about global memory; wait_group does."""
    body = BULK + (
        "@%p1 {} bar.sync 0; ld.global.b32 %r6, [%d0]; setp.eq.u32 %p4, %r6, 0; @%p4 trap;"
    )
    bulk(body.format("cp.async.bulk.wait_group 0;"))
    with pytest.raises(PtxError, match="trap executed"):
        bulk(body.format("cp.async.bulk.wait_group.read 0;"))


def test_a_fence_may_follow_the_barrier_but_not_precede_the_write():
    late = BULK.replace("fence.proxy.async; // fence", "").replace(
        "@%p1 cp.async.bulk.global", "fence.proxy.async; @%p1 cp.async.bulk.global"
    )
    bulk(late)
    early = BULK.replace("fence.proxy.async; // fence", "").replace(
        "shl.b32 %r4, %r0, 4;", "fence.proxy.async; shl.b32 %r4, %r0, 4;"
    )
    with pytest.raises(MissingFence):
        bulk(early)


def test_what_the_generic_proxy_wrote_must_be_fenced_before_a_copy_over_it():
    head = "shl.b32 %r4, %r0, 4; add.u32 %r4, %r4, %r1; st.shared.b32 [%r4], %r0; {} "
    bulk(head.format("fence.proxy.async;") + BULK)
    with pytest.raises(MissingFence, match="asynchronous overwrite"):
        bulk(head.format("") + BULK)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (".multicast::cluster [%r1], [%d0], 16, [%r2], 1;", "multicast::cluster"),
        ("", "direction"),
    ],
)
def test_what_of_bulk_copies_is_not_supported_is_named(text, message):
    body = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes" + text
    if not text:
        body = (
            "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r1], [%r1],"
            " 16, [%r2];"
        )
    with pytest.raises(UnsupportedPtx, match=message):
        bulk(body)


def test_a_cluster_of_two_is_refused():
    text = HEADER + ".visible .entry k() .reqnctapercluster {} {{ ret; }}"
    Kernel(text.format("1, 1, 1"))
    with pytest.raises(UnsupportedPtx, match="reqnctapercluster 2, 1, 1"):
        Kernel(text.format("2, 1, 1"))


# Kernels in CUDA C++


def pipeline(ptx: str, seed: int | None, tiles: int = 8):
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-99, 99, (tiles * 256,), dtype=torch.int32, generator=generator)
    out = torch.full((64,), -1, dtype=torch.int32)
    report = Kernel(ptx).launch(
        (1,), (96,), [x, out, tiles], seed=seed, uninitialised=[out], step_limit=20_000
    )
    assert torch.equal(out, x.view(tiles, 4, 64).sum((0, 1)).int())
    return report


def negate(ptx: str, seed: int | None, rows: int = 40, columns: int = 200, swizzle: int = 128):
    x = torch.randn(rows, columns).bfloat16()
    y = torch.zeros_like(x)
    maps = [TensorMap(x, (16, 64), 128), TensorMap(y, (16, 64), swizzle)]
    grid = (-(-rows // 16),)
    report = Kernel(ptx).launch(grid, (128,), [*maps, columns], seed=seed, step_limit=20_000)
    assert torch.equal(y, torch.where(torch.arange(columns) % 64 < 8, x, -x))
    return report


@needs_nvrtc
@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
def test_kernels_with_bulk_copies_are_right_in_every_schedule(seed):
    report = pipeline(hopper_kernels.compiled(hopper_kernels.PIPELINE), seed)
    assert report.total.bulk_load_bytes == report.total.global_load_bytes == 8 * 1024
    assert report.total.global_sectors == (8 * 1024 + 256) // 32
    # Per tile a full and an empty phase.
    assert report.total.mbarrier_phases == 16
    negate(hopper_kernels.compiled(hopper_kernels.TENSOR), seed)


@needs_nvrtc
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ('"mbarrier.init.shared::cta.b64 [%0], 2;"', '"mbarrier.init.shared::cta.b64 [%0], 1;"',
         Deadlock),
        ("wait(empty + s, (t / STAGES & 1) ^ 1);", "", MbarrierError),
        ("wait(empty + s, (t / STAGES & 1) ^ 1);", "wait(empty + s, t / STAGES & 1);", Deadlock),
        ("wait(full + s, t / STAGES & 1);", "wait(full + s, 0);", (Race, Deadlock)),
        ("wait(full + s, t / STAGES & 1);", "wait(full + s, (t / STAGES & 1) ^ 1);",
         (Uninitialised, Deadlock)),
        ("int s = t % STAGES;\n    wait(full", "int s = t % 2;\n    wait(full",
         Deadlock),
        ('"r"(at(empty + s)) : "memory");\n  }', '"r"(at(empty + s)) : "memory");\n'
         "    if (ring[s][lane] == 12345) sum++;\n  }", (Race, MissingWait)),
        ("1024, [%2];", "1040, [%2];", MissingWait),
        ("_, [%0], 1024;", "_, [%0], 1008;", Deadlock),
        ("x + t * 256", "x + t * 256 + 4", OutOfBounds),
        ('"l"(out)', '"l"(out + 4)', OutOfBounds),
        ("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 1024;",
         "mbarrier.arrive.shared::cta.b64 _, [%0];", MissingWait),
        ("__syncthreads();\n  if (warp", "if (warp", (Race, MbarrierError)),
    ],
)  # fmt: skip
def test_bugs_of_a_pipeline(old, new, error, seed):
    assert hopper_kernels.PIPELINE.count(old) == 1
    ptx = hopper_kernels.compiled(hopper_kernels.PIPELINE.replace(old, new))
    with pytest.raises(error):
        pipeline(ptx, seed)


@needs_nvrtc
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("threadIdx.x % 8 ^ r % 8", "threadIdx.x % 8", AssertionError),
        ("_, [%0], 2048;", "_, [%0], 1024;", Deadlock),
        ('"fence.proxy.async.shared::cta;" ::: "memory");\n    __syncthreads',
         '"" ::: "memory");\n    __syncthreads', MissingFence),
        ('    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");\n    __syncthreads();\n',
         '    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");\n', Race),
        ("wait_group.read 0", "wait_group.read 1", Race),
        ("phase ^= 1", "phase ^= 0", (MissingWait, MissingFence)),
    ],
)  # fmt: skip
def test_bugs_of_tensor_copies(old, new, error, seed):
    assert hopper_kernels.TENSOR.count(old) == 1
    ptx = hopper_kernels.compiled(hopper_kernels.TENSOR.replace(old, new))
    with pytest.raises(error):
        negate(ptx, seed)


@needs_nvrtc
def test_a_map_with_another_swizzle_than_the_kernel():
    with pytest.raises(AssertionError):
        negate(hopper_kernels.compiled(hopper_kernels.TENSOR), None, swizzle=0)


SYNCHRONISES = re.compile(
    r"^\s*(@\S+\s+)?(mbarrier|fence|bar|cp\.async\.bulk\.(commit|wait)_group)\b"
)


def removals(ptx: str):
    """Texts with one synchronising instruction taken out; a wait becomes one that is over."""
    lines = ptx.splitlines()
    for number, line in enumerate(lines):
        if SYNCHRONISES.match(line):
            over = re.sub(r"mbarrier\S+\s+(\w+),.*", r"setp.eq.u32 \1, 0, 0;", line)
            instead = over if "try_wait" in line else ""
            yield line.split()[0], "\n".join([*lines[:number], instead, *lines[number + 1 :]])


@needs_nvrtc
@pytest.mark.parametrize(
    ("source", "run", "count", "unnoticed"),
    [
        # The barrier that follows the init publishes it as well; a warp's lanes run in step, and
        # the race detector knows warps, not lanes (an open limit).
        (hopper_kernels.PIPELINE, pipeline, 17,
         ["fence.mbarrier_init.release.cluster;", "bar.warp.sync"]),
        # The same; and of the last barrier of an iteration thread 0 alone would need to wait, who
        # has waited for its store already, while the others wait for the next tile.
        (hopper_kernels.TENSOR, negate, 10, ["fence.proxy.async.shared::cta;", "bar.sync"]),
    ],
)  # fmt: skip
def test_each_synchronisation_taken_out(source, run, count, unnoticed):
    left, tried = [], 0
    for name, ptx in removals(hopper_kernels.compiled(source)):
        tried += 1
        try:
            for seed in (None, 0):
                run(ptx, seed)
        except PtxError:
            continue
        left.append(name)
    assert (tried, left) == (count, unnoticed)


# Triton

triton = pytest.importorskip("triton", reason="needs triton: pip install 'triton>=3.4'")
# Decorating under the interpreter would make no compiled kernels.
_INTERPRET = os.environ.pop("TRITON_INTERPRET", None)
import triton.language as tl  # noqa: E402


@triton.jit
def double_kernel(x_ptr, y_ptr, total_ptr, M, N, BM: tl.constexpr, BN: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, shape=[M, N], strides=[N, 1], block_shape=[BM, BN])
    y = tl.make_tensor_descriptor(y_ptr, shape=[M, N], strides=[N, 1], block_shape=[BM, BN])
    total = tl.make_tensor_descriptor(total_ptr, shape=[M, N], strides=[N, 1], block_shape=[BM, BN])
    for j in range(0, N, BN):
        tile = x.load([tl.program_id(0) * BM, j])
        y.store([tl.program_id(0) * BM, j], tile * 2)
        total.atomic_add([tl.program_id(0) * BM, j], tile)


if _INTERPRET is not None:
    os.environ["TRITON_INTERPRET"] = _INTERPRET


@pytest.mark.parametrize(
    ("dtype", "BN", "seed"),
    [(torch.bfloat16, 64, None), (torch.bfloat16, 16, 0), (torch.float32, 16, 1)],
)
def test_tensor_descriptors_of_triton(dtype, BN, seed):
    M, N, BM = 80, 104, 32
    x = torch.randint(-9, 9, (M, N)).to(dtype)
    y, total = torch.empty_like(x), torch.ones_like(x)
    report = run_triton(
        double_kernel, (-(-M // BM),), x, y, total, M, N, BM=BM, BN=BN, arch=90,
        uninitialised=[y], seed=seed,
    )  # fmt: skip
    assert torch.equal(y, x * 2)
    assert torch.equal(total, x + 1)
    tiles = -(-M // BM) * -(-N // BN)
    assert report.total.bulk_load_bytes == tiles * BM * BN * x.element_size()
    assert report.total.bulk_store_bytes == 2 * report.total.bulk_load_bytes
    assert report.total.mbarrier_phases == tiles
    assert report.total.global_load_bytes == M * N * x.element_size()
    assert report.total.atomics == M * N
