"""The instruction sets of the CPU library as backends for an op's test body: ``cpu[avx2]``."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

from kimi_ops import _native
from kimi_ops._backends import Backend, has_kernel
from kimi_ops._dispatch import get_op, register_backend


def cpu_backends(op: str) -> list[str]:
    """Names for `with_cpu_backend`, one per instruction set that runs here; ``cpu`` alone where
    there is no library."""
    if not has_kernel(op, "cpu"):
        return []
    return ["cpu"] if _native.missing() else [f"cpu[{isa}]" for isa in _native.cpu_isas()]


class _Backend:
    """An op's CPU backend, held to one instruction set."""

    def __init__(self, module: Backend, isa: str) -> None:
        self._module, self._isa = module, isa
        self.BATCH_INVARIANT = getattr(module, "BATCH_INVARIANT", False)

    def unsupported(self, *args: Any) -> str | None:
        with _native.using_isa(self._isa):
            return self._module.unsupported(*args)

    def launch(self, outputs: Any, *args: Any) -> None:
        with _native.using_isa(self._isa):
            self._module.launch(outputs, *args)


@contextlib.contextmanager
def with_cpu_backend(op: str, name: str) -> Iterator[str]:
    """Registers the backend ``cpu[isa]`` of an op within a block; yields its name."""
    contract = get_op(op)
    module = contract.load("cpu")
    if name == "cpu" or isinstance(module, str):
        yield name
        return
    register_backend(op, name, _Backend(module, name.removeprefix("cpu[").removesuffix("]")))
    try:
        yield name
    finally:
        del contract._loaded[name]


def use_own_threads(count: int) -> None:
    """From now on ops of the CPU library run on ``count`` threads that each call starts itself.

    For thread sanitizers, which cannot see how the threads of torch's pool wait for each other.
    """
    runner = ctypes.cast(_native._open().kimi_run_threads, ctypes.c_void_p).value
    team = ctypes.pointer(_native._Team(run=runner, threads=count))
    _native._team = lambda _torch_threads: team  # type: ignore[assignment]
