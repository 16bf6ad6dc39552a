"""Loads the CPU library (`csrc/`, a plain C ABI) through ctypes and calls its ops.

The library belongs to no torch version: it is built by CMake at installation (`setup.py`) and
placed in `kimi_ops/_lib/`. An installation without a compiler has none, and says so here. What its
ops take is read from `csrc/kimi.h`, the one place that states it.

Each op is there once per instruction set. The best one that the host runs is taken;
``KIMI_OPS_CPU_ISA`` asks for a lower one. Threads are torch's: as many as `torch.get_num_threads`,
from the very pool that torch's own ops use, by way of the OpenMP library that torch has loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kimi_ops._strided_rows import Rows

LIBRARY = Path(__file__).parent / "_lib" / "libkimi_ops_cpu.so"
HEADER = Path(import_module("kimi_ops.csrc").__path__[0]) / "kimi.h"
ABI_VERSION = 2  # of csrc/kimi.h; raised with every incompatible change there
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # KIMI_BF16, KIMI_F16, KIMI_F32
_NO_MEMORY = 1  # KIMI_NO_MEMORY

_FORCED: ContextVar[str | None] = ContextVar("kimi_ops_cpu_isa", default=None)


def _path() -> Path:
    """``KIMI_OPS_CPU_LIBRARY``, or where the installation puts the library."""
    wish = os.environ.get("KIMI_OPS_CPU_LIBRARY", "")
    if wish and not Path(wish).is_file():
        raise ValueError(f"KIMI_OPS_CPU_LIBRARY: there is no file {wish}")
    return Path(wish) if wish else LIBRARY


@functools.cache
def missing() -> str | None:
    """Why there is no CPU library, and how to get it; None if it is there.

    Raises:
        ValueError: ``KIMI_OPS_CPU_LIBRARY`` names no file.
    """
    if not _path().is_file():
        return (
            "the CPU library was not built: install a C++20 compiler "
            "and reinstall kimi-ops (`kimi-ops doctor` shows what was found)"
        )
    try:
        found = _open().kimi_abi_version()
    except (OSError, AttributeError) as error:  # of another platform, truncated, or not ours
        return f"the CPU library cannot be loaded ({error}): reinstall kimi-ops"
    if found != ABI_VERSION:
        return f"the CPU library has ABI {found}, this package needs {ABI_VERSION}: reinstall it"
    return None


@functools.cache
def _open() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_path()))
    library.kimi_abi_version.restype = ctypes.c_int
    library.kimi_cpu_isas.restype = ctypes.c_char_p
    return library


@functools.cache
def cpu_isas() -> tuple[str, ...]:
    """Instruction sets that this host runs and the library has: amx, avx512, avx512f, avx2, scalar;
    best first."""
    isas: bytes = _open().kimi_cpu_isas()
    return tuple(isas.decode().split())


@functools.cache
def _isa_of_environment() -> str:
    """``KIMI_OPS_CPU_ISA``, read at the first call of an op, or the best there is."""
    wish = os.environ.get("KIMI_OPS_CPU_ISA", "")
    if wish and wish not in cpu_isas():
        raise ValueError(
            f"KIMI_OPS_CPU_ISA: {wish!r} does not run here; there are {', '.join(cpu_isas())}"
        )
    return wish or cpu_isas()[0]


def cpu_isa() -> str:
    """The instruction set that ops run with.

    Raises:
        ValueError: ``KIMI_OPS_CPU_ISA`` names one that this host or the library has not.
    """
    return _FORCED.get() or _isa_of_environment()


@contextlib.contextmanager
def using_isa(isa: str) -> Iterator[None]:
    """Runs the ops within a block with this instruction set, one of `cpu_isas`."""
    if isa not in cpu_isas():
        raise ValueError(f"{isa!r} does not run here; there are {', '.join(cpu_isas())}")
    token = _FORCED.set(isa)
    try:
        yield
    finally:
        _FORCED.reset(token)


class _Team(ctypes.Structure):
    """`kimi_team`."""

    _fields_ = (("run", ctypes.c_void_p), ("threads", ctypes.c_int64))


class _Rows(ctypes.Structure):
    """`kimi_rows`."""

    _fields_ = (
        ("inner", ctypes.c_int64),
        ("stride_outer", ctypes.c_int64),
        ("stride_inner", ctypes.c_int64),
    )


_TYPES = {
    "pointer": ctypes.c_void_p,
    "result": ctypes.c_void_p,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "kimi_rows": _Rows,
}


@functools.cache
def _runner() -> int:
    """Address of the function that runs a task on threads: torch's own, else the library's."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    torch_library = ctypes.CDLL(str(path)) if path.is_file() else None
    runner = getattr(torch_library, "GOMP_parallel", None) or _open().kimi_run_threads
    return ctypes.cast(runner, ctypes.c_void_p).value or 0


def shares_torch_threads() -> bool:
    """Whether ops run on the threads of torch's pool; without OpenMP they start their own."""
    return _runner() != ctypes.cast(_open().kimi_run_threads, ctypes.c_void_p).value


@functools.cache
def _team(threads: int) -> Any:
    return ctypes.pointer(_Team(run=_runner(), threads=threads))


@functools.cache
def parameters() -> dict[str, tuple[tuple[str, str], ...]]:
    """Per op of `csrc/kimi.h` its parameters: (type, name); pointers as ``"pointer"``, or as
    ``"result"`` where the op writes there."""
    text = re.sub(r"//.*", "", HEADER.read_text())
    found = {}
    for op, listed in re.findall(r"^KIMI_OP\((\w+),([^;]*)\);", text, flags=re.MULTILINE):
        entries = []
        for parameter in listed.split(","):
            kind, _, name = parameter.strip().rpartition(" ")
            if "*" in kind:
                kind = "pointer" if "const" in kind else "result"
            entries.append((kind, name))
        found[op] = tuple(entries)
    return found


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _number(value: int | torch.dtype) -> int:
    return DTYPES[value] if isinstance(value, torch.dtype) else value


def _places(rows: Rows) -> _Rows:
    return _Rows(rows.inner, rows.stride_outer, rows.stride_inner)


# How an argument of a type is handed to ctypes.
_CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "pointer": _address,
    "result": _address,
    "int64_t": _number,
    "float": float,
    "kimi_rows": _places,
}


class _Entry(NamedTuple):
    """An op for an instruction set.

    Attributes:
        function: of the library.
        arguments: name and conversion of each, in order.
        results: names of what it writes.
    """

    function: Callable[..., int]
    arguments: tuple[tuple[str, Callable[[Any], Any]], ...]
    results: tuple[str, ...]


@functools.cache
def _entry(op: str, isa: str) -> _Entry:
    function = getattr(_open(), f"kimi_{op}_{isa}")
    listed = parameters()[op]
    function.argtypes = [ctypes.POINTER(_Team), *(_TYPES[kind] for kind, _ in listed)]
    function.restype = ctypes.c_int
    return _Entry(
        function,
        tuple((name, _CONVERSIONS[kind]) for kind, name in listed),
        tuple(name for kind, name in listed if kind == "result"),
    )


_Watcher = Callable[[torch.Tensor], None]
_WATCHERS: list[_Watcher] = []


@contextlib.contextmanager
def watching(wrote: _Watcher) -> Iterator[None]:
    """Within a block calls ``wrote(tensor)`` for every tensor that an op of the library has
    written: torch sees nothing of that. Not for several threads."""
    _WATCHERS.append(wrote)
    try:
        yield
    finally:
        _WATCHERS.remove(wrote)


def call(op: str, **named: Any) -> None:
    """Calls an op of the library with torch's number of threads.

    Args:
        op: its name in `csrc/kimi.h`.
        named: exactly the parameters stated there, but for ``team``. For a pointer a tensor, or
            None; for ``dtype`` a torch.dtype; for `kimi_rows` a `Rows`. The caller has checked
            everything.

    Raises:
        MemoryError: there was none for the op's workspace.
        ValueError: as `cpu_isa`.
    """
    function, arguments, results = _entry(op, cpu_isa())
    if len(arguments) != len(named):
        names = ", ".join(name for name, _ in arguments)
        raise TypeError(f"{op}: takes {names}; got {', '.join(named)}")
    args = [convert(named[name]) for name, convert in arguments]
    status = function(_team(torch.get_num_threads()), *args)
    if status == _NO_MEMORY:
        raise MemoryError(f"{op}: no memory for its workspace")
    for wrote in _WATCHERS:
        for name in results:
            if named[name] is not None:
                wrote(named[name])
