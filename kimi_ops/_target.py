"""The GPU that a launch is for: what tile tables and grid sizes are chosen by.

On a GPU it is the device of the tensors. Where kernels are executed without one (interpreter,
emulator, ahead-of-time compilation), whoever executes them names it with `targeting`.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Target:
    """A GPU as far as a kernel's choices depend on it.

    Attributes:
        vendor: "cuda" or "hip".
        capability: of CUDA, ``10 * major + minor``: 80, 86, 89, 90, 100, 120; of HIP the digits
            after gfx, 942 (90 of gfx90a).
        multiprocessors: SMs, or compute units.
        shared_bytes: shared memory that one thread block may use.
    """

    vendor: str
    capability: int
    multiprocessors: int
    shared_bytes: int


_TARGET: ContextVar[Target | None] = ContextVar("kimi_ops_target", default=None)
_IN_PYTHON: ContextVar[bool] = ContextVar("kimi_ops_in_python", default=False)


@functools.cache
def _of_device(index: int) -> Target:
    properties: Any = torch.cuda.get_device_properties(index)  # its stub lacks what is read here
    if torch.version.hip is not None:
        digits = re.match(r"gfx(\d+)", properties.gcnArchName)
        number = int(digits[1]) if digits else 0
        shared = int(getattr(properties, "shared_memory_per_block", 64 << 10))
        return Target("hip", number, properties.multi_processor_count, shared)
    shared = int(properties.shared_memory_per_block_optin)
    major, minor = torch.cuda.get_device_capability(index)
    return Target("cuda", 10 * major + minor, properties.multi_processor_count, shared)


def target(device: torch.device) -> Target:
    """The GPU that a launch on tensors of ``device`` is for.

    Raises:
        RuntimeError: a device that is no GPU, outside a `targeting` block.
    """
    chosen = _TARGET.get()
    if chosen is not None:
        return chosen
    if device.type != "cuda":
        raise RuntimeError(f"no GPU is named for tensors on {device}")
    return _of_device(torch.cuda.current_device() if device.index is None else device.index)


def too_old(device: torch.device) -> str | None:
    """Why no kernel of this package runs on a GPU; None if one may, or if none is named."""
    if device.type != "cuda" and not is_named():
        return None
    gpu = target(device)
    if gpu.vendor == "cuda" and gpu.capability < 80:
        found = f"{gpu.capability // 10}.{gpu.capability % 10}"
        return f"its kernels need an NVIDIA GPU of capability 8.0 or later, this one has {found}"
    return None


@contextlib.contextmanager
def targeting(chosen: Target) -> Iterator[None]:
    """Makes `target` answer ``chosen`` within a ``with`` block, in this thread or task only."""
    token = _TARGET.set(chosen)
    try:
        yield
    finally:
        _TARGET.reset(token)


def is_named() -> bool:
    """Whether a `targeting` block is in force."""
    return _TARGET.get() is not None


@contextlib.contextmanager
def in_python() -> Iterator[None]:
    """Says within a ``with`` block that kernels run in an interpreter, which has no assembly."""
    token = _IN_PYTHON.set(True)
    try:
        yield
    finally:
        _IN_PYTHON.reset(token)


def runs_in_python() -> bool:
    """Whether an `in_python` block is in force."""
    return _IN_PYTHON.get()
