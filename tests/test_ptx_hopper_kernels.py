"""Whole sm_90 kernels executed: CUDA C++, Triton and Gluon with wgmma, TMA and mbarriers."""

from __future__ import annotations

import os
import re

import pytest
import torch
from test_ptx_cuda import compiled

from kimi_ops.testing.ptx import (
    Deadlock,
    Divergence,
    Kernel,
    LaunchError,
    MissingFence,
    MissingWait,
    PtxError,
    Race,
    Report,
    TensorMap,
    Uninitialised,
    UnsupportedPtx,
)

triton = pytest.importorskip("triton", reason="needs triton: pip install 'triton>=3.4'")
from test_ptx_triton import attention_kernel, matmul_kernel, nth  # noqa: E402

# Decorating under the interpreter would make no compiled kernels.
_INTERPRET = os.environ.pop("TRITON_INTERPRET", None)
import triton.language as tl  # noqa: E402
from triton.experimental import gluon  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2  # noqa: E402
from triton.experimental.gluon.language.nvidia.hopper import (  # noqa: E402
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kimi_ops.testing.runner import compile_triton, run_triton  # noqa: E402

SEEDS = [None, 0]

# D = A B^T by tiles of 128 x 64: a warpgroup whose first warp copies tiles of 64 columns by TMA
# through a ring of three stages, and two warpgroups that multiply 64 rows each, with one product in
# flight while they wait for the next tile.
GEMM = r"""
struct alignas(64) Map { unsigned long long opaque[16]; };
constexpr int STAGES = 3, BM = 128, BN = 64, BK = 64;
typedef unsigned long long u64;
__device__ unsigned at(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ void init(u64* bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(at(bar)), "r"(count) : "memory");
}
__device__ void wait(u64* bar, int parity) {
  asm volatile("{ .reg .pred p; L: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;"
               "@p bra D; bra L; D: }" :: "r"(at(bar)), "r"(parity) : "memory");
}
__device__ void arrive(u64* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(at(bar)) : "memory");
}
__device__ void expect(u64* bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :: "r"(at(bar)), "r"(bytes) : "memory");
}
__device__ void copy(void* to, const Map* map, int column, int row, u64* bar) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%2, %3}], [%4];"
               :: "r"(at(to)), "l"(map), "r"(column), "r"(row), "r"(at(bar)) : "memory");
}
__device__ u64 descriptor(const void* p) {
  return (at(p) >> 4) | 1ull << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}
#define R4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define R16(i) R4(i), R4(i + 4), R4(i + 8), R4(i + 12)
__device__ void multiply(float (&c)[32], u64 a, u64 b) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, 1, 0;"
    "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
    "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0; }"
    : R16(0), R16(16) : "l"(a), "l"(b));
}
#define SYNC(text) asm volatile(text ::: "memory")

extern "C" __global__ void __launch_bounds__(384, 1)
k(const __grid_constant__ Map a_map, const __grid_constant__ Map b_map, float* d, int N, int K) {
  extern __shared__ __align__(1024) char memory[];
  __shared__ u64 full[STAGES], empty[STAGES];
  char* as = memory;
  char* bs = memory + STAGES * BM * BK * 2;
  int group = threadIdx.x / 128, thread = threadIdx.x % 128;
  int row0 = blockIdx.y * BM, column0 = blockIdx.x * BN, steps = (K + BK - 1) / BK;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) { init(&full[s], 1); init(&empty[s], 2); }
    SYNC("fence.mbarrier_init.release.cluster;");
    SYNC("fence.proxy.async.shared::cta;");
  }
  __syncthreads();
  if (group == 0) {
    SYNC("setmaxnreg.dec.sync.aligned.u32 40;");
    if (thread == 0)
      for (int i = 0; i < steps; i++) {
        int s = i % STAGES;
        if (i >= STAGES) wait(&empty[s], (i / STAGES - 1) & 1);
        expect(&full[s], (BM + BN) * BK * 2);
        copy(as + s * BM * BK * 2, &a_map, i * BK, row0, &full[s]);
        copy(bs + s * BN * BK * 2, &b_map, i * BK, column0, &full[s]);
      }
    return;
  }
  SYNC("setmaxnreg.inc.sync.aligned.u32 232;");
  float c[32] = {};
  for (int i = 0; i < steps; i++) {
    int s = i % STAGES;
    wait(&full[s], i / STAGES & 1);
    u64 a = descriptor(as + s * BM * BK * 2 + (group - 1) * 64 * BK * 2);
    u64 b = descriptor(bs + s * BN * BK * 2);
    SYNC("wgmma.fence.sync.aligned;");
    for (int k = 0; k < BK / 16; k++) multiply(c, a + 2 * k, b + 2 * k);
    SYNC("wgmma.commit_group.sync.aligned;");
    SYNC("wgmma.wait_group.sync.aligned 1;");
    if (i > 0 && thread == 0) arrive(&empty[(i - 1) % STAGES]);
  }
  SYNC("wgmma.wait_group.sync.aligned 0;");
  int row = row0 + (group - 1) * 64 + thread / 32 * 16 + thread % 32 / 4;
  for (int j = 0; j < 32; j++)
    d[(row + j / 2 % 2 * 8) * N + column0 + j / 4 * 8 + thread % 4 * 2 + j % 2] = c[j];
}
"""


def gemm(
    source: str = GEMM, seed: int | None = None, *, ptx: str = "", swizzle: int = 128
) -> Report:
    m, n, k = 128, 128, 296
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, k, generator=generator).bfloat16() for rows in (m, n))
    d = torch.empty(m, n)
    maps = [TensorMap(a, (128, 64), swizzle), TensorMap(b, (64, 64), swizzle)]
    report = Kernel(ptx or compiled(source, "90a")).launch(
        (n // 64, m // 128), (384,), [*maps, d, n, k],
        dynamic_shared_bytes=3 * 192 * 64 * 2, uninitialised=[d], seed=seed, step_limit=20_000,
    )  # fmt: skip
    want = a.double() @ b.double().T
    # Exact products, float32 sums.
    assert ((d - want).abs() <= k * 2**-24 * (a.double().abs() @ b.double().abs().T)).all()
    return report


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_cuda_pipeline(seed):
    report = gemm(seed=seed)
    assert report.total.multiply_adds == 128 * 128 * 320
    assert report.total.opcodes["wgmma.mma_async.sync.aligned.m64n64k16"] == 2 * 2 * 5 * 4 * 4
    # Per CTA and step, both warpgroups read their 64 rows of A and all of B.
    assert report.total.matrix_shared_bytes == 2 * 5 * 2 * (64 + 64) * 64 * 2


WRONG = "wrong numbers"
# What is planted -> (old, new, error, message); WRONG where only the result can show it.
GEMM_BUGS = {
    "no wgmma.fence": (
        'SYNC("wgmma.fence.sync.aligned;");', "", MissingFence, "no wgmma.fence before the first",
    ),
    "accumulator changed in flight": (
        'SYNC("wgmma.commit_group.sync.aligned;");',
        'SYNC("wgmma.commit_group.sync.aligned;");'
        'asm volatile("mul.f32 %0, %0, 0f3FC00000;" : "+f"(c[3]));',
        MissingWait, r"is changed while the wgmma issued at PTX line \d+",
    ),
    "accumulator changed behind the fence": (
        'SYNC("wgmma.fence.sync.aligned;");',
        'SYNC("wgmma.fence.sync.aligned;"); asm volatile("mov.b32 %0, 0;" : "=f"(c[3]));',
        MissingFence, r"accessed at PTX line \d+ .*, is used without a wgmma\.fence",
    ),
    "no commit": (
        'SYNC("wgmma.commit_group.sync.aligned;");', "", Race,
        r"write, while the asynchronous read issued at PTX line \d+ .* \(wgmma\.mma_async",
    ),
    "last wait leaves one": (
        'SYNC("wgmma.wait_group.sync.aligned 0;");', 'SYNC("wgmma.wait_group.sync.aligned 1;");',
        MissingWait, r"register %\w+ is read while the wgmma",
    ),
    "no last wait": (
        'SYNC("wgmma.wait_group.sync.aligned 0;");', "", MissingWait, "is read while the wgmma",
    ),
    "wait in the loop leaves two": (
        'SYNC("wgmma.wait_group.sync.aligned 1;");', 'SYNC("wgmma.wait_group.sync.aligned 2;");',
        Race, r"write, (while|not ordered after) the .*read",
    ),
    "no wait in the loop": (
        'SYNC("wgmma.wait_group.sync.aligned 1;");', "", Race,
        r"write, (while|not ordered after) the .*read",
    ),
    "stage released while it is read": (
        "if (i > 0 && thread == 0) arrive(&empty[(i - 1) % STAGES]);",
        "if (thread == 0) arrive(&empty[s]);",
        Race, r"write, (while|not ordered after) the .*read",
    ),
    "one warpgroup releases for both": (
        "init(&empty[s], 2); }|i > 0 && thread == 0",
        "init(&empty[s], 1); }|i > 0 && threadIdx.x == 128",
        Race, "write, (while|not ordered after) the .*read",
    ),
    "stage refilled without a wait": (
        "if (i >= STAGES) wait(&empty[s], (i / STAGES - 1) & 1);", "", PtxError,
        "1 arrivals at once",
    ),
    "one release too few": (
        "init(&empty[s], 2)", "init(&empty[s], 3)", Deadlock, "still expects 1 of 3 arrivals",
    ),
    "parity of full": ("i / STAGES & 1)", "~(i / STAGES) & 1)", Uninitialised, "never written"),
    "parity of empty": ("(i / STAGES - 1) & 1", "i / STAGES & 1", PtxError, "1 arrivals at once"),
    "full not waited for": (
        "wait(&full[s], i / STAGES & 1);", "", Uninitialised, "never written",
    ),
    "full waited for by one warp": (
        "wait(&full[s], i / STAGES & 1);", "if (thread < 32) wait(&full[s], i / STAGES & 1);",
        MissingWait, "used while an asynchronous copy into it, issued at",
    ),
    "fewer bytes expected": (
        "expect(&full[s], (BM + BN) * BK * 2)", "expect(&full[s], BM * BK * 2)", MissingWait,
        "used while an asynchronous copy",
    ),
    "more bytes expected": (
        "expect(&full[s], (BM + BN) * BK * 2)", "expect(&full[s], 4096 + (BM + BN) * BK * 2)",
        Deadlock, "still expects 0 of 1 arrivals and 4096 bytes",
    ),
    "barriers not initialised for the others": (
        "  __syncthreads();\n  if (group == 0)", "  if (group == 0)", PtxError, "mbarrier",
    ),
    "inc without dec": (
        'SYNC("setmaxnreg.dec.sync.aligned.u32 40;");', "", Deadlock,
        r"inc to 232 registers waits .* hold \[168, 168, 168\] a thread, the pool has 0",
    ),
    "inc to more than there are": (
        "u32 232", "u32 240", Deadlock, "inc to 240 registers waits .* the pool has 56",
    ),
    "dec to more": ("u32 40", "u32 200", PtxError, r"setmaxnreg\.dec to 200 registers by a .* 168"),
    "dec by some warps": (
        'SYNC("setmaxnreg.dec', 'if (thread >= 32) SYNC("setmaxnreg.dec', (Divergence, Deadlock),
        "exits without executing|only warps",
    ),
    "again without a barrier": (
        'SYNC("setmaxnreg.dec.sync.aligned.u32 40;");',
        'SYNC("setmaxnreg.dec.sync.aligned.u32 48;"); SYNC("setmaxnreg.dec.sync.aligned.u32 40;");',
        Race, "not ordered after the last one",
    ),
    "registers unknown": (
        "__launch_bounds__(384, 1)", "__launch_bounds__(384)", LaunchError, "ptxas ignores",
    ),
    "registers not in eights": ("u32 40", "u32 44", UnsupportedPtx, "44 registers"),
    "swizzle of the descriptor": ("1ull << 62", "2ull << 62", WRONG, ""),
    "stride of the descriptor": ("(1024 >> 4)", "(512 >> 4)", WRONG, ""),
    "step along K": ("a + 2 * k", "a + k", WRONG, ""),
    "rows of the second warpgroup": ("(group - 1) * 64 * BK", "(group - 1) * 32 * BK", WRONG, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", GEMM_BUGS)
def test_bugs_planted_in_the_cuda_pipeline(name):
    old, new, error, message = GEMM_BUGS[name]
    broken = GEMM
    for one, other in zip(old.split("|"), new.split("|"), strict=True):
        assert one in broken
        broken = broken.replace(one, other)
    if error == WRONG:
        with pytest.raises(AssertionError):
            gemm(broken)
    else:
        with pytest.raises(error, match=message):
            gemm(broken)


def test_tiles_copied_without_the_swizzle_are_wrong():
    with pytest.raises(LaunchError):
        gemm(swizzle=32)
    with pytest.raises(AssertionError):
        gemm(swizzle=0)


# What Triton and Gluon emit for sm_90


@triton.jit
def transposed_matmul_kernel(
    a_ptr, b_ptr, c_ptr, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    rm, rn, rk = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    kind: tl.constexpr = tl.int32 if a_ptr.dtype.element_ty == tl.int8 else tl.float32
    acc = tl.zeros((BM, BN), kind)
    for k in range(0, K, BK):
        a = tl.load(a_ptr + rm[:, None] * K + (rk + k)[None, :])
        b = tl.load(b_ptr + rn[:, None] * K + (rk + k)[None, :])
        acc = tl.dot(a, tl.trans(b), acc, out_dtype=kind)
    tl.store(c_ptr + rm[:, None] * BN + rn[None, :], acc)


@triton.jit
def tma_matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPECIALISED: tl.constexpr,
):  # fmt: skip
    a_map = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [BM, BK])
    b_map = tl.make_tensor_descriptor(b_ptr, [K, N], [N, 1], [BK, BN])
    c_map = tl.make_tensor_descriptor(c_ptr, [M, N], [N, 1], [BM, BN])
    across = tl.cdiv(N, BN)
    for tile in range(tl.program_id(0), tl.cdiv(M, BM) * across, tl.num_programs(0)):
        row, column = tile // across * BM, tile % across * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, K, BK, warp_specialize=SPECIALISED):
            acc = tl.dot(a_map.load([row, k]), b_map.load([k, column]), acc)
        c_map.store([row, column], acc)


@triton.jit
def tma_attention_kernel(q_ptr, k_ptr, v_ptr, out_ptr, scale, n, B: tl.constexpr, D: tl.constexpr):
    q_map = tl.make_tensor_descriptor(q_ptr, [n, D], [D, 1], [B, D])
    k_map = tl.make_tensor_descriptor(k_ptr, [n, D], [D, 1], [B, D])
    v_map = tl.make_tensor_descriptor(v_ptr, [n, D], [D, 1], [B, D])
    out_map = tl.make_tensor_descriptor(out_ptr, [n, D], [D, 1], [B, D])
    first = tl.program_id(0) * B
    q = q_map.load([first, 0])
    rows = first + tl.arange(0, B)
    top = tl.full((B,), float("-inf"), tl.float32)
    total = tl.zeros((B,), tl.float32)
    acc = tl.zeros((B, D), tl.float32)
    for start in range(0, first + B, B):
        keys = start + tl.arange(0, B)
        s = tl.dot(q, k_map.load([start, 0]).T) * scale
        s = tl.where((keys < n)[None, :] & (keys[None, :] <= rows[:, None]), s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        fix = tl.exp2(top - new)
        total = total * fix + tl.sum(p, 1)
        v = v_map.load([start, 0])
        acc = tl.dot(p.to(v.dtype), v, acc * fix[:, None])
        top = new
    out_map.store([first, 0], acc / total[:, None])


@gluon.jit
def gluon_matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    a_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], gl.bfloat16)
    b_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, BN], gl.bfloat16)
    a_map = tma.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [BM, BK], a_layout)
    b_map = tma.make_tensor_descriptor(b_ptr, [K, N], [N, 1], [BK, BN], b_layout)
    a_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, BK], a_layout)
    b_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BK, BN], b_layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(bars.index(stage), count=1)
    fence_async_shared()
    row, column, steps = gl.program_id(0) * BM, gl.program_id(1) * BN, gl.cdiv(K, BK)
    for stage in gl.static_range(STAGES - 1):
        k, first, want = stage * BK, bars.index(stage), stage < steps
        mbarrier.expect(first, a_map.nbytes_per_cta + b_map.nbytes_per_cta, want)
        tma.async_copy_global_to_shared(a_map, [row, k], first, a_smem.index(stage), want)
        tma.async_copy_global_to_shared(b_map, [k, column], first, b_smem.index(stage), want)
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, BN, 16]
    )
    acc = gl.zeros((BM, BN), gl.float32, layout)
    for i in range(steps):
        s = i % STAGES
        mbarrier.wait(bars.index(s), (i // STAGES) & 1)
        acc = warpgroup_mma(a_smem.index(s), b_smem.index(s), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        j = i + STAGES - 1
        bar, here, free = bars.index(j % STAGES), j < steps, j % STAGES
        mbarrier.expect(bar, a_map.nbytes_per_cta + b_map.nbytes_per_cta, here)
        tma.async_copy_global_to_shared(a_map, [row, j * BK], bar, a_smem.index(free), here)
        tma.async_copy_global_to_shared(b_map, [j * BK, column], bar, b_smem.index(free), here)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(bars.index(stage))
    rm = row + gl.arange(0, BM, gl.SliceLayout(1, layout))
    rn = column + gl.arange(0, BN, gl.SliceLayout(0, layout))
    gl.store(c_ptr + rm[:, None] * N + rn[None, :], acc)


@gluon.jit
def gluon_ampere_kernel(
    a_ptr, b_ptr, c_ptr, N, K, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr
):
    loads: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [gl.num_warps(), 1], [1, 0])
    smem: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, 8]
    )
    a_smem = gl.allocate_shared_memory(gl.bfloat16, [2, BM, BK], smem)
    b_smem = gl.allocate_shared_memory(gl.bfloat16, [2, BK, BN], smem)
    am = gl.arange(0, BM, gl.SliceLayout(1, loads))[:, None] * K
    ak = gl.arange(0, BK, gl.SliceLayout(0, loads))[None, :]
    bk = gl.arange(0, BK, gl.SliceLayout(1, loads))[:, None] * N
    bn = gl.arange(0, BN, gl.SliceLayout(0, loads))[None, :]
    async_copy.async_copy_global_to_shared(a_smem.index(0), a_ptr + am + ak)
    async_copy.async_copy_global_to_shared(b_smem.index(0), b_ptr + bk + bn)
    async_copy.commit_group()
    acc = gl.zeros((BM, BN), gl.float32, layout)
    for k in range(0, K, BK):
        s = k // BK % 2
        more = k + BK < K
        next_a = a_ptr + am + ak + (k + BK)
        next_b = b_ptr + bk + bn + (k + BK) * N
        async_copy.async_copy_global_to_shared(a_smem.index(1 - s), next_a, mask=more)
        async_copy.async_copy_global_to_shared(b_smem.index(1 - s), next_b, mask=more)
        async_copy.commit_group()
        async_copy.wait_group(1)
        a = a_smem.index(s).load(gl.DotOperandLayout(0, layout, 2))
        b = b_smem.index(s).load(gl.DotOperandLayout(1, layout, 2))
        acc = mma_v2(a, b, acc)
    async_copy.wait_group(0)
    rm = gl.arange(0, BM, gl.SliceLayout(1, layout))
    rn = gl.arange(0, BN, gl.SliceLayout(0, layout))
    gl.store(c_ptr + rm[:, None] * N + rn[None, :], acc)


if _INTERPRET is not None:
    os.environ["TRITON_INTERPRET"] = _INTERPRET


def require_close(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, unit: float = 2**-24) -> None:
    """c [M, N] is a b, of exact products summed in float32, K roundings of ``unit`` at most."""
    a, b = a.double(), b.double()
    assert ((c - a @ b).abs() <= a.shape[1] * unit * (a.abs() @ b.abs()) + 1e-6).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("dtype", "m", "n", "k", "tile", "warps", "stages"),
    [
        (torch.bfloat16, 64, 64, 96, (64, 64, 32), 4, 3),
        (torch.bfloat16, 130, 150, 72, (128, 128, 64), 8, 2),
        (torch.float16, 128, 256, 64, (64, 256, 32), 4, 4),
        (torch.float32, 64, 64, 64, (64, 64, 32), 4, 3),
    ],
)
def test_triton_matmul(dtype, m, n, k, tile, warps, stages, seed):
    a, b, c = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), torch.empty(m, n)
    grid = (-(-m // tile[0]), -(-n // tile[1]))
    report = run_triton(
        matmul_kernel, grid, a, b, c, m, n, k, *tile, num_warps=warps, num_stages=stages,
        uninitialised=[c], seed=seed, arch=90,
    )  # fmt: skip
    # TF32 leaves out 13 bits of each operand.
    require_close(c, a, b, 2**-9 / k if dtype == torch.float32 else 2**-24)
    work = grid[0] * grid[1] * tile[0] * tile[1] * -(-k // tile[2]) * tile[2]
    assert report.total.multiply_adds == work
    assert {kind.split()[0] for kind in report.total.tensor} == {"wgmma"}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_triton_matmul_of_bytes(dtype):
    a, b = (torch.randint(-8, 9, (64, 128)).to(dtype) for _ in range(2))
    c = torch.empty(64, 64, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    report = run_triton(
        transposed_matmul_kernel, (1,), a, b, c, 128, 64, 64, 64, uninitialised=[c], arch=90
    )
    assert torch.equal(c.double(), a.double() @ b.double().T)
    assert next(iter(report.total.tensor)).startswith("wgmma ")


def attended(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention in float64, and the same of |v|."""
    q, k, v = q.double(), k.double(), v.double()
    s = q @ k.T * q.shape[1] ** -0.5
    p = s.masked_fill(~torch.ones(s.shape, dtype=torch.bool).tril(), -torch.inf).softmax(1)
    return p @ v, p @ v.abs()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kernel", [attention_kernel, tma_attention_kernel])
def test_triton_attention(kernel, seed):
    """The second product has its A in registers."""
    n, d = 100, 64
    q, k, v = (torch.randn(n, d).bfloat16() for _ in range(3))
    out = torch.empty(n, d)
    report = run_triton(
        kernel, (2,), q, k, v, out, d**-0.5 * 1.4426950408889634, n, B=64, D=d,
        uninitialised=[out], seed=seed, arch=90,
    )  # fmt: skip
    want, bound = attended(q, k, v)
    # Probabilities are rounded to bf16 before the second product: at most 2^-8 of each.
    assert ((out - want).abs() <= 2**-8 * bound + 1e-3).all()
    assert report.total.multiply_adds > 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("specialised", [False, True])
def test_triton_matmul_by_tma(specialised, seed):
    m, n, k = 160, 128, 120
    a, b, c = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16(), torch.empty(m, n)
    report = run_triton(
        tma_matmul_kernel, (2,), a, b, c, m, n, k, 64, 64, 32, specialised,
        uninitialised=[c], seed=seed, arch=90,
    )  # fmt: skip
    require_close(c, a, b)
    assert report.total.bulk_load_bytes > 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("warps", "rows"), [(4, 64), (8, 128)])
def test_gluon_matmul(warps, rows, seed):
    m, n, k = 128, 128, 224
    a, b, c = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16(), torch.empty(m, n)
    run_triton(
        gluon_matmul_kernel, (m // rows, 2), a, b, c, m, n, k, rows, 64, 32, 3,
        num_warps=warps, uninitialised=[c], seed=seed, arch=90,
    )  # fmt: skip
    require_close(c, a, b)


@pytest.mark.parametrize("seed", SEEDS)
def test_gluon_matmul_for_ampere(seed):
    a, b, c = torch.randn(64, 96).bfloat16(), torch.randn(96, 64).bfloat16(), torch.empty(64, 64)
    report = run_triton(
        gluon_ampere_kernel, (1,), a, b, c, 64, 96, 64, 64, 32,
        num_warps=4, uninitialised=[c], seed=seed, arch=80,
    )  # fmt: skip
    require_close(c, a, b)
    assert report.total.async_copy_bytes == 3 * 2 * 64 * 32 * 2


# Every synchronisation instruction of what Triton emits, removed in turn

SYNCHRONISATION = {
    "bar": r"bar\.sync[ \t]+0;",
    "copy commit": r"cp\.async\.commit_group;",
    "copy wait": r"cp\.async\.wait_group[ \t]+\d;",
    "proxy fence": r"fence\.proxy\.async\S*;",
    "fence": r"wgmma\.fence\S*;",
    "commit": r"wgmma\.commit_group\S*;",
    "wait": r"wgmma\.wait_group\S*[ \t]+\d;",
}


def unnoticed(ptx: str, launch) -> tuple[set[tuple[str, int]], set[str]]:
    """(removals after which the kernel is right and nothing is reported, kinds of reports)."""
    silent, reports = set(), set()
    for name, pattern in SYNCHRONISATION.items():
        for number in range(len(re.findall(pattern, ptx))):
            try:
                launch(nth(ptx, pattern, number, ""))
                silent.add((name, number))
            except (Race, MissingWait, MissingFence) as report:
                reports.add(type(report).__name__)
    return silent, reports


def test_every_removal_of_synchronisation_from_tritons_matmul_is_noticed():
    """Four of eighteen are not, and the kernel is right without them.

    The first barrier: nothing has been read yet that the copies behind it overwrite. The third,
    before a stage is refilled, and the fourth, before results are stored over the stages: only
    wgmma has read the stages, and every warp of the warpgroup has waited for it; what the last
    copies left is overwritten by the warps that copied it. The first commit: its copies join the
    next group, for which the first wait waits as well.
    """
    a, b, c = torch.randn(64, 160).bfloat16(), torch.randn(160, 64).bfloat16(), torch.empty(64, 64)
    names = ("a_ptr", "b_ptr", "c_ptr", "M", "N", "K", "BM", "BN", "BK")
    arguments = dict(zip(names, (a, b, c, 64, 64, 160, 64, 64, 32), strict=True))
    kernel = compile_triton(matmul_kernel, arguments, num_warps=4, num_stages=3, arch=90)

    def launch(ptx: str) -> None:
        Kernel(ptx).launch(
            (1, 1), (128,), [a, b, c, 64, 64, 160, 0, 0],
            dynamic_shared_bytes=kernel.shared_bytes, uninitialised=[c],
        )  # fmt: skip
        require_close(c, a, b)

    launch(kernel.ptx)
    silent, reports = unnoticed(kernel.ptx, launch)
    assert silent == {("bar", 0), ("bar", 2), ("bar", 3), ("copy commit", 0)}
    assert reports == {"Race", "MissingWait", "MissingFence"}


def test_every_removal_of_wgmma_synchronisation_from_attention_is_noticed():
    n, d = 128, 64
    q, k, v = (torch.randn(n, d).bfloat16() for _ in range(3))
    out, scale = torch.empty(n, d), d**-0.5 * 1.4426950408889634
    names = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "scale", "n", "B", "D")
    arguments = dict(zip(names, (q, k, v, out, scale, n, 64, 64), strict=True))
    kernel = compile_triton(attention_kernel, arguments, num_warps=4, arch=90)

    def launch(ptx: str) -> None:
        Kernel(ptx).launch(
            (2,), (128,), [q, k, v, out, scale, n, 0, 0],
            dynamic_shared_bytes=kernel.shared_bytes, uninitialised=[out],
        )  # fmt: skip
        want, bound = attended(q, k, v)
        assert ((out - want).abs() <= 2**-8 * bound + 1e-3).all()

    launch(kernel.ptx)
    wgmma = r"wgmma\.(?:fence|commit_group|wait_group)\S*[ \t]*\d?;"
    found = re.findall(wgmma, kernel.ptx)
    assert len(found) == 6
    for number in range(len(found)):
        with pytest.raises((MissingWait, MissingFence, Race)):
            launch(nth(kernel.ptx, wgmma, number, ""))
    # The probabilities, A of the second product, changed after its fence or in flight.
    second = r"(wgmma\.mma_async\S+ \{[^}]*\}, \{)(%r\d+)"
    changed = nth(kernel.ptx, second, 0, r"mov.b32 \2, 0; \1\2")
    with pytest.raises(MissingFence, match=r"used without a wgmma\.fence"):
        launch(changed)
    register = re.search(second, kernel.ptx)[2]
    commits = r"wgmma\.commit_group\S*;"
    with pytest.raises(MissingWait, match=f"register {register} is written while the wgmma"):
        launch(
            nth(kernel.ptx, commits, 1, f"wgmma.commit_group.sync.aligned; mov.b32 {register}, 0;")
        )
