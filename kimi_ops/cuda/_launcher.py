"""Who launches the CUDA C++ kernels of this package: one seam for every launcher of `csrc/cuda/`.

An op's module hands a source, a kernel name, a grid and flat arguments to `current_launcher`; what
compiles the source and starts the kernel (or executes it without a GPU) is chosen here, and no
kernel's module knows which it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Protocol

from torch import Tensor

Argument = Tensor | int | float | bytes | None


class Launcher(Protocol):
    """Compiles and launches CUDA C++ kernels."""

    def launch(
        self,
        source: Path,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Argument],
        *,
        shared_bytes: int = 0,
        defines: Mapping[str, str | int] | None = None,
        cooperative: bool = False,
    ) -> None:
        """Launches one kernel on the current stream of the tensors' device.

        Args:
            source: of the kernel, in `csrc/cuda/`.
            name: of the kernel, or the name expression of a template instance, ``kernel<128>``.
            grid, block: one to three sizes.
            args: in the order of the parameters: tensors for pointers, None for a null pointer,
                ints and floats for scalars, bytes for structs.
            shared_bytes: of dynamic shared memory.
            defines: macros for the compiler.
            cooperative: all thread blocks must be resident at once.
        """


_LAUNCHER: ContextVar[Launcher | None] = ContextVar("kimi_ops_cuda_launcher", default=None)


def current_launcher() -> Launcher:
    """The launcher in force here.

    Raises:
        RuntimeError: there is none; says which there are.
    """
    launcher = _LAUNCHER.get()
    if launcher is None:
        raise RuntimeError(
            "nothing here launches CUDA C++ kernels: this version of kimi-ops executes them "
            "within kimi_ops.testing.runner.emulated() alone"
        )
    return launcher


@contextlib.contextmanager
def use_launcher(launcher: Launcher) -> Iterator[None]:
    """Makes `current_launcher` answer ``launcher`` within a block, in this thread or task only."""
    token = _LAUNCHER.set(launcher)
    try:
        yield
    finally:
        _LAUNCHER.reset(token)
