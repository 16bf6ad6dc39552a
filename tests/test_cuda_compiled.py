"""Every CUDA C++ kernel, compiled ahead of time: no spills, no stack, no local memory. An ordinary
run takes one architecture, ``--full`` every one that a fatbin is made for."""

from __future__ import annotations

import pytest

from kimi_ops._cuda_sources import ARCHITECTURES
from kimi_ops.cuda._launcher import SOURCES
from kimi_ops.testing.static.cuda_source import compile_cuda

_ORDINARY = "sm_90a"


@pytest.mark.parametrize(
    "arch",
    [
        _ORDINARY,
        *(pytest.param(a, marks=pytest.mark.full) for a in ARCHITECTURES if a != _ORDINARY),
    ],
)
@pytest.mark.parametrize("stem", sorted(path.stem for path in SOURCES.glob("*.cu")))
def test_no_kernel_leaves_its_registers(stem, arch):
    kernels = compile_cuda(SOURCES / f"{stem}.cu", arch).log.kernels
    assert kernels
    for name, used in kernels.items():
        assert name.startswith(f"{stem}_"), f"{name} is not named after its file"
        assert used.stack_bytes == 0, name
        assert max(used.spill_store_bytes, used.spill_load_bytes) == 0, name
        assert used.registers <= 255
        assert not used.warnings, used.warnings
