"""What of each op is to be compiled: cases that kernel modules declare.

A Triton module (`kimi_ops.kernels.<op>`) or a launcher of CUDA C++ (`kimi_ops.cuda.<op>`) may have
a function ``static_cases() -> Iterable[StaticCase | CudaCase]``. It must be importable and callable
without a GPU and without CuPy. A CUDA source whose launcher declares nothing is compiled as it is,
all its kernels; a Triton module that declares nothing is an error, since its types are not known.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kimi_ops._dispatch import op_names
from kimi_ops.testing.devices import ARCHES, device
from kimi_ops.testing.static.cuda_source import compile_ptx, report_cuda
from kimi_ops.testing.static.report import KernelReport
from kimi_ops.testing.static.triton_kernel import report_triton, signature_of

_CUDA_ARCHES = tuple(arch for arch in ARCHES if device(arch).capability is not None)


@dataclass(frozen=True)
class StaticCase:
    """One Triton kernel with the types and constants of one use.

    Attributes:
        name: unique within the op, ``decode_64_heads``.
        kernel: function under ``@triton.jit``.
        signature: Triton type by parameter, as for `compile_triton`: ``*bf16:16``, ``i32:1``.
        constexprs: values of the ``tl.constexpr`` parameters.
        num_warps, num_stages, options: of the launch.
        arches: those the case is for.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    arches: Sequence[str] = ARCHES

    @staticmethod
    def of_call(name: str, kernel: Any, arguments: Mapping[str, Any], **launch: Any) -> StaticCase:
        """The case that a launch with these arguments would compile.

        Args:
            name, kernel: as above.
            arguments: tensors (meta ones will do), numbers and constants by parameter.
            launch: ``num_warps``, ``num_stages``, ``options``, ``arches``.
        """
        signature, constexprs = signature_of(kernel, arguments)
        return StaticCase(name, kernel, signature, constexprs, **launch)


@dataclass(frozen=True)
class CudaCase:
    """One kernel of a CUDA C++ source.

    Attributes:
        name: unique within the op.
        source: path of the source, or its text.
        kernel: name, or name expression of a template instance, ``kernel<128>``.
        threads_per_block, dynamic_shared_bytes: of the launch.
        defines, options: for NVRTC.
        arches: those the case is for.
    """

    name: str
    source: Path | str
    kernel: str
    threads_per_block: int | None = None
    dynamic_shared_bytes: int = 0
    defines: Mapping[str, str | int] = field(default_factory=dict)
    options: Sequence[str] = ()
    arches: Sequence[str] = _CUDA_ARCHES


def compile_case(case: StaticCase | CudaCase, arch: str | int) -> KernelReport:
    """The report of one case for one architecture; errors as those of the compilers."""
    if isinstance(case, StaticCase):
        return report_triton(
            case.kernel,
            arch,
            signature=case.signature,
            constexprs=case.constexprs,
            num_warps=case.num_warps,
            num_stages=case.num_stages,
            options=case.options,
            case=case.name,
        )
    reports = report_cuda(
        case.source,
        arch,
        case=case.name,
        kernel=case.kernel,
        threads_per_block=case.threads_per_block,
        dynamic_shared_bytes=case.dynamic_shared_bytes,
        defines=case.defines,
        options=case.options,
    )
    return reports[case.kernel]


def _declared(module_name: str) -> list[StaticCase | CudaCase] | None:
    """Cases of a module; None if there is no such module or it declares none."""
    if importlib.util.find_spec(module_name) is None:
        return None
    module = importlib.import_module(module_name)
    declare = getattr(module, "static_cases", None)
    if declare is None:
        return None
    cases: Iterable[StaticCase | CudaCase] = declare()
    found = list(cases)
    names = [case.name for case in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{module_name}.static_cases: two cases are named {twice[0]!r}")
    return found


def cuda_source_of(op: str) -> Path | None:
    """Path of an op's CUDA C++ source, or None if it has none."""
    package = importlib.import_module("kimi_ops.csrc")
    assert package.__file__ is not None
    path = Path(package.__file__).parent / "cuda" / f"{op}.cu"
    return path if path.is_file() else None


def triton_cases_of(op: str) -> list[StaticCase | CudaCase]:
    """The cases of an op's Triton module; errors as `static_cases_of`."""
    if op not in op_names():
        raise ValueError(f"unknown op {op!r}; there are {', '.join(op_names())}")
    module = f"kimi_ops.kernels.{op}"
    if importlib.util.find_spec(module) is None:
        return []
    cases = _declared(module)
    if cases is None:
        raise ValueError(f"{module} has no static_cases(): nothing says what to compile")
    return cases


def static_cases_of(op: str) -> list[StaticCase | CudaCase]:
    """All cases of one op, Triton's first.

    Raises:
        ValueError: an unknown op, a case name used twice, or a Triton module without cases.
    """
    found = triton_cases_of(op)
    cases = _declared(f"kimi_ops.cuda.{op}")
    source = cuda_source_of(op)
    if cases is None and source is not None:
        # Which kernels there are shows when the source is compiled: any architecture will do.
        ptx, _ = compile_ptx(source, _CUDA_ARCHES[0])
        kernels = re.findall(r"\.entry (\w+)", ptx)
        cases = [CudaCase(name=name, source=source, kernel=name) for name in kernels]
    return found + (cases or [])
