"""The backends of the ops: where their modules are, what each needs, and how they load.

A backend of an op is one module with

- ``unsupported(*args) -> str | None``: why this backend cannot run these arguments, or None;
- ``launch(outputs, *args) -> None``: writes every element of ``outputs``, which is what the op's
  own ``outputs(*args)`` allocated (a tensor, a tuple of tensors, or None for an in-place op);
- ``BATCH_INVARIANT = True`` if in `batch_invariant` mode its results for a row do not depend on the
  rest of the batch. Without it the backend is refused in that mode.

It is imported at the first call that considers it, never before, so that importing this package
needs neither Triton nor CuPy nor a compiler.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

BACKENDS = ("reference", "cpu", "triton", "cuda")
AUTOMATIC_ORDER: Mapping[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "cuda", "reference"),
}
# Ops whose CUDA C++ kernel has run on a real GPU and won there get their own order here.
AUTOMATIC_ORDER_OF_OP: Mapping[tuple[str, str], tuple[str, ...]] = {}

_PACKAGE = {"reference": "reference", "cpu": "cpu", "triton": "kernels", "cuda": "cuda"}
_NEEDS = {  # backend: (module it cannot do without, how to get it)
    "triton": ("triton", "pip install 'triton>=3.4'"),
    "cuda": ("cupy", "pip install cupy-cuda13x (or cupy-cuda12x)"),
}
GPU_BACKENDS = ("triton", "cuda")
# Of those the ones whose launches an emulator or an interpreter takes over just now (`simulated`).
SIMULATED: list[str] = []


class Backend(Protocol):
    """What a backend's module offers for one op."""

    def unsupported(self, *args: Any) -> str | None: ...

    def launch(self, outputs: Any, *args: Any) -> None: ...


def load_backend(op: str, backend: str) -> Backend | str:
    """The module of a backend for an op, or the reason why there is none here."""
    if not has_kernel(op, backend):
        return f"there is no {backend} kernel for {op}"
    if backend not in SIMULATED and (needs := _NEEDS.get(backend)):
        module, remedy = needs
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed: {remedy}"
    if backend == "cpu":
        from kimi_ops import _native

        if reason := _native.missing():
            return reason
    return as_backend(importlib.import_module(f"kimi_ops.{_PACKAGE[backend]}.{op}"))


def has_kernel(op: str, backend: str) -> bool:
    """Whether the package has a module of this backend for the op, runnable here or not."""
    package = f"kimi_ops.{_PACKAGE[backend]}"
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{package} is missing: kimi-ops is not installed, run pip install -e .")
    return importlib.util.find_spec(f"{package}.{op}") is not None


def as_backend(module: Any) -> Backend:
    """The module itself; raises TypeError where it lacks what a backend must have."""
    missing = [n for n in ("unsupported", "launch") if not callable(getattr(module, n, None))]
    if missing:
        name = getattr(module, "__name__", repr(module))
        raise TypeError(f"{name} is not a backend: it lacks {' and '.join(missing)}")
    backend: Backend = module
    return backend


@contextlib.contextmanager
def simulated(*backends: str) -> Iterator[None]:
    """Within the block these GPU backends take CPU tensors; for who takes over their launches."""
    SIMULATED.extend(backends)
    try:
        yield
    finally:
        del SIMULATED[len(SIMULATED) - len(backends) :]
