"""Runs Triton kernels as PTX on CPU tensors, without a driver.

`run_triton` compiles a ``@triton.jit`` kernel ahead of time, with the specialisation that Triton's
launcher would choose for the arguments, and executes the PTX in the emulator; `run_cuda` does the
same with CUDA C++. `emulated` does so for every launch of either in a block, so that an op's own
``launch`` runs end to end.

Source: Triton 3.4 to 3.9, specialisation of arguments (divisibility by 16, equality to 1).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from kimi_ops import _native
from kimi_ops._backends import simulated
from kimi_ops._target import Target, is_named, targeting
from kimi_ops.cuda._launcher import use_launcher
from kimi_ops.testing.cuda_runner import EmulatedLauncher, compile_kernel, parsed, run_cuda
from kimi_ops.testing.devices import device
from kimi_ops.testing.ptx import Checks, Kernel, LaunchError, Report
from kimi_ops.testing.ptx.written import Written

__all__ = [
    "Compiled",
    "Emulation",
    "Specialisation",
    "compile_kernel",
    "compile_triton",
    "emulated",
    "run_cuda",
    "run_triton",
    "specialise",
    "target_of",
]

_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.uint16: "*u16",
    torch.uint32: "*u32",
    torch.uint64: "*u64",
    torch.bool: "*u1",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
}
# How the launcher hands over scalars of a signature type.
_SCALARS = {
    "i1": "<?", "u1": "<?", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q",
    "u8": "<B", "u16": "<H", "u32": "<I", "u64": "<Q", "fp32": "<f", "fp64": "<d",
}  # fmt: skip
_ALIGNMENT = 16
# SMs of A100, A10, L4, H100 (SXM), B200, RTX 5090.
_MULTIPROCESSORS = {
    "sm_80": 108, "sm_86": 72, "sm_89": 58, "sm_90": 132, "sm_100": 148, "sm_120": 170
}  # fmt: skip


@dataclass(frozen=True)
class Specialisation:
    """What the launcher tells the compiler about one call.

    Attributes:
        signature: argument -> type ("*bf16", "i32", ...) or "constexpr".
        constants: argument -> value, of those compiled in.
        divisible: arguments known to be multiples of 16 (bytes for pointers).
    """

    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]


def _integer_type(value: int) -> str:
    if -(1 << 31) <= value < 1 << 31:
        return "i32"
    return "u64" if value >= 1 << 63 else "i64"


def specialise(kernel: Any, arguments: Mapping[str, Any]) -> Specialisation:
    """The specialisation for a call.

    Args:
        kernel: a ``@triton.jit`` function.
        arguments: all its arguments by name.

    Raises:
        LaunchError: an argument of a type that Triton does not take.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible: list[str] = []
    for param in kernel.params:
        name, value = param.name, arguments[param.name]
        if param.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
            continue
        free = param.do_not_specialize
        aligned = not (free or param.do_not_specialize_on_alignment)
        if isinstance(value, torch.Tensor):
            if value.dtype not in _POINTERS:
                raise LaunchError(f"argument {name}: tensors of {value.dtype}")
            signature[name] = _POINTERS[value.dtype]
            # A CUDA allocation starts at a multiple of 256: only the offset counts.
            multiple = int(value.storage_offset()) * value.element_size() % _ALIGNMENT == 0
        elif isinstance(value, bool):
            signature[name], multiple = param.annotation_type or "u1", False
        elif isinstance(value, int):
            if value == 1 and not free and not param.annotation_type:
                signature[name], constants[name] = "constexpr", 1
                continue
            signature[name] = param.annotation_type or _integer_type(value)
            multiple = value % _ALIGNMENT == 0
        elif isinstance(value, float):
            signature[name], multiple = param.annotation_type or "fp32", False
        else:
            raise LaunchError(f"argument {name}: {type(value).__name__}")
        if multiple and aligned:
            divisible.append(name)
    return Specialisation(signature, constants, tuple(divisible))


@dataclass(frozen=True)
class Compiled:
    """A Triton kernel compiled for one specialisation.

    Attributes:
        kernel: ready to launch.
        ptx: its text.
        shared_bytes: dynamic shared memory that it needs.
        threads: per CTA.
        scratch_bytes: global scratch memory per CTA.
        cooperative: launched so that all CTAs are resident at once.
        specialisation: what it is compiled for.
    """

    kernel: Kernel
    ptx: str
    shared_bytes: int
    threads: int
    scratch_bytes: int
    cooperative: bool
    specialisation: Specialisation


def compile_triton(
    kernel: Any, arguments: Mapping[str, Any], *, arch: int = 80, **options: Any
) -> Compiled:
    """Compiles a ``@triton.jit`` or ``@gluon.jit`` kernel for a call, without driver and GPU.

    Args:
        kernel: the function.
        arguments: all its arguments by name; tensors on the CPU.
        arch: 80 for sm_80, and so on.
        options: of the compiler: ``num_warps``, ``num_stages``, ...

    Raises:
        LaunchError: an interpreted kernel, an unsupported argument, clusters.
    """
    triton = importlib.import_module("triton")
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", arch, 32)
    if not isinstance(kernel, triton.runtime.jit.JITFunction):
        raise LaunchError(f"{kernel!r} is no compiled kernel; TRITON_INTERPRET must be unset")
    special = specialise(kernel, arguments)
    position = {param.name: (number,) for number, param in enumerate(kernel.params)}
    source_of = compiler.ASTSource
    if kernel.is_gluon():
        gluon = importlib.import_module("triton.experimental.gluon._runtime")
        source_of = gluon.GluonASTSource
    source = source_of(
        fn=kernel,
        signature=special.signature,
        constexprs={position[name]: value for name, value in special.constants.items()},
        attrs={position[name]: [["tt.divisibility", _ALIGNMENT]] for name in special.divisible},
    )
    compiled = triton.compile(source, target=target, options=options)
    metadata = compiled.metadata
    if getattr(metadata, "num_ctas", 1) != 1:
        raise LaunchError("clusters of CTAs are not supported")
    if getattr(metadata, "profile_scratch_size", 0):
        raise LaunchError("profiling scratch memory is not supported")
    ptx = compiled.asm["ptx"]
    return Compiled(
        parsed(ptx, metadata.name),
        ptx,
        metadata.shared,
        metadata.num_warps * 32,
        getattr(metadata, "global_scratch_size", 0),
        bool(getattr(metadata, "launch_cooperative_grid", False)),
        special,
    )


def _bound(kernel: Any, args: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, defaults filled in."""
    names = [param.name for param in kernel.params]
    arguments = {p.name: p.default for p in kernel.params if p.has_default}
    if len(args) > len(names):
        raise LaunchError(f"{kernel.__name__} takes {len(names)} arguments, got {len(args)}")
    arguments |= dict(zip(names, args, strict=False))
    arguments |= {name: value for name, value in named.items() if name in names}
    if missing := [name for name in names if name not in arguments]:
        raise LaunchError(f"{kernel.__name__}: no value for {', '.join(missing)}")
    return arguments


def run_triton(
    kernel: Any,
    grid: Sequence[int] | Callable[[dict[str, Any]], Sequence[int]],
    *args: Any,
    arch: int = 80,
    uninitialised: Sequence[torch.Tensor] = (),
    written: Written | None = None,
    checks: Checks | None = None,
    seed: int | None = None,
    **named: Any,
) -> Report:
    """Compiles and runs ``kernel[grid](*args, **named)`` in the emulator, in place.

    Args:
        kernel: a ``@triton.jit`` function.
        grid: one to three sizes, or a function of the arguments that gives them.
        args, named: arguments and compiler options, as for a launch; tensors on the CPU.
        arch: 80 for sm_80, and so on.
        uninitialised, written, checks, seed: as `Kernel.launch` takes them.

    Raises:
        LaunchError: what cannot be launched.
        PtxError: what a check found.
    """
    arguments = _bound(kernel, args, named)
    options = {name: value for name, value in named.items() if name not in arguments}
    compiled = compile_triton(kernel, arguments, arch=arch, **options)
    sizes = grid(arguments) if callable(grid) else grid
    values: list[Any] = []
    for name, kind in compiled.specialisation.signature.items():
        if kind != "constexpr":
            value = arguments[name]
            tensor = isinstance(value, torch.Tensor)
            values.append(value if tensor else struct.pack(_SCALARS[kind], value))
    scratch: torch.Tensor | int = 0
    if compiled.scratch_bytes:
        count = compiled.scratch_bytes
        for size in sizes:
            count *= int(size)
        scratch = torch.zeros(count, dtype=torch.int8)
    extra = len(compiled.kernel.program.params) - len(values)
    values += [scratch, 0][:extra]
    for number, (param, value) in enumerate(
        zip(compiled.kernel.program.params, values, strict=True)
    ):
        # The launcher widens what is narrower than a parameter, such as a bool.
        if isinstance(value, bytes):
            values[number] = value.ljust(param.size, b"\0")
    return compiled.kernel.launch(
        sizes,
        (compiled.threads,),
        values,
        dynamic_shared_bytes=compiled.shared_bytes,
        cooperative=compiled.cooperative,
        uninitialised=uninitialised,
        written=written,
        checks=checks,
        seed=seed,
    )


def target_of(arch: int) -> Target:
    """The GPU that kernels executed for an architecture are told they run on: a product with it."""
    name = f"sm_{arch}"
    return Target("cuda", arch, _MULTIPROCESSORS[name], device(name).shared_per_block_bytes)


@dataclass
class Emulation:
    """What ran in an `emulated` block: (kernel name, report), in order."""

    launches: list[tuple[str, Report]] = field(default_factory=list)


@contextlib.contextmanager
def _workspaces(written: Written) -> Iterator[None]:
    """What torch allocates without content in the block must be written before it is read."""

    def declaring(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocated(*args: Any, **named: Any) -> torch.Tensor:
            # An inference tensor has no version by which to see what torch itself writes to it.
            with torch.inference_mode(False):
                tensor = allocate(*args, **named)
            written.declare(tensor)
            return tensor

        return allocated

    with contextlib.ExitStack() as stack:
        for owner, names in (
            (torch, ("empty", "empty_like", "empty_strided")),
            (torch.Tensor, ("new_empty", "new_empty_strided")),
        ):
            for name in names:
                patched = declaring(getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, patched))
        yield


@contextlib.contextmanager
def emulated(
    *,
    arch: int = 80,
    uninitialised: Sequence[torch.Tensor] = (),
    checks: Checks | None = None,
    seed: int | None = None,
) -> Iterator[Emulation]:
    """Sends every launch in a ``with`` block to the emulator; not for several threads.

    Launches of Triton kernels and, through `kimi_ops.cuda._launcher`, of CUDA C++; in the block
    the backends ``triton`` and ``cuda`` of every op take CPU tensors. What ``torch.empty`` and its
    family allocate in the block holds nothing until a launch, or torch in place, has written it.
    Unless a block around this one names another GPU, kernels are told that they run on one of the
    architecture (`target_of`).

    Args:
        arch, checks, seed: as for `run_triton`.
        uninitialised: tensors that hold nothing at the start, and every element at the end.

    Raises:
        PtxError: what a check found; `Uninitialised` at the end of the block.
    """
    emulation, written = Emulation(), Written()
    for tensor in uninitialised:
        written.declare(tensor)

    def done(name: str, report: Report) -> None:
        emulation.launches.append((name, report))

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> Report:
        if warmup:
            raise LaunchError("a warm-up has nothing to run in the emulator")
        report = run_triton(
            kernel, grid, *args, arch=arch, written=written, checks=checks, seed=seed, **named
        )
        done(kernel.__name__, report)
        return report

    launcher = EmulatedLauncher(arch, checks, seed, written, done)
    with contextlib.ExitStack() as stack:
        if importlib.util.find_spec("triton") is not None:
            jit = importlib.import_module("triton").runtime.jit
            stack.enter_context(mock.patch.object(jit.JITFunction, "run", run))
        if not is_named():
            stack.enter_context(targeting(target_of(arch)))
        stack.enter_context(use_launcher(launcher))
        stack.enter_context(simulated("triton", "cuda"))
        stack.enter_context(_workspaces(written))
        stack.enter_context(_native.watching(written.wrote))
        yield emulation
    written.require(uninitialised)
