"""nvcc and NVRTC make the same of a CUDA C++ source: one case of each op, PTX of both executed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch

import kimi_ops
from kimi_ops._backends import has_kernel
from kimi_ops._cuda_sources import OPTIONS
from kimi_ops._dispatch import get_op
from kimi_ops.testing import cases
from kimi_ops.testing.check import as_tuple, bitwise_equal

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
pytest.importorskip("cuda.bindings", reason="needs NVRTC: pip install 'kimi-ops[compile]'")

from kimi_ops.testing import cuda_runner  # noqa: E402
from kimi_ops.testing.runner import emulated  # noqa: E402

ORDINARY = ("moe_sort", "vision_rope")
OPS = [
    pytest.param(op, marks=[] if op in ORDINARY else pytest.mark.full)
    for op in kimi_ops.op_names()
    if has_kernel(op, "cuda")
]
WORK = 1 << 17


def _nvcc(source: Path, arch, *, names, **_):
    """As `kept_ptx`, with nvcc."""
    command = ["nvcc", "-ptx", *OPTIONS, "-lineinfo", f"-arch=compute_{arch}", "-o", "-", source]
    made = subprocess.run(command, check=True, capture_output=True, text=True)
    return made.stdout, {name: name for name in names}


def _run(op, case):
    args, contract = case.args(), get_op(op)
    with emulated(arch=80) as emulation, kimi_ops.use_backend(f"{op}=cuda"):
        outputs = as_tuple(contract.overload(*args))
    written = [args[contract.params.index(name)] for name in contract.mutates]
    return (*outputs, *written), [name for name, _ in emulation.launches]


@pytest.mark.parametrize("op", OPS)
def test_results_are_the_same_bits(op, monkeypatch):
    with emulated(arch=80):  # where the backend takes CPU tensors
        small = [c for c in cases(op) if c.work <= WORK]
        case = max(
            (c for c in small if get_op(op).why_not("cuda", c.args()) is None),
            key=lambda c: c.work,
        )
    monkeypatch.setattr(cuda_runner, "_COMPILED", {})
    expected, launched = _run(op, case)
    assert launched
    monkeypatch.setattr(cuda_runner, "_COMPILED", {})
    with mock.patch.object(cuda_runner, "kept_ptx", side_effect=_nvcc) as compiled:
        found, again = _run(op, case)
    assert compiled.called
    assert again == launched
    for one, other in zip(expected, found, strict=True):
        assert isinstance(one, torch.Tensor)
        assert bitwise_equal(one, other)
