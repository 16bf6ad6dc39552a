"""Kernels of Hopper's asynchronous copies for the tests: PTX by hand, CUDA C++ by NVRTC."""

from __future__ import annotations

import functools
import importlib.util

from ptx_text import HEADER, REGISTERS

from kimi_ops.testing.ptx import Kernel


def kernel(body: str, rank: int, tile: int) -> Kernel:
    """A kernel (map, in or out, coordinates) of one warp with a buffer and an mbarrier."""
    coords = [f".param .b32 c{i}" for i in range(5)]
    loads = "".join(f"ld.param.u32 %r{20 + i}, [c{i}];" for i in range(5))
    return Kernel(
        f"{HEADER}.visible .entry k(.param .align 64 .b8 m[128], .param .u64 p, "
        f"{', '.join(coords)})"
        f"{{.shared .align 1024 .b8 tile[{tile + 1024}]; .shared .align 8 .b64 bar; {REGISTERS}"
        f"mov.b64 %d1, m; cvta.param.u64 %d1, %d1; ld.param.u64 %d0, [p]; {loads}"
        "mov.u32 %r0, %tid.x; mov.u32 %r1, tile; mov.u32 %r2, bar; setp.eq.u32 %p1, %r0, 0;"
        f"{body.format(rank=rank, size=tile, coords=', '.join(f'%r{20 + i}' for i in range(rank)))}"
        "ret; }"
    )


COPY_OUT = """mov.u32 %r3, %r0;
O: shl.b32 %r4, %r3, 2; setp.ge.u32 %p3, %r4, {size}; @%p3 bra D; cvt.u64.u32 %d2, %r4;
add.u64 %d2, %d2, %d0; add.u32 %r4, %r4, %r1; ld.shared.b32 %r5, [%r4];
st.global.b32 [%d2], %r5; add.u32 %r3, %r3, 32; bra O; D:
"""


# A producer warp fills a ring of three stages of 1 KiB, two consumer warps add the tiles up, and a
# bulk copy takes the sums to global memory.
PIPELINE = r"""
#define STAGES 3
typedef unsigned long long u64;
__device__ unsigned at(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ void wait(u64* bar, unsigned parity) {
  asm volatile("{\n.reg .pred p;\nL:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
               "@!p bra L;\n}" :: "r"(at(bar)), "r"(parity) : "memory");
}
extern "C" __global__ void __launch_bounds__(96) k(const int* x, int* out, int tiles) {
  __shared__ __align__(128) int ring[STAGES][256];
  __shared__ __align__(128) int sums[64];
  __shared__ u64 full[STAGES], empty[STAGES];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(at(full + s)) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 2;" :: "r"(at(empty + s)) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (warp == 0) {
    if (lane == 0)
#pragma unroll 1
      for (int t = 0; t < tiles; t++) {
        int s = t % STAGES;
        wait(empty + s, (t / STAGES & 1) ^ 1);
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 1024;"
                     :: "r"(at(full + s)) : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                     "[%0], [%1], 1024, [%2];"
                     :: "r"(at(ring[s])), "l"(x + t * 256), "r"(at(full + s)) : "memory");
      }
    return;
  }
  int sum = 0;
#pragma unroll 1
  for (int t = 0; t < tiles; t++) {
    int s = t % STAGES;
    wait(full + s, t / STAGES & 1);
    for (int i = threadIdx.x - 32; i < 256; i += 64) sum += ring[s][i];
    __syncwarp();
    if (lane == 0)
      asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];"
                   :: "r"(at(empty + s)) : "memory");
  }
  sums[threadIdx.x - 32] = sum;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  asm volatile("bar.sync 1, 64;" ::: "memory");
  if (threadIdx.x == 32) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 256;"
                 :: "l"(out), "r"(at(sums)) : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  }
}
"""

# Tiles of 16 x 64 bf16 come by TMA with a 128-byte swizzle, threads undo it by hand to negate them,
# and go back by TMA through the same buffer.
TENSOR = r"""
typedef unsigned long long u64;
struct __align__(64) Map { u64 opaque[16]; };
__device__ unsigned at(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
extern "C" __global__ void __launch_bounds__(128)
k(const __grid_constant__ Map from, const __grid_constant__ Map to, int columns) {
  __shared__ __align__(1024) unsigned short tile[16][64];
  __shared__ u64 bar;
  int row = blockIdx.x * 16;
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(at(&bar)) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
#pragma unroll 1
  for (int c = 0, phase = 0; c < columns; c += 64, phase ^= 1) {
    if (threadIdx.x == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 2048;"
                   :: "r"(at(&bar)) : "memory");
      asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile"
                   ".mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                   :: "r"(at(tile)), "l"(&from), "r"(c), "r"(row), "r"(at(&bar)) : "memory");
    }
    asm volatile("{\n.reg .pred p;\nL:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@!p bra L;\n}" :: "r"(at(&bar)), "r"(phase) : "memory");
    int r = threadIdx.x / 8, chunk = threadIdx.x % 8 ^ r % 8;
    uint4* mine = (uint4*)&tile[r][8 * chunk];
    uint4 v = *mine;
    // The first chunk of a row stays as it is: a wrong swizzle negates another one.
    unsigned flip = threadIdx.x % 8 ? 0x80008000u : 0u;
    v.x ^= flip; v.y ^= flip; v.z ^= flip; v.w ^= flip;
    *mine = v;
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    if (threadIdx.x == 0) {
      asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group "
                   "[%0, {%1, %2}], [%3];" :: "l"(&to), "r"(c), "r"(row), "r"(at(tile)) : "memory");
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
      asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    }
    __syncthreads();
  }
}
"""


@functools.cache
def compiled(source: str) -> str:
    """PTX of a CUDA C++ text for sm_90a."""
    from cuda.bindings import nvrtc

    status, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], [])
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS
    options = [b"--gpu-architecture=compute_90a", b"-lineinfo"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytearray(size)  # not b" " * 1: all of Python shares that object, and this writes into it
    nvrtc.nvrtcGetProgramLog(program, log)
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    _, size = nvrtc.nvrtcGetPTXSize(program)
    text = bytearray(size)
    nvrtc.nvrtcGetPTX(program, text)
    return text.rstrip(b"\0 ").decode()


def available() -> bool:
    """Whether NVRTC can be imported."""
    return importlib.util.find_spec("cuda") is not None and (
        importlib.util.find_spec("cuda.bindings") is not None
    )
