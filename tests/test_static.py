"""The static report: what is counted is what is there, and every gate fires when it should."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
from functools import lru_cache

import pytest
import torch
import triton
import triton.language as tl

from kimi_ops.testing.devices import ARCHES, DEVICES, device
from kimi_ops.testing.static import (
    CudaCase,
    CudaCompileError,
    DisassemblyError,
    MissingToolError,
    StaticCase,
    ToolError,
    TritonCompileError,
    amdgcn,
    assert_avoids,
    assert_no_local_memory,
    assert_no_notes,
    assert_no_spills,
    assert_occupancy,
    assert_registers_at_most,
    assert_shared_memory_fits,
    assert_uses,
    assert_wide_loads,
    command,
    compile_cuda,
    compile_ptx,
    compile_triton,
    cuda_source,
    occupancy,
    report_cuda,
    report_triton,
    signature_of,
    static_cases_of,
    toolchain,
    triton_kernel,
)
from kimi_ops.testing.static import cases as cases_module
from kimi_ops.testing.static.amdgcn import report_amdgcn
from kimi_ops.testing.static.disassembly import read_sass
from kimi_ops.testing.static.instructions import count
from kimi_ops.testing.static.loops import find_loops
from kimi_ops.testing.static.opcodes import access, classify
from kimi_ops.testing.static.report import report_cubin
from kimi_ops.testing.static.toolchain import read_ptxas_log, run_tool

CUDA_ARCHES = tuple(a for a in ARCHES if a != "gfx942")


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    offs_m = tl.program_id(0) * BM + tl.arange(0, BM)
    offs_n = tl.program_id(1) * BN + tl.arange(0, BN)
    offs_k = tl.arange(0, BK)
    mask_m = offs_m[:, None] < m
    mask_n = offs_n[None, :] < n
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, k, BK):
        a = tl.load(a_ptr + offs_m[:, None] * k + (start + offs_k)[None, :], mask=mask_m, other=0.0)
        b = tl.load(b_ptr + (start + offs_k)[:, None] * n + offs_n[None, :], mask=mask_n, other=0.0)
        acc = tl.dot(a, b, acc)
    offs = offs_m[:, None] * n + offs_n[None, :]
    tl.store(c_ptr + offs, acc.to(tl.bfloat16), mask=mask_m & mask_n)


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, stride, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs * stride, mask=mask)
    y = tl.load(y_ptr + offs * stride, mask=mask)
    tl.store(out_ptr + offs, x + y, mask=mask)


@triton.jit
def sum_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        acc += tl.load(x_ptr + row * n + start + offs, mask=start + offs < n, other=0.0)
    tl.store(out_ptr + row, tl.sum(acc))


POINTERS = {"a_ptr": "*bf16:16", "b_ptr": "*bf16:16", "c_ptr": "*bf16:16"}
MATMUL = StaticCase(
    "matmul",
    matmul_kernel,
    {**POINTERS, "m": "i32:16", "n": "i32:16", "k": "i32:16"},
    {"BM": 128, "BN": 128, "BK": 64},
    num_warps=8,
)
ADD = StaticCase(
    "add",
    add_kernel,
    {"x_ptr": "*fp32:16", "y_ptr": "*fp32:16", "out_ptr": "*fp32:16", "n": "i32:16"}
    | {"stride": "i32:1"},
    {"BLOCK": 1024},
)
SUM = StaticCase(
    "sum", sum_kernel, {"x_ptr": "*fp32:16", "out_ptr": "*fp32:16", "n": "i32:16"}, {"BLOCK": 1024}
)

CUDA_SOURCE = r"""
#include <cuda_pipeline.h>
#define THREAD (blockIdx.x * blockDim.x + threadIdx.x)

extern "C" __global__ void add(const float4* a, const float4* b, float4* c, int n) {
  int i = THREAD;
  if (i < n) {
    float4 x = a[i], y = b[i];
    c[i] = make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
  }
}

extern "C" __global__ void __launch_bounds__(256) shared_memory(const float* a, float* c) {
  __shared__ float tile[4096];
  extern __shared__ float rest[];
  tile[threadIdx.x] = a[threadIdx.x];
  rest[threadIdx.x] = a[threadIdx.x + 256];
  __syncthreads();
  c[threadIdx.x] = tile[255 - threadIdx.x] + rest[255 - threadIdx.x];
}

extern "C" __global__ void mma(const unsigned* a, float* c, int n) {
  float d[4] = {0, 0, 0, 0};
  for (int k = 0; k < n; k++)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[k]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]));
  for (int i = 0; i < 4; i++) c[threadIdx.x * 4 + i] = d[i];
}

extern "C" __global__ void cp_async(const float4* a, float4* c) {
  __shared__ float4 tile[128];
  __pipeline_memcpy_async(&tile[threadIdx.x], &a[threadIdx.x], 16);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
  c[threadIdx.x] = tile[127 - threadIdx.x];
}

extern "C" __global__ void nested(float* a, int n, int m) {
  float s = a[threadIdx.x];
#pragma unroll 1
  for (int i = 0; i < n; i++) {
    s += a[i * 4];
#pragma unroll 1
    for (int j = 0; j < m; j++) s = s * 1.5f + a[j];
  }
  a[threadIdx.x] = s;
}

extern "C" __global__ void table(int* a, int k) {
  switch (k) {
    case 0: a[0] = a[1] * 3; break;
    case 1: a[2] = a[4] / a[1]; break;
    case 2: a[3] = a[9] % 7; break;
    case 3: a[5] = __popc(a[1]); break;
    case 4: atomicAdd(a, 2); break;
    case 5: a[3] = __shfl_xor_sync(~0u, a[1], 1); break;
    default: a[8] = a[1];
  }
}

template <int N> __global__ void scaled(float* a) { a[threadIdx.x] *= N; }
"""

CUDA_SPILLS = r"""
// 72 live values, and launch bounds that leave 32 or 64 registers.
__device__ __forceinline__ void many_values(const float* a, float* c, int n) {
  float r[72];
#pragma unroll
  for (int i = 0; i < 72; i++) r[i] = a[threadIdx.x * 72 + i];
  for (int k = 0; k < n; k++) {
#pragma unroll
    for (int i = 0; i < 72; i++) r[i] = r[i] * r[(i * 7 + 1) % 72] + a[k * 5 + i];
  }
#pragma unroll
  for (int i = 0; i < 72; i++) c[threadIdx.x * 72 + i] = r[i];
}
extern "C" __global__ void __launch_bounds__(1024) spill(const float* a, float* c, int n) {
  many_values(a, c, n);
}
extern "C" __global__ void __launch_bounds__(128) no_spill(const float* a, float* c, int n) {
  many_values(a, c, n);
}
__device__ __noinline__ void outlined(const float* a, float* c, int n) { many_values(a, c, n); }
extern "C" __global__ void __launch_bounds__(1024) spill_in_call(const float* a, float* c, int n) {
  outlined(a, c, n);
}

extern "C" __global__ void local_array(const int* a, int* c, int n) {
  int r[64];
  for (int i = 0; i < 64; i++) r[i] = a[i];
  for (int i = 0; i < n; i++) r[a[i] & 63] += i;
  c[threadIdx.x] = r[threadIdx.x & 63];
}
"""


@lru_cache
def cuda(arch):
    return report_cuda(CUDA_SOURCE, arch) | report_cuda(CUDA_SPILLS, arch)


@lru_cache
def compiled(name, arch):
    case = {"matmul": MATMUL, "add": ADD, "sum": SUM}[name]
    return cases_module.compile_case(case, arch)


def res_usage(report):
    """(registers, stack) of a cubin by cuobjdump, which none of the code under test asks."""
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(report.artifacts["cubin"])
        file.flush()
        text = run_tool("cuobjdump", "-res-usage", file.name)[0]
    found = re.search(rf"Function {report.kernel}:\s+REG:(\d+) STACK:(\d+)", text)
    return int(found[1]), int(found[2])


def local_bytes(report, what):
    """Bytes of the loads or stores of local memory in the code, per thread."""
    found = {
        k.split()[-1]: n for k, n in report.mix.memory.items() if k.startswith(f"local {what}")
    }
    return sum(n * int(bits) // 8 for bits, n in found.items())


TENSOR = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), "HMMA.16816.F32.BF16"),
    "sm_90a": "HGMMA.F32.BF16",
    "sm_100a": "UTCHMMA",
    "gfx942": "v_mfma",
}


@pytest.mark.parametrize("arch", ARCHES)
def test_triton_matmul(arch):
    report = compiled("matmul", arch)
    assert_no_spills(report)
    assert_no_local_memory(report)
    assert_no_notes(report)
    assert_shared_memory_fits(report)
    assert_occupancy(report, warps=8)
    assert_wide_loads(report)
    assert_wide_loads(report, in_hottest_loop=True)
    assert_uses(report, TENSOR[arch], in_hottest_loop=True)
    assert_avoids(report, "FFMA")
    assert report.arch == arch
    assert report.threads_per_block == 8 * device(arch).warp_size
    assert report.mix.other == {}
    assert report.tensor_memory_columns == (128 if arch == "sm_100a" else 0)
    # A tile of A and a tile of B in bf16 per stage, of which there are 2 at least.
    assert report.dynamic_shared_bytes >= 2 * (128 * 64 + 64 * 128) * 2
    if arch != "gfx942":
        assert res_usage(report) == (report.registers, report.stack_bytes)
        assert f".target {arch}" in report.artifacts["ptx"]


@pytest.mark.parametrize("arch", ARCHES)
def test_triton_add(arch):
    report = compiled("add", arch)
    assert_no_spills(report)
    assert_wide_loads(report)
    # 2 loads of 4 floats by each of 128 threads (AMD: 256), twice, for 1,024 elements.
    each = 1 if arch == "gfx942" else 2
    assert report.mix.memory == {"global load 128": 2 * each, "global store 128": each}
    assert report.loops == ()
    assert report.hottest_loop is None
    assert report.shared_bytes == 0
    assert report.mix.other == {}
    assert report.mix.classes["fp32"] == 4 * each or arch in ("sm_100a", "gfx942")
    with pytest.raises(AssertionError, match="has no loop"):
        assert_uses(report, "FADD", in_hottest_loop=True)


@pytest.mark.parametrize("arch", ARCHES)
def test_triton_sum(arch):
    report = compiled("sum", arch)
    assert_no_spills(report)
    assert_wide_loads(report, in_hottest_loop=True)
    assert report.mix.other == {}
    assert report.mix.classes["barrier"] >= 1
    assert report.mix.memory["shared load 32"] >= 1
    if arch != "gfx942":
        # 5 steps within a warp, then 2 among the 4 warps.
        assert_uses(report, "SHFL.BFLY", at_least=7)


@pytest.mark.parametrize("arch", CUDA_ARCHES)
def test_cuda_kernels(arch):
    reports = cuda(arch)
    assert set(reports) == {
        *("add", "spill", "no_spill", "spill_in_call", "local_array", "shared_memory"),
        *("mma", "cp_async", "nested", "table"),
    }
    for name, report in reports.items():
        assert report.kernel == report.case == name
        assert report.mix.other == {}, name
        assert res_usage(report)[0] == report.registers, name
        if name != "spill_in_call":  # the stack of a called function is not the kernel's own
            assert res_usage(report)[1] == report.stack_bytes, name

    assert reports["add"].mix.memory == {"global load 128": 2, "global store 128": 1}
    assert reports["add"].mix.classes["fp32"] == 4
    assert reports["add"].threads_per_block is None
    assert_wide_loads(reports["add"])
    assert_uses(reports["mma"], "HMMA.16816.BF16", in_hottest_loop=True)
    assert reports["mma"].mix.classes["tensor"] == reports["mma"].mix.opcodes["HMMA.16816.F32.BF16"]
    copy = reports["cp_async"]
    assert_uses(copy, "LDGSTS.128")
    assert copy.mix.memory == {
        "global async load 128": 1,
        "global store 128": 1,
        "shared load 128": 1,
    }
    assert copy.mix.classes["async copy"] == 1
    assert copy.static_shared_bytes == 2048
    assert reports["shared_memory"].static_shared_bytes == 4096 * 4
    assert reports["table"].mix.classes["shuffle"] == 1
    assert reports["table"].mix.classes["atomic"] == 1


@pytest.mark.parametrize("arch", CUDA_ARCHES)
def test_spills_and_local_arrays_are_told_apart(arch):
    spill, clean = cuda(arch)["spill"], cuda(arch)["no_spill"]
    assert_no_spills(clean)
    assert_no_local_memory(clean)
    # All local memory of this kernel is spills, so ptxas's bytes are those of LDL and STL.
    for what, stated in (("load", spill.spill_load_bytes), ("store", spill.spill_store_bytes)):
        assert local_bytes(spill, what) == stated > 0
    with pytest.raises(
        AssertionError, match=rf"spill for {arch} spills: {spill.spill_store_bytes} B of stores"
    ):
        assert_no_spills(spill)

    called = cuda(arch)["spill_in_call"]
    assert called.spill_store_bytes > 0
    assert called.stack_bytes > 0
    with pytest.raises(AssertionError, match="spills"):
        assert_no_spills(called)

    array = cuda(arch)["local_array"]
    assert_no_spills(array)
    assert array.stack_bytes == 256
    with pytest.raises(AssertionError, match=r"uses 256 B of local memory per thread in \d+ inst"):
        assert_no_local_memory(array)


def test_triton_spill_is_seen_on_both_vendors():
    small = dataclasses.replace(MATMUL, constexprs={"BM": 64, "BN": 64, "BK": 32}, num_warps=1)
    for arch, option in (("sm_80", {"maxnreg": 128}), ("gfx942", {"waves_per_eu": 4})):
        report = cases_module.compile_case(dataclasses.replace(small, options=option), arch)
        assert report.registers == 128
        for what, stated in (
            ("load", report.spill_load_bytes),
            ("store", report.spill_store_bytes),
        ):
            assert local_bytes(report, what) == stated > 0
        with pytest.raises(AssertionError, match=f"{arch} spills: {report.spill_store_bytes} B"):
            assert_no_spills(report)
        with pytest.raises(AssertionError, match=f"uses {report.stack_bytes} B of local memory"):
            assert_no_local_memory(report)
    # LLVM also counts what went to other registers; with no scratch memory that is no spill.
    silent = dataclasses.replace(report, spill_store_bytes=0, spill_load_bytes=0)
    with pytest.raises(AssertionError, match=rf", {report.amd.vgpr_spills} vector registers"):
        assert_no_spills(silent)
    assert_no_spills(dataclasses.replace(silent, stack_bytes=0))


# The gates, each on a kernel that passes and one that does not.


def test_gate_shared_memory():
    small = report_cuda(CUDA_SOURCE, "sm_86", kernel="shared_memory", dynamic_shared_bytes=80 << 10)
    report = small["shared_memory"]
    assert_shared_memory_fits(report)
    with pytest.raises(AssertionError, match="1 blocks per SM, wanted 2; limited by shared memory"):
        assert_shared_memory_fits(report, blocks=2)

    large = report_cuda(CUDA_SOURCE, "sm_86", kernel="shared_memory", dynamic_shared_bytes=90 << 10)
    report = large["shared_memory"]
    text = (
        r"needs 108544 B of shared memory per block \(16384 static, 92160 dynamic\), "
        r"7168 B above the limit of 101376 B"
    )
    with pytest.raises(AssertionError, match=text):
        assert_shared_memory_fits(report)
    assert report.occupancy.blocks == 0
    # The same bytes fit where the device has more.
    report = report_cuda(CUDA_SOURCE, 80, kernel="shared_memory", dynamic_shared_bytes=90 << 10)
    assert_shared_memory_fits(report["shared_memory"])


def test_gate_triton_shared_memory():
    case = dataclasses.replace(MATMUL, num_stages=5)
    assert_shared_memory_fits(cases_module.compile_case(case, "sm_90a"))
    with pytest.raises(AssertionError, match="above the limit of 101376 B"):
        assert_shared_memory_fits(cases_module.compile_case(case, "sm_120"))


def test_gate_uses_counts_exact_opcodes():
    report = cuda("sm_90a")["mma"]
    n = report.mix.classes["tensor"]
    assert_uses(report, "HMMA", at_least=n)
    with pytest.raises(AssertionError, match=rf"has {n} x HMMA, wanted {n + 1}; it has .*HMMA\.16"):
        assert_uses(report, "HMMA", at_least=n + 1)
    with pytest.raises(AssertionError, match=r"has 0 x HMMA\.TF32, wanted 1"):
        assert_uses(report, "HMMA.TF32")
    with pytest.raises(AssertionError, match=rf"has {n} x HMMA, wanted none"):
        assert_avoids(report, "HMMA")
    assert_avoids(report, "IMMA")
    with pytest.raises(AssertionError, match="has 0 x STG in its hottest loop, wanted 1"):
        assert_uses(report, "STG", in_hottest_loop=True)
    # ptxas moves constants with HFMA2.MMA, which is neither a matrix product nor arithmetic.
    moved = report_cuda('extern "C" __global__ void k(float* a) { *a = 3.5f; }', "sm_90a")["k"]
    assert moved.mix.opcodes["HFMA2.MMA"] == 1
    assert "tensor" not in moved.mix.classes
    assert "fp16" not in moved.mix.classes
    with pytest.raises(AssertionError, match="has 0 x HMMA"):
        assert_uses(moved, "HMMA")


def test_gate_wide_loads():
    unaligned = dataclasses.replace(
        ADD, signature={**ADD.signature, "x_ptr": "*fp32", "y_ptr": "*fp32:16"}
    )
    report = cases_module.compile_case(unaligned, "sm_90a")
    text = (
        r"with 2 loads of 128 bits or more and 8 narrower ones, of which 0 are allowed: "
        r"2 x global load 128, 8 x global load 32"
    )
    with pytest.raises(AssertionError, match=text):
        assert_wide_loads(report)
    assert_wide_loads(report, narrow_allowed=8)
    with pytest.raises(AssertionError, match="of which 7 are allowed"):
        assert_wide_loads(report, narrow_allowed=7)
    assert_wide_loads(report, min_bits=32)
    with pytest.raises(AssertionError, match="with 0 loads of 256 bits or more"):
        assert_wide_loads(compiled("add", "sm_90a"), min_bits=256)
    # A stride that is not known to be 1 makes every load narrow; so does an unknown alignment.
    strided = dataclasses.replace(ADD, signature={**ADD.signature, "stride": "i32:16"})
    with pytest.raises(AssertionError, match="with 0 loads of 128 bits"):
        assert_wide_loads(cases_module.compile_case(strided, "sm_90a"))
    none = report_cuda('extern "C" __global__ void k(float* a) { *a = 3.5f; }', "sm_90a")["k"]
    with pytest.raises(AssertionError, match="0 are allowed: nothing"):
        assert_wide_loads(none, min_bits=8)


def test_gate_wide_loads_counts_bulk_copies_and_256_bits():
    bulk = r"""
    extern "C" __global__ void k(const char* a, float* c, const __grid_constant__ char map[128]) {
      extern __shared__ __align__(128) char buffer[];
      unsigned s = __cvta_generic_to_shared(buffer);
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                   "[%0], [%1], 1024, [%2];" :: "r"(s + 128), "l"(a), "r"(s) : "memory");
      asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                   "[%0], [%1, {%2, %2}], [%3];"
                   :: "r"(s + 2048), "l"(map), "r"(0), "r"(s) : "memory");
      asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 1024;"
                   :: "l"(c), "r"(s + 128) : "memory");
    }"""
    report = report_cuda(bulk, "sm_90a")["k"]
    assert report.mix.memory == {"global bulk load": 2, "global bulk store": 1}
    assert_wide_loads(report, min_bits=256)
    assert_uses(report, "UTMALDG.2D")
    assert_uses(report, "UBLKCP.G")
    wide = r"""
    extern "C" __global__ void k(const float* a, float* c) {
      float x[8];
      asm volatile("ld.global.L2::evict_last.v8.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8];"
                   : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3]), "=f"(x[4]), "=f"(x[5]),
                     "=f"(x[6]), "=f"(x[7]) : "l"(a));
      for (int i = 0; i < 8; i++) c[threadIdx.x * 8 + i] = x[i];
    }"""
    assert_wide_loads(report_cuda(wide, "sm_100a")["k"], min_bits=256)


def test_gates_registers_occupancy_and_notes():
    report = cuda("sm_90a")["spill"]
    n = report.registers
    assert_registers_at_most(report, n)
    with pytest.raises(AssertionError, match=f"{n} registers per thread, at most {n - 1} wanted"):
        assert_registers_at_most(report, n - 1)
    o = report.occupancy
    assert_occupancy(report, warps=o.warps, blocks=o.blocks)
    text = rf"{o.warps} warps per SM, wanted {o.warps + 1}; limited by registers"
    with pytest.raises(AssertionError, match=text):
        assert_occupancy(report, warps=o.warps + 1)
    with pytest.raises(AssertionError, match=f"{o.blocks} blocks per SM, wanted {o.blocks + 1}"):
        assert_occupancy(report, blocks=o.blocks + 1)
    with pytest.raises(AssertionError, match="threads per block not known"):
        assert_occupancy(cuda("sm_90a")["add"])
    assert_no_notes(report)

    # Products that touch their accumulators in between cannot be in flight together.
    serial = r"""
    extern "C" __global__ void k(const unsigned long long* p, float* c) {
      float d[4] = {1, 2, 3, 4};
    #define MMA asm volatile( \
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, %4, %5, 1, 1, 1, 0, 0;" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(p[0]), "l"(p[1]))
      asm volatile("wgmma.fence.sync.aligned;");
      MMA;
      d[0] += 1;
      MMA;
      asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;");
      for (int i = 0; i < 4; i++) c[threadIdx.x * 4 + i] = d[i];
    }"""
    report = report_cuda(serial, "sm_90a")["k"]
    assert_uses(report, "HGMMA.64x8x16", at_least=2)
    with pytest.raises(AssertionError, match=r"wgmma\.mma_async instructions are serialized"):
        assert_no_notes(report)
    warned = report_cuda('extern "C" __global__ void k(int* a) { int left; *a = 1; }', 80)["k"]
    with pytest.raises(
        AssertionError, match=r'kernel\.cu:1: warning: variable "left" was declared'
    ):
        assert_no_notes(warned)


# Reading what the tools print.


def test_unknown_instruction_is_counted_and_listed():
    known = cuda("sm_80")["mma"]
    sass = known.artifacts["sass"].replace(" HMMA.16816", " ZMMA.16816")
    before = count(read_sass(known.artifacts["sass"])["mma"].instructions)
    after = count(read_sass(sass)["mma"].instructions)
    n = before.classes["tensor"]
    assert after.instructions == before.instructions == known.mix.instructions
    assert sum(after.classes.values()) == sum(before.classes.values())
    assert after.classes["other"] == n
    assert after.other == {"ZMMA.16816.F32.BF16": n}
    assert "tensor" not in after.classes
    shown = str(dataclasses.replace(known, mix=after))
    assert f"unknown: {n} x ZMMA.16816.F32.BF16" in shown


def test_unknown_amd_instruction_is_counted_and_listed():
    known = compiled("matmul", "gfx942")
    assembly = known.artifacts["amdgcn"].replace("v_mfma_f32", "x_mfma_f32")
    report = report_amdgcn(
        "matmul_kernel",
        case="changed",
        device=DEVICES["gfx942"],
        assembly=assembly,
        threads_per_block=512,
        dynamic_shared_bytes=0,
    )
    n = known.mix.classes["tensor"]
    assert sum(report.mix.other.values()) == report.mix.classes["other"] == n
    assert report.mix.instructions == known.mix.instructions


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("matmul_kernel:", "other_kernel:", "the AMD assembly has no kernel matmul_kernel"),
        (r"^(\.LBB0_\d+):", r"\1_moved:", "jump to an unknown label '.LBB0_"),
        (
            r"\.sgpr_spill_count:",
            ".sgpr_spilled:",
            r"the AMD assembly states no .*sgpr_spill_count",
        ),
    ],
)
def test_amd_assembly_that_is_not_understood_is_an_error(old, new, message):
    assembly = re.sub(old, new, compiled("matmul", "gfx942").artifacts["amdgcn"], flags=re.M)
    with pytest.raises(ToolError, match=message):
        report_amdgcn(
            "matmul_kernel",
            case="changed",
            device=DEVICES["gfx942"],
            assembly=assembly,
            threads_per_block=512,
            dynamic_shared_bytes=0,
        )


def test_every_line_of_a_disassembly_is_an_instruction_or_an_error():
    sass = cuda("sm_80")["nested"].artifacts["sass"]
    functions = read_sass(sass)
    addresses = len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", sass, re.M))
    assert sum(len(f.instructions) for f in functions.values()) == addresses
    line = next(text for text in sass.splitlines() if "STG.E" in text)
    with pytest.raises(DisassemblyError, match="not understood: "):
        read_sass(sass.replace(line, line.replace("STG.E", "{stg")))
    with pytest.raises(DisassemblyError, match="address out of sequence"):
        read_sass(sass.replace(line + "\n", ""))
    label = re.search(r"BRA `\((\.L_x_\d+)\)", sass)[1]
    with pytest.raises(DisassemblyError, match=re.escape(f"jump to an unknown label '{label}'")):
        read_sass(sass.replace(f"{label}:", ".L_x_999:"))


def test_ptxas_log_that_is_not_understood_is_an_error():
    log = compile_cuda('extern "C" __global__ void k(int* a) { *a = 1; }', 80).log
    assert set(log.kernels) == {"k"}
    text = (
        "ptxas info    : Compiling entry function 'k' for 'sm_80'\n"
        "ptxas info    : Function properties for k\n"
        "ptxas         .     8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 18 registers, used 1 barriers, 16 bytes cumulative stack size, "
        "2048 bytes smem, 380 bytes cmem[0]\n"
    )
    k = read_ptxas_log(text).kernels["k"]
    assert dataclasses.astuple(k) == (18, 16, 4, 8, 2048, ())
    with pytest.raises(ToolError, match="not understood: 4 bytes spilled somewhere"):
        read_ptxas_log(text + "4 bytes spilled somewhere\n")
    with pytest.raises(ToolError, match="no figures for k"):
        read_ptxas_log(text.replace("Used", "used"))


def test_log_and_disassembly_that_contradict_each_other_are_an_error():
    binary = compile_cuda(CUDA_SPILLS, "sm_80")
    stackless = dataclasses.replace(binary.log.kernels["local_array"], stack_bytes=0)
    log = dataclasses.replace(binary.log, kernels={"local_array": stackless}, functions={})
    with pytest.raises(ToolError, match="ptxas states no local memory, but the SASS uses it"):
        report_cubin(
            "local_array",
            case="x",
            language="cuda",
            device=device(80),
            cubin=binary.cubin,
            ptx=binary.ptx,
            log=log,
        )


def test_a_warning_is_noted_at_its_own_kernel():
    source = """
    extern "C" __global__ void __launch_bounds__(1024, 2) bold(int* a) { *a = 1; }
    extern "C" __global__ void __launch_bounds__(1024, 1) meek(int* a) { *a = 1; }
    """
    reports = report_cuda(source, "sm_120")
    assert_no_notes(reports["meek"])
    with pytest.raises(
        AssertionError, match=r"for entry bold is out of range\. \.minnctapersm will"
    ):
        assert_no_notes(reports["bold"])
    # One that names no kernel may be about any.
    log = read_ptxas_log(
        "ptxas info    : Compiling entry function 'k' for 'sm_90a'\n"
        "ptxas info    : Function properties for k\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 8 registers\n"
        "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored\n"
    )
    assert "setmaxnreg" in log.kernels["k"].warnings[0]


def test_a_kernel_in_tritons_cache_has_its_log_too(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compile_triton(add_kernel, 80, signature=ADD.signature, constexprs=ADD.constexprs)
    assert list(tmp_path.iterdir())
    assert_no_spills(cases_module.compile_case(ADD, "sm_80"))


def test_triton_that_does_not_print_the_log_of_ptxas(monkeypatch):
    """Triton 3.4, where a script of ours runs ptxas."""
    before = {k: v for k, v in os.environ.items() if k.startswith("TRITON")}
    small = dataclasses.replace(MATMUL, constexprs={"BM": 64, "BN": 64, "BK": 32}, num_warps=1)
    small = dataclasses.replace(small, options={"maxnreg": 128})
    printed = cases_module.compile_case(small, "sm_80")
    monkeypatch.setattr(triton_kernel, "_prints_log", lambda knobs: False)
    kept = cases_module.compile_case(small, "sm_80")
    assert kept.spill_store_bytes > 0
    assert kept == printed
    assert before == {k: v for k, v in os.environ.items() if k.startswith("TRITON")}
    monkeypatch.setattr(triton_kernel, "_LOGGING_PTXAS", '#!/bin/sh\n"{ptxas}" "$@"\n')
    with pytest.raises(ToolError, match="no kernel matmul_kernel; there are matmul_kernel"):
        cases_module.compile_case(small, "sm_80")


def test_kernel_that_triton_refuses():
    with pytest.raises(TritonCompileError, match=r"^matmul_kernel for sm_80: CompilationError: "):
        report_triton(
            matmul_kernel,
            "sm_80",
            signature=MATMUL.signature,
            constexprs={"BM": 64, "BN": 64, "BK": 4},
        )


@pytest.mark.parametrize(
    ("opcode", "operands", "kind", "moved"),
    [
        ("IMAD.MOV.U32", "R1, RZ, RZ, c[0x0][0x28]", "move", None),
        ("IMAD.WIDE", "R2, R0, 0x4, R2", "integer", None),
        ("HFMA2.MMA", "R7, -RZ, RZ, 0, 2.98e-07", "move", None),
        ("HFMA2.BF16_V2", "R7, R1, R2, R3", "fp16", None),
        ("LDSM.16.MT88.4", "R4, [R8]", "shared matrix", "shared load 128"),
        ("LDSM.16.M88", "R4, [R8]", "shared matrix", "shared load 32"),
        ("STSM.16.M88.2", "[R8], R4", "shared matrix", "shared store 64"),
        ("LDG.E.U16.CONSTANT", "R4, [R8.64]", "global", "global load 16"),
        ("LDG.E.U8", "R4, [R8.64]", "global", "global load 8"),
        ("LDG.E.ELL2.256", "R12, R8, desc[UR4][R2.64]", "global", "global load 256"),
        ("LDGSTS.E.BYPASS.LTC128B.128", "[R7], desc[UR6][R2.64]", "async copy", None),
        ("LDGSTS.E", "[R7], [R2.64]", "async copy", "global async load 32"),
        ("UBLKCP.G.S", "[UR4], [UR8], UR6", "async copy", "global bulk store"),
        ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU", "[R2.64], R5", "atomic", None),
        ("NOSUCH.E", "R1", "other", None),
    ],
)
def test_class_and_width_of_an_instruction(opcode, operands, kind, moved):
    assert classify(opcode, operands) == kind
    if moved:
        assert str(access(opcode, operands)) == moved


@pytest.mark.parametrize(
    ("line", "kind", "moved"),
    [
        ("v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]", "tensor", None),
        ("v_fma_f32 v0, v1, v2, v3", "fp32", None),
        ("v_pk_fma_f16 v0, v1, v2, v3", "fp16", None),
        ("v_cvt_f32_f16_e32 v0, v1", "convert", None),
        ("v_exp_f32_e32 v0, v1", "special", None),
        ("v_lshl_add_u32 v0, v1, 2, v3", "integer", None),
        ("v_mov_b32_dpp v0, v1 row_shr:1 row_mask:0xf bank_mask:0xf", "shuffle", None),
        ("ds_bpermute_b32 v0, v1, v2", "shuffle", None),
        ("ds_read2st64_b64 v[0:3], v4 offset1:1", "shared", "shared load 128"),
        ("ds_write_b16 v0, v1", "shared", "shared store 16"),
        ("global_load_dwordx4 v[0:3], v4, s[0:1]", "global", "global load 128"),
        ("global_load_ushort v0, v4, s[0:1]", "global", "global load 16"),
        ("buffer_store_dwordx2 v[0:1], v4, s[0:3], 0 offen", "global", "global store 64"),
        ("global_load_lds_dwordx4 v4, s[0:1]", "async copy", "global async load 128"),
        ("buffer_load_dwordx4 v4, s[0:3], 0 offen lds", "async copy", "global async load 128"),
        ("global_atomic_add_f32 v0, v1, s[0:1]", "atomic", None),
        ("scratch_load_dword v0, off, off", "local", "local load 32"),
        ("s_load_dwordx4 s[0:3], s[4:5], 0x0", "constant", None),
        ("s_waitcnt vmcnt(0)", "barrier", None),
        ("s_nop 0", "nop", None),
        ("q_nothing v0", "other", None),
    ],
)
def test_class_and_width_of_an_amd_instruction(line, kind, moved):
    (found,) = amdgcn._instructions(f"\t{line} ; a comment\n")
    assert found.kind == kind
    assert (str(found.access) if found.access else None) == moved


def test_loops_of_a_nest():
    for arch in CUDA_ARCHES:
        report = cuda(arch)["nested"]
        # The compiler made a version of the outer loop for an inner one that never runs.
        alone, outer, inner = report.loops
        assert (alone.depth, outer.depth, inner.depth) == (1, 1, 2)
        assert alone.mix.classes["fp32"] == 1
        assert outer.mix.instructions > inner.mix.instructions
        assert outer.mix.opcodes["FADD"] == 1
        assert inner.mix.classes["fp32"] == 1
        assert inner.mix.opcodes["FFMA"] == 1
        assert inner.mix.memory == {"global load 32": 1}
        assert report.hottest_loop == inner
        assert report.mix.classes["fp32"] == 3
        # Without the jumps back there is no loop.
        code = read_sass(report.artifacts["sass"])["nested"].instructions
        forward = [
            dataclasses.replace(i, targets=tuple(t for t in i.targets if t > i.address))
            for i in code
        ]
        assert find_loops(forward) == ()


def test_a_loop_that_only_waits_is_not_hot():
    source = r"""
    extern "C" __global__ void k(float* a, int n) {
      __shared__ unsigned long long barrier;
      unsigned b = __cvta_generic_to_shared(&barrier);
    #pragma unroll 1
      for (int i = 0; i < n; i++) {
        asm volatile(
            "{ .reg .pred p; L: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra L; }"
            :: "r"(b), "r"(i & 1) : "memory");
        a[i] = a[i] * 2;
      }
    }"""
    report = report_cuda(source, "sm_90a")["k"]
    waiting = [loop for loop in report.loops if loop.waits]
    assert [loop.depth for loop in waiting] == [2]
    assert_uses(report, "SYNCS.TRYWAIT")
    assert report.hottest_loop.depth == 1
    assert report.hottest_loop.mix.memory == {"global load 32": 1, "global store 32": 1}


def test_indirect_jumps_with_unknown_targets_are_noted():
    report = cuda("sm_80")["table"]
    assert_uses(report, "BRX")
    assert_no_notes(report)
    sass = re.sub(r'\(\*"BRANCH_TARGETS [^"]*"\*\)', "", report.artifacts["sass"])
    binary = compile_cuda(CUDA_SOURCE, "sm_80")
    changed = report_cubin(
        "table",
        case="table",
        language="cuda",
        device=device(80),
        cubin=binary.cubin,
        ptx=binary.ptx,
        log=binary.log,
        sass=sass,
    )
    with pytest.raises(AssertionError, match=r"\d indirect jumps with unknown targets"):
        assert_no_notes(changed)


def test_ptx_alone_is_that_of_the_binary():
    ptx, names = compile_ptx(CUDA_SOURCE, 80, names=["add"])
    assert ptx == compile_cuda(CUDA_SOURCE, 80, names=["add"]).ptx
    assert names == {"add": "add"}


# Occupancy, against NVIDIA's own calculator.

CALCULATOR = r"""
#include <cstddef>
#include <cuda_occupancy.h>
extern "C" int resident(int major, int minor, int threads, int registers, int bytes,
                        int shared_per_block, int shared_per_sm, int threads_per_sm) {
  cudaOccDeviceProp device;
  device.computeMajor = major;
  device.computeMinor = minor;
  device.maxThreadsPerBlock = 1024;
  device.maxThreadsPerMultiprocessor = threads_per_sm;
  device.regsPerBlock = device.regsPerMultiprocessor = 65536;
  device.warpSize = 32;
  device.sharedMemPerBlock = 48 * 1024;
  device.sharedMemPerMultiprocessor = shared_per_sm;
  device.numSms = 1;
  device.sharedMemPerBlockOptin = shared_per_block;
  device.reservedSharedMemPerBlock = 1024;
  cudaOccFuncAttributes kernel;
  kernel.maxThreadsPerBlock = 1024;
  kernel.numRegs = registers;
  kernel.sharedSizeBytes = 0;
  kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  kernel.maxDynamicSharedSizeBytes = shared_per_block;
  kernel.numBlockBarriers = 1;
  cudaOccDeviceState state;
  cudaOccResult result;
  if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, bytes))
    return -1;
  return result.activeBlocksPerMultiprocessor;
}
"""


@pytest.fixture(scope="module")
def calculator(tmp_path_factory):
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler, which NVIDIA's occupancy calculator needs")
    folder = tmp_path_factory.mktemp("occupancy")
    (folder / "calculator.cpp").write_text(CALCULATOR)
    include = cuda_source.include_folders()[0]
    command_line = [compiler, "-shared", "-fPIC", "-w", f"-I{include}", "-o"]
    command_line += [str(folder / "calculator.so"), str(folder / "calculator.cpp")]
    subprocess.run(command_line, check=True)
    return ctypes.CDLL(str(folder / "calculator.so")).resident


@pytest.mark.parametrize("arch", CUDA_ARCHES)
def test_occupancy_is_that_of_nvidias_calculator(calculator, arch):
    limits = DEVICES[arch]
    threads_per_sm = limits.warps_per_sm * 32
    limited_by = set()
    for threads in (32, 64, 96, 128, 160, 256, 288, 384, 512, 768, 1024):
        for registers in (16, 24, 32, 33, 40, 64, 80, 96, 127, 128, 168, 255):
            for used in (0, 1, 1000, 16384, 33000, 49152, 50000, 101376, 101377, 166912, 232448):
                if used > limits.shared_per_block_bytes:
                    continue
                mine = occupancy(
                    limits, threads_per_block=threads, registers=registers, shared_bytes=used
                )
                theirs = calculator(
                    *divmod(limits.capability, 10),
                    *(threads, registers, used),
                    *(limits.shared_per_block_bytes, limits.shared_per_sm_bytes, threads_per_sm),
                )
                assert mine.blocks == theirs, (threads, registers, used, mine)
                limited_by |= set(mine.limited_by.split("+"))
    assert limited_by == {"blocks", "registers", "shared memory", "warps"}


def test_occupancy_of_what_cannot_run():
    limits = DEVICES["sm_90a"]
    over = occupancy(limits, threads_per_block=128, registers=32, shared_bytes=232449)
    assert (over.blocks, over.limited_by) == (0, "shared memory")
    over = occupancy(limits, threads_per_block=32, registers=256, shared_bytes=0)
    assert (over.blocks, over.limited_by) == (0, "registers")
    over = occupancy(limits, threads_per_block=1024, registers=65, shared_bytes=0)
    assert (over.blocks, over.limited_by) == (0, "registers")
    for threads in (0, 1025):
        with pytest.raises(ValueError, match=f"{threads} threads per block on sm_90a: must be 1"):
            occupancy(limits, threads_per_block=threads, registers=32, shared_bytes=0)
    columns = occupancy(
        DEVICES["sm_100a"],
        threads_per_block=128,
        registers=32,
        shared_bytes=0,
        tensor_memory_columns=256,
    )
    assert (columns.blocks, columns.limited_by, columns.fraction) == (2, "tensor memory", 8 / 64)


@pytest.mark.parametrize("name", ["matmul", "add", "sum"])
def test_occupancy_on_amd_is_that_of_llvm(name):
    """LLVM states waves per SIMD by registers; this report adds shared memory."""
    report = compiled(name, "gfx942")
    by_registers = occupancy(
        DEVICES["gfx942"], threads_per_block=64, registers=report.registers, shared_bytes=0
    )
    assert by_registers.warps == 4 * report.amd.compiler_occupancy


@pytest.mark.parametrize(
    ("given", "arch"),
    [
        *((90, "sm_90a"), ("90a", "sm_90a"), ("sm_90", "sm_90a"), ("sm_120a", "sm_120")),
        *((100, "sm_100a"), ("86", "sm_86"), ("gfx942", "gfx942")),
    ],
)
def test_names_of_architectures(given, arch):
    assert device(given).arch == arch


def test_unknown_architecture():
    with pytest.raises(ValueError, match=r"unknown architecture 'sm_75'; there are sm_80, sm_86, "):
        device("sm_75")


# What goes wrong before anything is compiled.


def test_cuda_error_has_file_line_and_message(tmp_path):
    path = tmp_path / "broken.cu"
    path.write_text('extern "C" __global__ void k(int* a) {\n  *a = 1;\n  *a = nowhere;\n}\n')
    with pytest.raises(CudaCompileError) as caught:
        report_cuda(path, "sm_90a")
    first = caught.value.diagnostics[0]
    assert (first.file, first.line, first.severity) == (str(path), 3, "error")
    assert first.message == 'identifier "nowhere" is undefined'
    assert f'{path}:3: error: identifier "nowhere" is undefined' in str(caught.value)
    assert "CUDA C++ for sm_90a does not compile" in str(caught.value)

    (tmp_path / "part.cuh").write_text("__device__ int f() { return missing; }\n")
    path.write_text('#include <part.cuh>\nextern "C" __global__ void k(int* a) { *a = f(); }\n')
    with pytest.raises(CudaCompileError, match=r"part\.cuh:1: error: identifier .missing."):
        report_cuda(path, "sm_80")
    (tmp_path / "part.cuh").write_text("__device__ int f() { return NUMBER; }\n")
    assert "k" in report_cuda(path, "sm_80", defines={"NUMBER": 7})


def test_cuda_error_of_the_assembler_is_shown():
    source = 'extern "C" __global__ void k() { asm volatile("wgmma.fence.sync.aligned;"); }'
    assert_uses(report_cuda(source, "sm_90a")["k"], "WARPGROUP.ARRIVE")
    with pytest.raises(CudaCompileError, match=r"wgmma\.fence.* not supported on .*sm_80"):
        report_cuda(source, "sm_80")


def test_unknown_option_of_nvrtc_is_shown():
    with pytest.raises(CudaCompileError, match="nonsense"):
        report_cuda("", 80, options=["--nonsense"])


def test_names_of_cuda_kernels():
    report = report_cuda(CUDA_SOURCE, 80, kernel="scaled<3>", threads_per_block=96)["scaled<3>"]
    assert report.kernel.startswith("_Z6scaledILi3E")
    assert report.occupancy.warps == 3 * 16 or report.occupancy.blocks == 21
    with pytest.raises(CudaCompileError, match='identifier "nothing" is undefined'):
        report_cuda(CUDA_SOURCE, 80, kernel="nothing")
    with pytest.raises(ValueError, match="the source has no kernel _Zabc; there are "):
        report_cuda(CUDA_SOURCE, 80, kernel="_Zabc")
    with pytest.raises(ValueError, match="CUDA C\\+\\+ cannot be compiled for gfx942"):
        report_cuda(CUDA_SOURCE, "gfx942")


def test_missing_tools_are_named_with_a_remedy(monkeypatch, tmp_path):
    with pytest.raises(ToolError, match="ptxas ended with"):
        toolchain.assemble(".version 8.0\n.target sm_80\nnonsense\n", "sm_80")
    empty = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: empty)
    with pytest.raises(MissingToolError, match=r"has no nvdisasm .*: install an official wheel"):
        toolchain.disassemble(b"")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingToolError, match=r"ptxas comes with triton.* pip install triton"):
        toolchain.assemble("", "sm_80")
    with pytest.raises(MissingToolError, match="triton is not installed: pip install triton"):
        compile_triton(add_kernel, "sm_80", signature={})


def test_missing_wheels_are_named_with_a_remedy(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    for cached in (cuda_source._nvrtc, cuda_source.include_folders):
        cached.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", absent)
        with pytest.raises(
            MissingToolError,
            match=r"needs cuda-bindings, nvidia-cuda-nvrtc, .*: pip install cuda-b",
        ):
            compile_cuda("", 80)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "files", absent)
        with pytest.raises(MissingToolError, match="needs nvidia-cuda-runtime: pip install"):
            cuda_source.include_folders()
        patch.setattr(importlib.metadata, "files", lambda name: [])
        with pytest.raises(MissingToolError, match=r"has no include/cuda_fp16\.h: pip install"):
            cuda_source.include_folders()
    assert cuda_source.include_folders()[0].joinpath("cuda_fp16.h").is_file()


def test_bad_triton_cases_are_refused():
    with pytest.raises(ValueError, match="parameter 'n' must be either in the signature or among"):
        compile_triton(add_kernel, 90, signature={"x_ptr": "*fp32"}, constexprs={"y_ptr": None}
                       | {"out_ptr": None})  # fmt: skip
    with pytest.raises(ValueError, match="add_kernel has no parameter 'z_ptr'"):
        compile_triton(add_kernel, 90, signature={"z_ptr": "*fp32"})
    with pytest.raises(ValueError, match=r"n: 'i32:8' must end in :16 or :1"):
        report_triton(
            add_kernel,
            90,
            signature={**ADD.signature, "n": "i32:8"},
            constexprs=ADD.constexprs,
        )
    with pytest.raises(TypeError, match="not a Triton kernel"):
        compile_triton(len, 90, signature={})
    interpreted = type("InterpretedFunction", (), {"params": [], "arg_names": []})()
    with pytest.raises(TypeError, match="decorated while TRITON_INTERPRET is not set"):
        compile_triton(interpreted, 90, signature={})


# Types and constants as the launcher chooses them.


@triton.jit(do_not_specialize=["b"], do_not_specialize_on_alignment=["c"])
def typed_kernel(p, q, r, a, b, c, d, e, f, g, absent, N: tl.constexpr, M: tl.constexpr = 4):
    pass


def test_signature_is_that_of_tritons_launcher():
    compiler = importlib.import_module("triton.compiler")
    jit = importlib.import_module("triton.runtime.jit")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    backend = compiler.make_backend(target)
    binder = jit.create_function_from_signature(
        typed_kernel.signature, typed_kernel.params, backend
    )
    base = torch.zeros(64)
    values = {
        "p": base,
        "q": base[1:].to(torch.bfloat16),
        "r": base[1:],
        "a": 1,
        "b": 1,
        "c": 32,
        "d": 2**31,
        "e": True,
        "f": 2.5,
        "g": 48,
        "absent": None,
        "N": 8,
    }
    _, specialization, _ = binder(*values.values())
    theirs = {}
    for parameter, (kind, special) in zip(typed_kernel.params, specialization, strict=True):
        theirs[parameter.name] = f"{kind}:16" if special == "D" else kind
    signature, constants = signature_of(typed_kernel, values)
    mine = {name: kind for name, kind in signature.items() if not kind.endswith(":1")}
    ones = [name for name, kind in signature.items() if kind.endswith(":1")]
    assert ones == ["a"]
    assert constants == {"absent": None, "N": 8, "M": 4}
    assert theirs == mine | dict.fromkeys([*ones, *constants], "constexpr")
    meta = {**values, "p": base.to("meta"), "r": base.to("meta")[1:]}
    assert signature_of(typed_kernel, meta)[0] == signature

    with pytest.raises(TypeError, match="no value for 'N'"):
        signature_of(typed_kernel, {k: v for k, v in values.items() if k != "N"})
    with pytest.raises(TypeError, match="has no parameter 'z'"):
        signature_of(typed_kernel, {"z": 1})
    with pytest.raises(TypeError, match="'p' is a str, which has no type here"):
        signature_of(typed_kernel, {**values, "p": "x"})


def test_case_of_a_call_is_the_case_written_out():
    x = torch.empty(4096, device="meta")
    arguments = {"x_ptr": x, "y_ptr": x, "out_ptr": x, "n": 4096, "stride": 1, "BLOCK": 1024}
    assert StaticCase.of_call("add", add_kernel, arguments) == ADD


# The command.


@pytest.fixture
def declare(monkeypatch):
    """Gives an op kernels, in place of those it has."""

    def put(op, triton_cases=None, cuda_cases=()):
        for package, found in (("kernels", triton_cases), ("cuda", cuda_cases)):
            name = f"kimi_ops.{package}.{op}"
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
            if found is not None:
                module.static_cases = lambda found=found: list(found)
            monkeypatch.setitem(sys.modules, name, module)

    return put


def test_command_prints_json(declare, capsys):
    cuda_case = CudaCase("copy", CUDA_SOURCE, "cp_async", threads_per_block=128)
    declare("silu_mul", [ADD, dataclasses.replace(SUM, arches=("sm_80",))], [cuda_case])
    assert command.run(["90", "gfx942"], ["silu_mul"], True) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["op"], r["case"], r["arch"], r["language"]) for r in rows] == [
        ("silu_mul", "add", "sm_90a", "triton"),
        ("silu_mul", "add", "gfx942", "triton"),
        ("silu_mul", "copy", "sm_90a", "cuda"),
    ]
    assert rows[0]["registers"] == compiled("add", "sm_90a").registers
    assert rows[0]["mix"]["memory"] == {"global load 128": 4, "global store 128": 2}
    assert rows[1]["amd"]["vgprs"] > 0
    assert rows[2]["occupancy"]["blocks"] == 16
    assert all(r["problems"] == [] for r in rows)


def test_command_prints_a_table(declare, capsys):
    fits, too_large = (
        CudaCase(name, CUDA_SOURCE, "shared_memory", dynamic_shared_bytes=size << 10)
        for name, size in (("fits", 80), ("too_large", 90))
    )
    spill = CudaCase("spilling", CUDA_SPILLS, "spill")
    declare("silu_mul", [], [fits, too_large, spill])
    assert command.run(["sm_86"], ["silu_mul"], False) == 1
    lines = {
        line.split()[3]: line for line in capsys.readouterr().out.splitlines() if "sm_86" in line
    }
    assert set(lines) == {"fits", "too_large", "spilling"}
    assert lines["fits"].split("│")[-2].strip() == ""
    assert lines["too_large"].split("│")[-2].strip() == "shared memory"
    assert "108544/101376" in lines["too_large"]
    assert lines["spilling"].split("│")[-2].strip() == "spills"
    report = cuda("sm_86")["spill"]
    assert f"{report.spill_store_bytes}+{report.spill_load_bytes}" in lines["spilling"]

    declare("silu_mul", [], [dataclasses.replace(fits, threads_per_block=None)])
    assert command.run(["sm_86"], ["silu_mul"], False) == 0
    assert "silu_mul" in capsys.readouterr().out
    declare("silu_mul", [], [])
    assert command.run([], ["silu_mul"], False) == 0
    assert "no kernels" in capsys.readouterr().out


def test_command_says_what_cannot_run(declare, capsys):
    many = CudaCase("many", CUDA_SPILLS, "no_spill", threads_per_block=1024)
    declare("silu_mul", [], [many])
    assert command.run(["sm_90a"], ["silu_mul"], True) == 1
    assert json.loads(capsys.readouterr().out)[0]["problems"] == ["cannot be launched: registers"]
    assert command.run(["sm_1"], [], False) == 2
    assert "unknown architecture 'sm_1'" in capsys.readouterr().err
    assert command.run([], ["nothing"], False) == 2
    assert "unknown op 'nothing'" in capsys.readouterr().err
    declare("silu_mul", [], [CudaCase("broken", "what is this", "k")])
    assert command.run(["80"], ["silu_mul"], False) == 2
    assert "kernel.cu:1: error: " in capsys.readouterr().err


def test_what_modules_declare(declare, monkeypatch, tmp_path):
    declare("silu_mul", None)
    with pytest.raises(ValueError, match=r"kimi_ops\.kernels\.silu_mul has no static_cases\(\)"):
        static_cases_of("silu_mul")
    declare("silu_mul", [ADD, SUM, ADD])
    with pytest.raises(ValueError, match="two cases are named 'add'"):
        static_cases_of("silu_mul")

    # A CUDA source whose launcher declares nothing: every kernel in it.
    package = types.ModuleType("kimi_ops.csrc")
    package.__file__ = str(tmp_path / "__init__.py")
    monkeypatch.setitem(sys.modules, "kimi_ops.csrc", package)
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "silu_mul.cu").write_text(CUDA_SOURCE)
    declare("silu_mul", [ADD], None)
    found = static_cases_of("silu_mul")
    assert found[0] == ADD
    assert {case.name for case in found[1:]} == set(report_cuda(CUDA_SOURCE, "sm_80"))
    report = cases_module.compile_case(next(c for c in found if c.name == "mma"), "sm_89")
    assert_uses(report, "HMMA")


def test_every_triton_kernel_of_the_package_declares_its_cases():
    """Only that they are declared; what they must hold is in the tests of their ops. CUDA C++ needs
    no declaration: `test_cuda_compiled.py` compiles all that is in a source."""
    for op in cases_module.op_names():
        for case in cases_module.triton_cases_of(op):
            assert set(case.arches) <= set(ARCHES)
