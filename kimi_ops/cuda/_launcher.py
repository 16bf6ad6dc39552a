"""Who launches the CUDA C++ kernels of this package: one seam for every launcher of `csrc/cuda/`.

An op's module hands a source, a kernel name, a grid and flat arguments to `launch_kernel`; what
compiles the source and starts the kernel (CuPy, or an emulator where there is no GPU) is chosen
here, and no kernel's module knows which it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from typing import Protocol

from torch import Tensor

from kimi_ops import _nvrtc

Argument = Tensor | int | float | None
SOURCES = Path(import_module("kimi_ops.csrc").__path__[0]) / "cuda"


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
    ) -> None:
        """Launches one kernel on the current stream of the tensors' device.

        Args:
            source: of the kernel, in `csrc/cuda/`.
            name: of the kernel, which is ``extern "C"``.
            grid, block: one to three sizes.
            args: in the order of the parameters: tensors for pointers, None for a null pointer,
                ints and floats (32 bits) for scalars.
            shared_bytes: of dynamic shared memory.
        """


_LAUNCHER: ContextVar[Launcher | None] = ContextVar("kimi_ops_cuda_launcher", default=None)
_ON_A_GPU = _nvrtc.CupyLauncher()


def current_launcher() -> Launcher:
    """The launcher in force here: CuPy's, unless a `use_launcher` block names another."""
    return _LAUNCHER.get() or _ON_A_GPU


@contextlib.contextmanager
def use_launcher(launcher: Launcher) -> Iterator[None]:
    """Makes `current_launcher` answer ``launcher`` within a block, in this thread or task only."""
    token = _LAUNCHER.set(launcher)
    try:
        yield
    finally:
        _LAUNCHER.reset(token)


def launch_kernel(
    op: str,
    name: str,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[Argument],
    *,
    shared_bytes: int = 0,
) -> None:
    """Launches kernel ``name`` of `csrc/cuda/<op>.cu`; arguments as `Launcher.launch` has them."""
    source = SOURCES / f"{op}.cu"
    current_launcher().launch(source, name, grid, block, args, shared_bytes=shared_bytes)
