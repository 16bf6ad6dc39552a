"""Kernels whose CTAs wait for each other in loops: locks of Triton, a barrier of the whole grid.

Who waits must let who is waited for run, in whatever order the blocks of the code stand.
"""

from __future__ import annotations

import os

import pytest
import torch

from kimi_ops.testing.ptx import Race

triton = pytest.importorskip("triton", reason="needs triton: pip install 'triton>=3.4'")
_INTERPRET = os.environ.pop("TRITON_INTERPRET", None)
import triton.language as tl  # noqa: E402

from kimi_ops.testing.runner import run_cuda, run_triton  # noqa: E402


@triton.jit
def locked_sum_kernel(
    x_ptr, sum_ptr, lock_ptr, D: tl.constexpr, GROUPS: tl.constexpr, SAFE: tl.constexpr
):
    row = tl.program_id(0)
    offs = tl.arange(0, D)
    part = tl.load(x_ptr + row * D + offs)
    group = row % GROUPS
    while tl.atomic_cas(lock_ptr + group, 0, 1) == 1:
        pass
    at = sum_ptr + group * D + offs
    tl.store(at, tl.load(at) + part)
    if SAFE:
        tl.debug_barrier()  # the lock is given back by one warp, on behalf of all
    tl.atomic_xchg(lock_ptr + group, 0)


if _INTERPRET is not None:
    os.environ["TRITON_INTERPRET"] = _INTERPRET


def locked_sum(arch: int, seed: int | None, safe: bool = True) -> None:
    x = torch.randint(-9, 9, (7, 256)).float()
    total, lock = torch.zeros(2, 256), torch.zeros(2, dtype=torch.int32)
    run_triton(
        locked_sum_kernel, (7,), x, total, lock, D=256, GROUPS=2, SAFE=safe, arch=arch, seed=seed
    )
    assert torch.equal(total, torch.stack([x[0::2].sum(0), x[1::2].sum(0)]))


@pytest.mark.parametrize(("arch", "seed"), [(80, None), (80, 0), (80, 1), (90, 4), (120, None)])
def test_a_lock_around_a_sum(arch, seed):
    locked_sum(arch, seed)


def test_a_lock_given_back_too_early():
    with pytest.raises(Race, match=r"argument 1 .* not ordered after .* \(test_ptx_locks.py:\d+\)"):
        locked_sum(80, None, safe=False)


NORMALISE = r"""
__device__ void grid_barrier(unsigned* count, unsigned* phase) {
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned before = *(volatile unsigned*)phase;
#ifndef UNFENCED
    __threadfence();
#endif
    if (atomicAdd(count, 1) == gridDim.x - 1) {
      atomicExch(count, 0);
      __threadfence();
      atomicAdd(phase, 1);
    } else {
      while (*(volatile unsigned*)phase == before);
    }
    __threadfence();
  }
  __syncthreads();
}
extern "C" __global__ void normalise(const int* x, int* part, int* y, unsigned* state) {
  int i = blockIdx.x * 64 + threadIdx.x, total = 0;
  if (threadIdx.x == 0) {
    int sum = 0;
    for (int k = 0; k < 64; k++) sum += x[blockIdx.x * 64 + k];
    part[blockIdx.x] = sum;
  }
  grid_barrier(state, state + 1);
  for (int k = 0; k < gridDim.x; k++) total += part[k];
  y[i] = x[i] - total;
  grid_barrier(state, state + 1);
  if (threadIdx.x == 0) part[blockIdx.x] = 0;
}
"""


def normalise(seed: int | None, **defines: int) -> None:
    x = torch.randint(-9, 9, (6 * 64,), dtype=torch.int32)
    part, y = torch.empty(6, dtype=torch.int32), torch.empty_like(x)
    run_cuda(
        NORMALISE, "normalise", (6,), (64,), [x, part, y, torch.zeros(2, dtype=torch.int32)],
        cooperative=True, uninitialised=[part, y], seed=seed, defines=defines,
    )  # fmt: skip
    assert torch.equal(y, x - x.sum(dtype=torch.int32))


@pytest.mark.parametrize("seed", [None, 1, 4])
def test_a_barrier_of_the_whole_grid(seed):
    normalise(seed)


def test_a_barrier_of_the_whole_grid_without_its_fence():
    with pytest.raises(Race, match="read, not ordered after a write by CTA number"):
        normalise(None, UNFENCED=1)
