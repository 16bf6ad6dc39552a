"""What the compilers make of a kernel, without a GPU: the rung "compiled".

`report_triton` and `report_cuda` compile ahead of time for any of `ARCHES` and count what is in
the binary; the ``assert_*`` functions turn a claim of a design into a test.
"""

from __future__ import annotations

from kimi_ops.testing.devices import ARCHES, Device, device
from kimi_ops.testing.static.cases import (
    CudaCase,
    StaticCase,
    compile_case,
    static_cases_of,
    triton_cases_of,
)
from kimi_ops.testing.static.cuda_source import (
    CudaBinary,
    CudaCompileError,
    Diagnostic,
    compile_cuda,
    compile_ptx,
    report_cuda,
)
from kimi_ops.testing.static.disassembly import DisassemblyError
from kimi_ops.testing.static.gates import (
    assert_avoids,
    assert_no_local_memory,
    assert_no_notes,
    assert_no_spills,
    assert_occupancy,
    assert_registers_at_most,
    assert_shared_memory_fits,
    assert_uses,
    assert_wide_loads,
)
from kimi_ops.testing.static.instructions import Access, Instruction, Mix
from kimi_ops.testing.static.loops import Loop
from kimi_ops.testing.static.occupancy import Occupancy, occupancy
from kimi_ops.testing.static.report import AmdRegisters, KernelReport
from kimi_ops.testing.static.toolchain import MissingToolError, ToolError
from kimi_ops.testing.static.triton_kernel import (
    TritonCompileError,
    compile_triton,
    report_triton,
    signature_of,
)

__all__ = [
    "ARCHES",
    "Access",
    "AmdRegisters",
    "CudaBinary",
    "CudaCase",
    "CudaCompileError",
    "Device",
    "Diagnostic",
    "DisassemblyError",
    "Instruction",
    "KernelReport",
    "Loop",
    "MissingToolError",
    "Mix",
    "Occupancy",
    "StaticCase",
    "ToolError",
    "TritonCompileError",
    "assert_avoids",
    "assert_no_local_memory",
    "assert_no_notes",
    "assert_no_spills",
    "assert_occupancy",
    "assert_registers_at_most",
    "assert_shared_memory_fits",
    "assert_uses",
    "assert_wide_loads",
    "compile_case",
    "compile_cuda",
    "compile_ptx",
    "compile_triton",
    "device",
    "occupancy",
    "report_cuda",
    "report_triton",
    "signature_of",
    "static_cases_of",
    "triton_cases_of",
]
