"""CUDA C++ to PTX, cubin and reports with NVRTC: no driver, no toolkit, no GPU.

NVRTC and the headers come from PyPI: ``cuda-bindings``, ``nvidia-cuda-nvrtc``,
``nvidia-cuda-runtime`` and ``nvidia-cuda-cccl``, all of CUDA 13.0. Nothing here is imported before
a source is compiled, so that the package itself needs none of them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from kimi_ops.testing.devices import device
from kimi_ops.testing.static.report import KernelReport, report_cubin
from kimi_ops.testing.static.toolchain import (
    MissingToolError,
    PtxasLog,
    ToolError,
    disassemble,
    read_ptxas_log,
)

REMEDY = (
    "pip install cuda-bindings==13.0.* nvidia-cuda-nvrtc==13.0.* nvidia-cuda-runtime==13.0.* "
    "nvidia-cuda-cccl==13.0.*"
)
# What a folder must hold to be the wheel's include folder.
_HEADERS = {
    "nvidia-cuda-runtime": "include/cuda_fp16.h",
    "nvidia-cuda-cccl": "include/cccl/cuda/std/version",
}
_DIAGNOSTIC = re.compile(
    r"^(?P<file>[^\n(]+)\((?P<line>\d+)\): (?P<severity>error|warning|catastrophic error)"
    r"(?: #[\w-]+)?: (?P<message>.*)$",
    re.M,
)


@dataclass(frozen=True)
class Diagnostic:
    """One error or warning of the CUDA front end: file, line, severity and text."""

    file: str
    line: int
    severity: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.severity}: {self.message}"


class CudaCompileError(ValueError):
    """The source does not compile.

    Attributes:
        diagnostics: what NVRTC said about lines of the source, first to last.
        log: all that it said.
    """

    def __init__(self, arch: str, log: str) -> None:
        self.diagnostics = read_diagnostics(log)
        self.log = log
        errors = [d for d in self.diagnostics if d.severity != "warning"]
        said = "\n".join(map(str, errors)) if errors else log.strip()
        super().__init__(f"CUDA C++ for {arch} does not compile\n{said}")


def read_diagnostics(log: str) -> tuple[Diagnostic, ...]:
    """Errors and warnings with a line number, from NVRTC's log."""
    return tuple(
        Diagnostic(m["file"], int(m["line"]), m["severity"], m["message"])
        for m in _DIAGNOSTIC.finditer(log)
    )


@lru_cache
def _nvrtc() -> Any:
    """The bindings' nvrtc module, with its library loaded."""
    missing = []
    for name in ("cuda-bindings", "nvidia-cuda-nvrtc", *_HEADERS):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise MissingToolError(f"CUDA C++ needs {', '.join(missing)}: {REMEDY}")
    return importlib.import_module("cuda.bindings.nvrtc")


@lru_cache
def include_folders() -> tuple[Path, ...]:
    """Folders of CUDA's headers and of libcu++, inside the installed wheels.

    Raises:
        MissingToolError: a wheel is not installed or has another layout.
    """
    folders = []
    for name, header in _HEADERS.items():
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            raise MissingToolError(f"CUDA C++ needs {name}: {REMEDY}") from None
        found = [f for f in files if f.as_posix().endswith(header)]
        if not found:
            raise MissingToolError(f"the installed {name} has no {header}: {REMEDY}")
        root = str(found[0].locate())
        parts = 1 if name == "nvidia-cuda-runtime" else 3
        folders.append(Path(root).resolve().parents[parts - 1])
    return tuple(folders)


@dataclass(frozen=True)
class CudaBinary:
    """What NVRTC made of one source for one architecture.

    Attributes:
        arch: as in `kimi_ops.testing.devices`.
        ptx, cubin: both of the same compilation.
        log: of ptxas inside NVRTC.
        warnings: of the front end.
        names: C++ name expression (``kernel<128>``) to name in the binary.
    """

    arch: str
    ptx: str
    cubin: bytes
    log: PtxasLog
    warnings: tuple[Diagnostic, ...]
    names: Mapping[str, str]


def _call(function: Any, *arguments: Any) -> Any:
    """One call of NVRTC's C API; raises ToolError with the status unless it is success."""
    status, *values = function(*arguments)
    if int(status) != 0:
        raise ToolError(f"{function.__name__}: {status.name}")
    return values[0] if values else None


def ptx_compiler() -> str:
    """Name and version of what makes PTX here; `MissingToolError` where there is nothing."""
    _nvrtc()
    return f"NVRTC {importlib.metadata.version('nvidia-cuda-nvrtc')}"


def _text(nvrtc: Any, program: Any, what: str) -> bytes:
    buffer = bytearray(_call(getattr(nvrtc, f"nvrtcGet{what}Size"), program))
    _call(getattr(nvrtc, f"nvrtcGet{what}"), program, buffer)
    return bytes(buffer)


def _nvidia(arch: str | int) -> str:
    """The architecture's name; raises ValueError for one that is not NVIDIA's."""
    target = device(arch)
    if target.capability is None:
        raise ValueError(f"CUDA C++ cannot be compiled for {target.arch}")
    return target.arch


def _compiled(
    source: str | Path,
    arch: str,
    wanted: Sequence[str],
    *,
    name: str | None,
    names: Sequence[str],
    defines: Mapping[str, str | int] | None,
    options: Sequence[str],
    include: Sequence[Path],
) -> tuple[list[bytes], dict[str, str], str]:
    """What is wanted of a compilation ("PTX", "CUBIN"), lowered names, and the log."""
    nvrtc = _nvrtc()
    folders = [*include, *include_folders()]
    if isinstance(source, Path):
        folders.insert(0, source.resolve().parent)
        name = name or str(source)
        source = source.read_text()
    # PTX is the same for the virtual architecture, for which ptxas does not run.
    target = arch if "CUBIN" in wanted else arch.replace("sm_", "compute_")
    flags = [
        f"--gpu-architecture={target}",
        "--std=c++17",
        "-lineinfo",
        *(f"-I{folder}" for folder in folders),
        *(f"-D{macro}={value}" for macro, value in (defines or {}).items()),
        *options,
    ]
    program = _call(
        nvrtc.nvrtcCreateProgram, source.encode(), (name or "kernel.cu").encode(), 0, [], []
    )
    try:
        for expression in names:
            _call(nvrtc.nvrtcAddNameExpression, program, expression.encode())
        status = nvrtc.nvrtcCompileProgram(program, len(flags), [f.encode() for f in flags])[0]
        log = _text(nvrtc, program, "ProgramLog").decode().replace("\0", "")
        if int(status) != 0:
            raise CudaCompileError(arch, log or status.name)
        lowered = {
            expression: _call(nvrtc.nvrtcGetLoweredName, program, expression.encode()).decode()
            for expression in names
        }
        return [_text(nvrtc, program, what) for what in wanted], lowered, log
    finally:
        _call(nvrtc.nvrtcDestroyProgram, program)


def compile_cuda(
    source: str | Path,
    arch: str | int,
    *,
    name: str | None = None,
    names: Sequence[str] = (),
    defines: Mapping[str, str | int] | None = None,
    options: Sequence[str] = (),
    include: Sequence[Path] = (),
) -> CudaBinary:
    """Compiles CUDA C++ device code for one real architecture.

    Args:
        source: a path, or the text itself.
        arch: as for `kimi_ops.testing.devices.device`; CUDA only.
        name: of the file in messages; the path by default.
        names: C++ name expressions of template instances to compile.
        defines: macros.
        options: more options of NVRTC.
        include: folders searched before CUDA's; the source's own folder is always first.

    Raises:
        MissingToolError: a wheel is missing; the message says how to install it.
        CudaCompileError: with file, line and message of each error.
        ValueError: the architecture is not one of NVIDIA's, or unknown.
    """
    arch = _nvidia(arch)
    (ptx, cubin), lowered, log = _compiled(
        source,
        arch,
        ("PTX", "CUBIN"),
        name=name,
        names=names,
        defines=defines,
        options=["--ptxas-options=-v", *options],
        include=include,
    )
    warnings = tuple(d for d in read_diagnostics(log) if d.severity == "warning")
    text = ptx.decode().replace("\0", "")
    return CudaBinary(arch, text, cubin, read_ptxas_log(log), warnings, lowered)


def compile_ptx(
    source: str | Path,
    arch: str | int,
    *,
    names: Sequence[str] = (),
    defines: Mapping[str, str | int] | None = None,
    options: Sequence[str] = (),
    include: Sequence[Path] = (),
) -> tuple[str, dict[str, str]]:
    """The PTX of `compile_cuda`, and the names in it, in half the time: ptxas does not run.

    Arguments and errors as those of `compile_cuda`.
    """
    (ptx,), lowered, _ = _compiled(
        source,
        _nvidia(arch),
        ("PTX",),
        name=None,
        names=names,
        defines=defines,
        options=options,
        include=include,
    )
    return ptx.decode().replace("\0", ""), lowered


def report_cuda(
    source: str | Path,
    arch: str | int,
    *,
    case: str | None = None,
    kernel: str | None = None,
    threads_per_block: int | None = None,
    dynamic_shared_bytes: int = 0,
    defines: Mapping[str, str | int] | None = None,
    options: Sequence[str] = (),
    include: Sequence[Path] = (),
) -> dict[str, KernelReport]:
    """Compiles CUDA C++ and reports on its kernels.

    Args:
        source, arch, defines, options, include: as for `compile_cuda`.
        case: name for the report.
        kernel: name, C++ name expression (``kernel<128>``) or mangled name of the only kernel
            wanted; all kernels of the source by default, which leaves out uninstantiated
            templates.
        threads_per_block: of the launch; by default what ``__launch_bounds__`` allows.
        dynamic_shared_bytes: of the launch.

    Returns:
        Reports by kernel name, or by ``kernel`` as it was given.

    Raises:
        ValueError: no kernel of that name, and as `compile_cuda`.
    """
    # A mangled name is no C++ expression; anything else is, extern "C" names included.
    expressions = [kernel] if kernel and not kernel.startswith("_Z") else []
    binary = compile_cuda(
        source, arch, names=expressions, defines=defines, options=options, include=include
    )
    known = list(binary.log.kernels)
    wanted = {kernel: binary.names.get(kernel, kernel)} if kernel else {n: n for n in known}
    if absent := [name for name in wanted.values() if name not in known]:
        raise ValueError(f"the source has no kernel {absent[0]}; there are {', '.join(known)}")
    sass = disassemble(binary.cubin)
    said = tuple(map(str, binary.warnings))
    return {
        name: report_cubin(
            lowered,
            case=case or name,
            language="cuda",
            device=device(arch),
            cubin=binary.cubin,
            ptx=binary.ptx,
            log=binary.log,
            sass=sass,
            threads_per_block=threads_per_block,
            dynamic_shared_bytes=dynamic_shared_bytes,
            notes=said,
        )
        for name, lowered in wanted.items()
    }
