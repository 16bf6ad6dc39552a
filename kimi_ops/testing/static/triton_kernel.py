"""Triton kernels ahead of time, for any architecture, without a driver or a GPU.

Triton 3.4 is the oldest; `docs/triton-versions.md` says with which versions what was compiled.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kimi_ops.testing.devices import device
from kimi_ops.testing.static.amdgcn import report_amdgcn
from kimi_ops.testing.static.report import KernelReport, report_cubin
from kimi_ops.testing.static.toolchain import MissingToolError, read_ptxas_log, triton_tool

_TORCH_TYPES = {
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.uint16: "u16",
    torch.int32: "i32",
    torch.uint32: "u32",
    torch.int64: "i64",
    torch.uint64: "u64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}


class TritonCompileError(RuntimeError):
    """Triton, LLVM or ptxas refused a kernel; the message says which and why."""


def triton_module() -> Any:
    """Triton; raises `MissingToolError` where it is not installed."""
    if importlib.util.find_spec("triton") is None:
        raise MissingToolError("triton is not installed: pip install triton")
    return importlib.import_module("triton")


def _parameters(kernel: Any) -> list[Any]:
    """The kernel's parameters; raises TypeError for what is no JIT function."""
    if not hasattr(kernel, "params") or not hasattr(kernel, "arg_names"):
        raise TypeError(f"not a Triton kernel: {kernel!r} (a function under @triton.jit is meant)")
    if type(kernel).__name__ not in ("JITFunction", "GluonJITFunction"):
        raise TypeError(
            f"{kernel!r} is a {type(kernel).__name__}: a function under @triton.jit is meant, "
            "decorated while TRITON_INTERPRET is not set"
        )
    return list(kernel.params)


def signature_of(
    kernel: Any, arguments: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Signature and constants that a launch with these arguments would be compiled for.

    Args:
        kernel: Triton kernel.
        arguments: by parameter. A tensor, on any device including meta, counts as aligned if its
            address (its offset, where it has no address) is a multiple of 16 bytes; int, float,
            bool and None are as in a launch.

    Returns:
        (signature, constexprs) for `compile_triton`; parameters with a default may be left out.

    Raises:
        TypeError: an argument that is missing, unknown or of an unsupported type.
    """
    parameters = {p.name: p for p in _parameters(kernel)}
    if unknown := [name for name in arguments if name not in parameters]:
        raise TypeError(f"{kernel.__name__} has no parameter {unknown[0]!r}")
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if name not in arguments and not parameter.has_default:
            raise TypeError(f"{kernel.__name__}: no value for {name!r}")
        value = arguments.get(name, parameter.default if parameter.has_default else None)
        if parameter.is_constexpr or value is None:
            constants[name] = value
        else:
            signature[name] = _specialised(kernel, parameter, value)
    return signature, constants


def _specialised(kernel: Any, parameter: Any, value: Any) -> str:
    aligned = not parameter.do_not_specialize and not parameter.do_not_specialize_on_alignment
    if isinstance(value, torch.Tensor):
        meta = value.device.type == "meta"
        address = int(value.storage_offset() * value.element_size()) if meta else value.data_ptr()
        const = "k" if parameter.is_const else ""
        type_ = f"*{const}{_TORCH_TYPES[value.dtype]}"
        return f"{type_}:16" if aligned and address % 16 == 0 else type_
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        if value == 1 and not parameter.do_not_specialize:
            return "i32:1"
        type_ = "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
        return f"{type_}:16" if aligned and value % 16 == 0 else type_
    if isinstance(value, float):
        return "fp32"
    raise TypeError(
        f"{kernel.__name__}: {parameter.name!r} is a {type(value).__name__}, which has no type here"
    )


def _source(kernel: Any, signature: Mapping[str, str], constexprs: Mapping[str, Any]) -> Any:
    """Triton's own form of a kernel, its types and its constants."""
    types: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    names = [p.name for p in _parameters(kernel)]
    if unknown := [n for n in (*signature, *constexprs) if n not in names]:
        raise ValueError(f"{kernel.__name__} has no parameter {unknown[0]!r}")
    for place, name in enumerate(names):
        if (name in signature) == (name in constexprs):
            raise ValueError(
                f"{kernel.__name__}: parameter {name!r} must be either in the signature or "
                "among the constexprs"
            )
        if name in constexprs:
            types[name] = "constexpr"
            constants[(place,)] = constexprs[name]
            continue
        types[name], _, special = signature[name].partition(":")
        if special == "1":
            types[name] = "constexpr"
            constants[(place,)] = 1
        elif special == "16":
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif special:
            raise ValueError(
                f"{kernel.__name__}: {name}: {signature[name]!r} must end in :16 or :1"
            )
    source_of = importlib.import_module("triton.compiler").ASTSource
    if kernel.is_gluon():
        source_of = importlib.import_module("triton.experimental.gluon._runtime").GluonASTSource
    return source_of(fn=kernel, signature=types, constexprs=constants, attrs=attributes)


def compile_triton(
    kernel: Any,
    arch: str | int,
    *,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any] | None = None,
    num_warps: int = 4,
    num_stages: int = 3,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Compiles a Triton kernel for an architecture that need not be here.

    Args:
        kernel: function under ``@triton.jit``.
        arch: as for `kimi_ops.testing.devices.device`.
        signature: Triton type by parameter: ``*bf16``, ``i32``, ``fp32``; with ``:16`` for a
            pointer or integer known to be a multiple of 16, ``:1`` for an integer known to be 1,
            as the launcher would find them.
        constexprs: values of the ``tl.constexpr`` parameters, and None for absent pointers.
        num_warps, num_stages: of the launch.
        options: more launch options: ``num_ctas``, ``maxnreg``, ``enable_fp_fusion``, ...

    Returns:
        Triton's compiled kernel, with ``asm`` and ``metadata``.

    Raises:
        MissingToolError: Triton is not installed.
        TritonCompileError: with what the compiler said.
        ValueError, TypeError: a parameter without type or value, or not a Triton kernel.
    """
    triton = triton_module()
    target = device(arch)
    described = importlib.import_module("triton.backends.compiler").GPUTarget(
        *(("hip", target.arch) if target.capability is None else ("cuda", target.capability)),
        target.warp_size,
    )
    launch = {"num_warps": num_warps, "num_stages": num_stages, **(options or {})}
    source = _source(kernel, signature, constexprs or {})
    errors = importlib.import_module("triton.errors")
    try:
        return triton.compile(source, target=described, options=launch)
    except (errors.TritonError, RuntimeError) as error:  # RuntimeError: of the passes, in C++
        kind = type(error).__name__
        raise TritonCompileError(f"{kernel.__name__} for {target.arch}: {kind}: {error}") from error


# Runs ptxas and keeps what it says.
_LOGGING_PTXAS = """#!/bin/sh
"{ptxas}" "$@" 2>>"{log}"
status=$?
[ $status = 0 ] || cat "{log}" >&2
exit $status
"""
# In place of ROCm's linker, which no wheel brings: only the assembly is read, so nothing is lost.
_STAND_IN_LINKER = """#!/bin/sh
[ "$1" = --version ] || cp "$4" "$6"
"""


def _script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def _prints_log(knobs: Any) -> bool:
    return hasattr(knobs.nvidia, "dump_ptxas_log")


def _compile_with_log(kernel: Any, arch: str | int, **how: Any) -> tuple[Any, str]:
    """A compiled kernel, and what ptxas said about it.

    Triton prints ptxas's log when it compiles and does not keep it, so this compiles afresh, past
    Triton's cache. Assembling its PTX a second time would be no substitute: ptxas 13.1 was seen to
    choose registers differently from run to run, so the log would be of another cubin. Triton 3.4
    does not print the log either, so there a script of ours runs ptxas.
    """
    knobs = importlib.import_module("triton.knobs")
    prints_log = _prints_log(knobs)
    said = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        knobs.nvidia.scope(),
        knobs.amd.scope(),
        knobs.cache.scope(),
        contextlib.redirect_stdout(said),
    ):
        log = Path(folder, "ptxas.log")
        knobs.cache.dir = folder
        if prints_log:
            knobs.nvidia.dump_ptxas_log = True
        else:
            text = _LOGGING_PTXAS.format(ptxas=triton_tool("ptxas"), log=log)
            knobs.nvidia.ptxas = _script(Path(folder, "ptxas"), text)
        if hasattr(knobs.amd, "lld_path"):
            knobs.amd.lld_path = _script(Path(folder, "ld.lld"), _STAND_IN_LINKER)
        compiled = compile_triton(kernel, arch, **how)
        if not prints_log and log.exists():
            said.write(log.read_text())
    return compiled, said.getvalue()


def report_triton(
    kernel: Any,
    arch: str | int,
    *,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any] | None = None,
    num_warps: int = 4,
    num_stages: int = 3,
    options: Mapping[str, Any] | None = None,
    case: str | None = None,
) -> KernelReport:
    """Compiles a Triton kernel and reports on it; arguments as for `compile_triton`.

    Args:
        case: name for the report.

    Raises:
        ToolError: the tools contradict each other; and as `compile_triton`.
    """
    target = device(arch)
    compiled, log = _compile_with_log(
        kernel,
        arch,
        signature=signature,
        constexprs=constexprs,
        num_warps=num_warps,
        num_stages=num_stages,
        options=options,
    )
    name: str = compiled.metadata.name
    keep = {n: compiled.asm[n] for n in ("ttir", "ttgir", "llir") if n in compiled.asm}
    if target.capability is None:
        return report_amdgcn(
            name,
            case=case or name,
            device=target,
            assembly=compiled.asm["amdgcn"],
            threads_per_block=compiled.metadata.num_warps * target.warp_size,
            dynamic_shared_bytes=compiled.metadata.shared,
            artifacts=keep,
        )
    return report_cubin(
        name,
        case=case or name,
        language="triton",
        device=target,
        cubin=compiled.asm["cubin"],
        ptx=compiled.asm["ptx"],
        log=read_ptxas_log(log),
        dynamic_shared_bytes=compiled.metadata.shared,
        tensor_memory_columns=getattr(compiled.metadata, "tmem_size", 0) or 0,
        artifacts=keep,
    )
