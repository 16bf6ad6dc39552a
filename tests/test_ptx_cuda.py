"""CUDA C++ compiled to PTX by NVRTC, executed: calls, constants, local arrays, copies, mma."""

from __future__ import annotations

import glob
import importlib
import shutil
import struct
from unittest.mock import Mock

import pytest
import torch

from kimi_ops.cuda._launcher import SOURCES
from kimi_ops.testing import cuda_runner
from kimi_ops.testing.ptx import Checks, Kernel, MissingWait, PtxError, Race, Uninitialised

nvrtc = pytest.importorskip(
    "cuda.bindings.nvrtc",
    reason="needs NVRTC: pip install cuda-bindings nvidia-cuda-nvrtc nvidia-cuda-runtime "
    "nvidia-cuda-cccl, all of 13.0",
)

MIXED = r"""
#include <cuda_bf16.h>
__constant__ float table[4] = {1.f, 2.f, 3.f, 4.f};
struct Params { int n; float s; long long unused; };
__device__ __noinline__ float power(float x, int n) {
  float ring[8] = {x};
  for (int i = 1; i < n; i++) ring[i & 7] = ring[(i - 1) & 7] * x;
  return ring[(n - 1) & 7];
}
extern "C" __global__ void __launch_bounds__(128)
k(const float* __restrict__ x, float* y, Params p, __nv_bfloat16* z) {
  extern __shared__ float dynamic[];
  __shared__ int fixed[32];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (threadIdx.x < 32) fixed[threadIdx.x] = i;
  __syncthreads();
  if (i >= p.n) return;
  float v = x[i] * table[i & 3];
  dynamic[threadIdx.x] = v;
  v = power(v, 1 + (i & 3));
  switch (i % 7) {
    case 0: v += 1; break;
    case 1: v *= 2; break;
    case 2: v -= 3; break;
    case 3: v /= 3.f; break;
    case 4: v = sqrtf(v); break;
    case 5: v = expf(-v);
  }
  y[i] = v + fixed[i & 31] + dynamic[threadIdx.x] * p.s;
  z[i] = __float2bfloat16(v) * z[i] + z[i];
}
"""

REDUCE = r"""
extern "C" __global__ void k(const int* x, int* out, int n) {
  __shared__ int part[4];
  int sum = 0;
  for (int i = blockIdx.x * 128 + threadIdx.x; i < n; i += gridDim.x * 128) sum += x[i];
  for (int by = 16; by; by /= 2) sum += __shfl_down_sync(0xffffffffu, sum, by);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(out, part[0] + part[1] + part[2] + part[3]);
}
"""

# A 16 x 8 tile of D = A B by one warp, A [16, K] and B [K, 8] through a ring of two stages.
PIPELINE = r"""
__device__ void copy(void* to, const void* from) {
  unsigned at = (unsigned)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(at), "l"(from) : "memory");
}
extern "C" __global__ void k(const short* a, const short* bt, float* d, int K) {
  __shared__ __align__(16) short as[2][16][16], bs[2][8][16];
  int lane = threadIdx.x;
  float c[4] = {};
  auto load = [&](int s, int k) {
    copy(&as[s][lane / 2][8 * (lane % 2)], a + (lane / 2) * K + k + 8 * (lane % 2));
    if (lane < 16) copy(&bs[s][lane / 2][8 * (lane % 2)], bt + (lane / 2) * K + k + 8 * (lane % 2));
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  load(0, 0);
  for (int k = 0, s = 0; k < K; k += 16, s ^= 1) {
    if (k + 16 < K) load(s ^ 1, k + 16);
    else asm volatile("cp.async.commit_group;" ::: "memory");
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncwarp();
    unsigned r[4], q[2];
    unsigned pa = (unsigned)__cvta_generic_to_shared(&as[s][lane % 16][8 * (lane / 16)]);
    unsigned pb = (unsigned)__cvta_generic_to_shared(&bs[s][lane % 8][8 * (lane / 8 % 2)]);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(pa));
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
        : "=r"(q[0]), "=r"(q[1]) : "r"(pb));
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
        "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "r"(q[0]), "r"(q[1]));
    __syncwarp();
  }
  for (int i = 0; i < 4; i++) d[(lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2] = c[i];
}
"""


def compiled(source: str, arch: str) -> str:
    """PTX of CUDA C++, with line information."""
    namespace = importlib.import_module("nvidia")
    folders = [f for p in namespace.__path__ for f in glob.glob(f"{p}/**/include", recursive=True)]
    options = [f"-arch=compute_{arch}", "-lineinfo", "-std=c++17", *(f"-I{f}" for f in folders)]
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], [])
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytearray(size)  # not b" " * 1: all of Python shares that object, and this writes into it
    nvrtc.nvrtcGetProgramLog(program, log)
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    _, size = nvrtc.nvrtcGetPTXSize(program)
    text = bytearray(size)
    nvrtc.nvrtcGetPTX(program, text)
    return text.rstrip(b"\0 ").decode()


@pytest.mark.parametrize("arch", ["80", "86", "89", "90a", "120"])
@pytest.mark.parametrize("seed", [None, 0])
def test_calls_constants_and_local_arrays(arch, seed):
    n = 1000
    x, z = torch.rand(n) + 0.5, torch.randn(n).bfloat16()
    y, before = torch.empty(n), z.clone()
    Kernel(compiled(MIXED, arch)).launch(
        (8,), (128,), [x, y, struct.pack("<ifq", n, 0.5, 0), z],
        dynamic_shared_bytes=512, uninitialised=[y], seed=seed,
    )  # fmt: skip
    i = torch.arange(n)
    scaled = x.double() * torch.tensor([1.0, 2.0, 3.0, 4.0]).double()[i & 3]
    v = scaled ** (1 + (i & 3))
    ways = [v + 1, v * 2, v - 3, v / 3, v.sqrt(), (-v).exp(), v]
    v = torch.stack(ways)[i % 7, i]
    want = v + (i // 128 * 128 + (i & 31)) + scaled / 2
    # A handful of float32 roundings of terms up to the size of the sum.
    assert ((y - want).abs() <= 8 * 2**-23 * (want.abs() + v.abs() + 1)).all()
    rounded = v.float().bfloat16().double()
    exact = rounded * before.double() + before.double()
    assert (
        (z.double() - exact).abs() <= 2**-7 * (exact.abs() + before.double().abs() + 1e-3)
    ).all()


@pytest.mark.parametrize("seed", [None, 0])
def test_reduction_and_its_missing_barrier(seed):
    text = compiled(REDUCE, "80")
    x, out = torch.randint(-9, 9, (3000,), dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    Kernel(text).launch((6,), (128,), [x, out, 3000], seed=seed)
    assert out == x.sum()
    assert text.count("bar.sync") == 1
    with pytest.raises((Race, Uninitialised), match=r"kernel\.cu:\d+"):
        Kernel(text.replace("bar.sync", "// bar.sync")).launch(
            (6,), (128,), [x, out, 3000], seed=seed
        )


@pytest.mark.parametrize("arch", ["80", "90a", "120"])
def test_copies_and_matrix_instructions(arch):
    k = 80
    a, b = torch.randn(16, k).bfloat16(), torch.randn(8, k).bfloat16()
    d = torch.empty(16, 8)
    text = compiled(PIPELINE, arch)

    def launch(ptx: str) -> None:
        Kernel(ptx).launch((1,), (32,), [a, b, d, k], uninitialised=[d])

    launch(text)
    want = a.double() @ b.double().T
    # Exact products, float32 sums.
    assert ((d - want).abs() <= k * 2**-24 * (a.double().abs() @ b.double().abs().T)).all()
    for broken in (
        text.replace("cp.async.wait_group 1", "cp.async.wait_group 2"),
        text.replace("cp.async.wait_group 1", "// cp.async.wait_group 1"),
        text.replace("cp.async.commit_group;", "", 1),
    ):
        with pytest.raises(MissingWait):
            launch(broken)


def test_checks_can_be_left_out():
    """The racing version runs to its end when races are not looked for."""
    text = compiled(REDUCE, "80").replace("bar.sync", "// bar.sync")
    x, out = torch.ones(128, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    Kernel(text).launch((1,), (128,), [x, out, 128], checks=Checks(shared_races=False))
    assert out == 128


def test_a_failed_assertion_is_reported_at_its_line():
    source = """
extern "C" __global__ void k(const int* x, int n) {

  if (x[threadIdx.x] >= n) __assertfail("x < n", "kernel.cu", 4, "k", 1);
}
"""
    text = compiled(source, "80")
    Kernel(text).launch((1,), (32,), [torch.arange(32, dtype=torch.int32), 32])
    with pytest.raises(PtxError, match=r"trap executed\n  at k, kernel.cu:4, .* warp 0, lane 30"):
        Kernel(text).launch((1,), (32,), [torch.arange(32, dtype=torch.int32), 30])


def test_ptx_of_the_packages_sources_is_kept_between_processes(tmp_path, monkeypatch):
    compiler = Mock(side_effect=cuda_runner.compile_ptx)
    monkeypatch.setattr(cuda_runner, "compile_ptx", compiler)
    monkeypatch.setenv("KIMI_OPS_CACHE", str(tmp_path / "cache"))
    source, name = SOURCES / "moe_sort.cu", "moe_sort_kernel"

    def compiled(source):
        """As in a new process."""
        monkeypatch.setattr(cuda_runner, "_COMPILED", {})
        before = compiler.call_count
        cuda_runner.compile_kernel(source, name)
        return compiler.call_count - before

    assert compiled(source) == 1
    assert compiled(source) == 0
    (kept,) = (tmp_path / "cache").glob("*.ptx")
    kept.write_text(kept.read_text()[:-1])
    assert compiled(source) == 1  # a damaged file
    shutil.copytree(SOURCES, tmp_path / "cuda")
    assert compiled(tmp_path / "cuda" / source.name) == 1  # a source elsewhere
    assert compiled(tmp_path / "cuda" / source.name) == 1
