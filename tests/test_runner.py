"""Running kernels without a GPU: CUDA C++, the block `emulated`, and the ways of the tests."""

from __future__ import annotations

import importlib
import importlib.util
import os
import struct
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import kimi_ops
from kimi_ops._dispatch import get_op
from kimi_ops.cuda._launcher import current_launcher
from kimi_ops.testing import Case, cases, check_op
from kimi_ops.testing.ptx import LaunchError, OutOfBounds, Race, Uninitialised
from kimi_ops.testing.static import CudaCompileError
from kimi_ops.testing.ways import WAYS, ways_of, with_way

triton = pytest.importorskip("triton", reason="needs triton: pip install 'triton>=3.4'")
_INTERPRET = os.environ.pop("TRITON_INTERPRET", None)
import triton.language as tl  # noqa: E402

from kimi_ops.testing.runner import compile_kernel, emulated, run_cuda  # noqa: E402
from kimi_ops.testing.triton_interpreter import interpreted  # noqa: E402

SCALE = r"""
#include "factor.cuh"
struct Offset { int by; float add; };
template <int STEP> __device__ void step(const float* x, float* y, int n, Offset o) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = FACTOR * x[i] * STEP + o.add + (float)o.by;
}
template <int STEP> __global__ void scale(const float* x, float* y, int n, Offset o) {
  step<STEP>(x, y, n, o);
}
extern "C" __global__ void plain(const float* x, float* y, int n) {
  step<1>(x, y, n, Offset{0, x ? 0.f : 9.f});
}
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "factor.cuh").write_text("#ifndef FACTOR\n#define FACTOR 2\n#endif\n")
    (tmp_path / "scale.cu").write_text(SCALE)
    return tmp_path / "scale.cu"


@pytest.mark.parametrize("arch", [80, 90])
def test_cuda_source_runs(source, arch):
    x, y = torch.arange(100.0), torch.empty(100)
    offset = struct.pack("<if", 3, 0.5)
    report = run_cuda(
        source, "scale<4>", (2,), (64,), [x, y, 100, offset], arch=arch, uninitialised=[y]
    )
    assert torch.equal(y, x * 8 + 3.5)
    assert (report.ctas, report.threads) == (2, 64)
    run_cuda(source, "plain", (2,), (64,), [x, y, 100], arch=arch, defines={"FACTOR": 5})
    assert torch.equal(y, x * 5)


def test_a_source_is_compiled_once_and_anew_when_a_header_changes(source):
    first = compile_kernel(source, "plain")
    assert compile_kernel(source, "plain") is first
    assert compile_kernel(source, "plain", arch=90) is not first
    (source.parent / "factor.cuh").write_text("#define FACTOR 3\n")
    x, y = torch.ones(1), torch.empty(1)
    run_cuda(source, "plain", (1,), (32,), [x, y, 1])
    assert y.item() == 3


def test_cuda_calls_that_do_not_fit(source):
    x = torch.ones(4)
    with pytest.raises(CudaCompileError, match="nowhere"):
        run_cuda(source, "nowhere", (1,), (32,), [x, x, 4])
    with pytest.raises(LaunchError, match="takes 3 arguments, got 2"):
        run_cuda(source, "plain", (1,), (32,), [x, x])
    with pytest.raises(OutOfBounds):
        run_cuda(source, "plain", (1,), (32,), [x, torch.empty(3), 4])
    with pytest.raises(OutOfBounds, match="no buffer"):  # a null pointer
        run_cuda(source, "plain", (1,), (32,), [None, torch.empty(4), 4])


# The block


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


def test_workspaces_hold_nothing_until_a_launch_has_written_them():
    x, y = torch.randn(64), torch.empty(64)
    with emulated():
        workspace = torch.empty(64)
        copy_kernel[(1,)](x, workspace, 64, BLOCK=64)
        copy_kernel[(1,)](workspace, y, 64, BLOCK=64)
    assert torch.equal(x, y)
    for allocate in (lambda: torch.empty(64), lambda: x.new_empty(64), lambda: torch.empty_like(x)):
        with emulated():
            workspace = allocate()
            copy_kernel[(1,)](x, workspace, 32, BLOCK=64)
            with pytest.raises(Uninitialised, match=r"argument 0 \+ 128, never written"):
                copy_kernel[(1,)](workspace, y, 64, BLOCK=64)
    for inference in (False, True):
        with torch.inference_mode(inference), emulated():  # torch has written it
            workspace = torch.empty(64).copy_(x)
            copy_kernel[(1,)](workspace, y, 64, BLOCK=64)
            copy_kernel[(1,)](torch.zeros(64), y, 64, BLOCK=64)


def test_outputs_must_be_written_whole():
    x, y = torch.randn(64), torch.empty(2, 32)
    with emulated(uninitialised=[y]):
        copy_kernel[(1,)](x, y, 40, BLOCK=64)
        copy_kernel[(1,)](x[40:], y.view(-1)[40:], 24, BLOCK=64)
    with (
        pytest.raises(Uninitialised, match=r"output 0 \[1, 8\] was never written \(24 of 64"),
        emulated(uninitialised=[y]),
    ):
        copy_kernel[(1,)](x, y, 40, BLOCK=64)


def test_both_languages_go_to_the_emulator_and_only_within_the_block(source):
    x, y = torch.randn(32), torch.empty(32)
    with emulated(arch=90) as emulation:
        current_launcher().launch(source, "plain", (1,), (32,), [x, y, 32])
        copy_kernel[(1,)](y, x, 32, BLOCK=32, num_warps=1)
    assert [name for name, _ in emulation.launches] == ["plain", "copy_kernel"]
    assert {report.target for _, report in emulation.launches} == {"sm_90a"}
    with pytest.raises(RuntimeError, match=r"within kimi_ops\.testing\.runner\.emulated\(\)"):
        current_launcher().launch(source, "plain", (1,), (32,), [x, y, 32])


@triton.jit
def grid_barrier_kernel(count_ptr, y_ptr, programs):
    tl.store(y_ptr + tl.program_id(0), tl.program_id(0))
    tl.debug_barrier()
    tl.atomic_add(count_ptr, 1, sem="acq_rel")
    while tl.atomic_add(count_ptr, 0, sem="acq_rel") < programs:
        pass
    tl.debug_barrier()
    neighbour = tl.load(y_ptr + (tl.program_id(0) + 1) % programs)
    tl.store(y_ptr + programs + tl.program_id(0), neighbour)


def test_cooperative_launches_of_triton():
    count, y = torch.zeros(1, dtype=torch.int32), torch.zeros(160, dtype=torch.int32)
    with emulated():
        grid_barrier_kernel[(80,)](count, y, 80, launch_cooperative_grid=True)
    assert y[80:].tolist() == [(i + 1) % 80 for i in range(80)]


# An op's backend on CPU tensors


def test_gpu_backends_take_cpu_tensors_in_the_blocks_alone():
    x, weight = torch.randn(2, 64), torch.randn(64)
    with kimi_ops.use_backend("reference"):
        expected = kimi_ops.rms_norm(x, weight, 1e-5)
    with kimi_ops.use_backend("triton"):
        for block in (interpreted(), emulated(), emulated(arch=90)):
            with block:
                y = kimi_ops.rms_norm(x, weight, 1e-5)
            torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
            with pytest.raises(
                kimi_ops.BackendError,
                match=r"its kernels run on a GPU, the tensors are on cpu; without one they run in "
                r"kimi_ops\.testing\.runner\.emulated\(\) or .*interpreted\(\)",
            ):
                kimi_ops.rms_norm(x, weight, 1e-5)
    with emulated():
        assert kimi_ops.resolve("rms_norm", x, weight, 1e-5) in ("cpu", "reference")


def test_kernels_say_what_they_need_where_triton_is_missing():
    code = """
import sys
sys.modules["triton"] = None
import torch, kimi_ops
try:
    with kimi_ops.use_backend("triton"):
        kimi_ops.silu_mul(torch.ones(1, 4))
except kimi_ops.BackendError as error:
    print(error)
import kimi_ops.kernels, kimi_ops._target
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "triton is not installed: pip install 'triton>=3.4'" in result.stdout


# The ways of the test body


def way(name):
    return next(w for w in WAYS if w.name == name)


def test_every_kernel_has_all_its_ways():
    assert [w.name for w in ways_of("rms_norm") if w.backend == "triton"] == [
        "triton[interpreted]", "triton[sm_80]", "triton[sm_90]"
    ]  # fmt: skip


KERNEL = """
import triton, triton.language as tl
@triton.jit
def silu_mul_kernel(x_ptr, y_ptr, rows, F, stride, BLOCK: tl.constexpr):
    t = tl.program_id(0)
    f = tl.arange(0, BLOCK)
    gate = tl.load(x_ptr + t * stride + f, mask=f < F).to(tl.float32)
    up = tl.load(x_ptr + t * stride + F + f, mask=f < F).to(tl.float32)
    tl.store(y_ptr + t * F + f, (gate / (1 + tl.exp(-gate)) * up).to(y_ptr.dtype.element_ty), mask=f < F)
def unsupported(x):
    return None if x.stride(-1) == 1 and x.dim() == 2 else "rows only"
def launch(y, x):
    F = y.shape[-1]
    silu_mul_kernel[(len(x),)](x, y, len(x), F, x.stride(0), BLOCK=triton.next_power_of_2(F))
"""  # noqa: E501


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Puts a module in the place of the Triton kernel of silu_mul, with one piece replaced."""

    def plant(old: str = "", new: str = "") -> None:
        assert old in KERNEL
        path = tmp_path / f"planted_{abs(hash((old, new)))}.py"
        path.write_text(KERNEL.replace(old, new) if old else KERNEL)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setitem(get_op("silu_mul")._simulated, "triton", module)

    return plant


@pytest.mark.parametrize("name", ["triton[interpreted]", "triton[sm_80]", "triton[sm_90]"])
def test_bugs_of_a_kernel_show_in_every_way(planted, name):
    case = next(c for c in cases("silu_mul") if c.name == "bf16-3x127")

    def check():
        with with_way("silu_mul", way(name)) as backend:
            check_op("silu_mul", case.args(), backend)

    planted()
    check()
    assert way(name).name not in get_op("silu_mul").known_backends()
    for old, new in (
        ("1 + tl.exp(-gate)", "1 + tl.exp(gate)"),  # wrong values
        (" + F + f, mask=f < F)", " + F + f)"),  # read past the row: past the tensor in the last
        ("mask=f < F)\ndef", "mask=f < F - 1)\ndef"),  # an element of the output left out
        ("y_ptr + t * F", "y_ptr + t * 0"),  # rows write over each other
        ("mask=f < F)\ndef", "mask=f < F + 1)\ndef"),  # an element past the row
    ):
        planted(old, new)
        with pytest.raises((AssertionError, OutOfBounds, Uninitialised, Race)):
            check()


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setitem(get_op("silu_mul")._simulated, "triton", "no kernel for you")
    with (
        pytest.raises(RuntimeError, match="no kernel for you"),
        with_way("silu_mul", way("triton[sm_80]")),
    ):
        pass


def test_large_cases_are_left_out_of_slow_ways_unless_all_are_asked_for():
    small, large, declared = (
        Case("silu_mul", "a", lambda g: (torch.empty(8),)),
        Case("silu_mul", "b", lambda g: (torch.empty(1 << 21, device="meta"),)),
        Case("silu_mul", "c", lambda g: (torch.empty(8),), declared_work=1 << 21),
    )
    emulation = way("triton[sm_80]")
    taken = [emulation.takes(c, full=False) for c in (small, large, declared)]
    assert taken == [True, False, False]
    assert all(emulation.takes(c, full=True) for c in (small, large, declared))


def test_the_summary_counts_what_ran_and_what_was_left_out(tmp_path):
    """A test session of its own over two cases, one of them made too large for the emulator."""
    (tmp_path / "heavy.py").write_text(
        "import dataclasses\n"
        "from kimi_ops.testing.inputs import CASES\n"
        "cases = CASES['silu_mul']\n"
        "cases['fp32-3x127'] = dataclasses.replace(cases['fp32-3x127'], declared_work=3 << 17)\n"
    )
    tests = str(Path(__file__).parent / "test_silu_mul.py")
    command = [sys.executable, "-m", "pytest", "-p", "heavy", tests, "-k", "fp32-1x1 or fp32-3x127"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout
    assert "triton[interpreted]: 2 passed\n" in result.stdout
    assert "triton[sm_80]: 1 passed; 1 left out for size (--full runs them)" in result.stdout


def test_a_cuda_backend_runs_through_the_launcher(source, monkeypatch):
    """An op's module of CUDA C++, which the package has none of yet, on CPU tensors."""

    def launch(y, gate_up):
        current_launcher().launch(source, "plain", (1,), (64,), [gate_up, y, y.numel()])

    module = types.SimpleNamespace(launch=launch, unsupported=lambda gate_up: None)
    monkeypatch.setitem(get_op("silu_mul")._simulated, "cuda", module)
    for name in ("cuda[sm_80]", "cuda[sm_90]"):
        with with_way("silu_mul", way(name)) as backend, kimi_ops.use_backend(silu_mul=backend):
            y = kimi_ops.silu_mul(torch.ones(4, 16))
        assert y.eq(2).all()
    with emulated(), kimi_ops.use_backend(silu_mul="cuda"):
        assert kimi_ops.silu_mul(torch.ones(4, 16)).eq(2).all()
