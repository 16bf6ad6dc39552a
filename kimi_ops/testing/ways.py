"""The ways in which kernels for a GPU run without one: each is a backend for an op's test body.

    triton[interpreted]   the Triton source, in the repaired interpreter
    triton[sm_80]         what the compiler makes of it for that architecture, in the emulator
    cuda[sm_80]           the same of CUDA C++, and cuda[sm_90]

`with_way` registers such a backend for one op. It takes over the op's own launches alone: each runs
in a block of its own, in which the outputs count as uninitialised. Every other launch follows a
random schedule, so that the test body's repeated runs differ in nothing but their order.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from kimi_ops._backends import Backend, has_kernel, simulated
from kimi_ops._dispatch import get_op, register_backend
from kimi_ops._target import targeting
from kimi_ops.testing.check import as_tuple
from kimi_ops.testing.inputs import Case
from kimi_ops.testing.runner import emulated, target_of

Context = Callable[[Sequence[torch.Tensor], int], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Way:
    """One way to run a backend's kernels on CPU tensors.

    Attributes:
        name: ``backend[how]``, the name of the backend that `with_way` registers.
        backend: whose modules it runs.
        arch: the GPU that they are told they run on.
        context: ``context(outputs, number)``: the block in which launch ``number`` runs.
        work_limit: cases of more `Case.work` are left out of an ordinary test run.
    """

    name: str
    backend: str
    arch: int
    context: Context
    work_limit: int

    def takes(self, case: Case, *, full: bool) -> bool:
        """Whether a test run includes a case this way; the full grid includes every one."""
        return full or case.work <= self.work_limit


def _interpreted(outputs: Sequence[torch.Tensor], number: int) -> AbstractContextManager[Any]:
    interpreter = importlib.import_module("kimi_ops.testing.triton_interpreter")
    block: AbstractContextManager[Any] = interpreter.interpreted(
        seed=number, uninitialised=tuple(outputs)
    )
    return block


def _emulated(arch: int) -> Context:
    def context(outputs: Sequence[torch.Tensor], number: int) -> AbstractContextManager[Any]:
        seed = number if number % 2 else None
        return emulated(arch=arch, uninitialised=outputs, seed=seed)

    return context


# Elements of the arguments that take the interpreter, and the emulator, about two seconds where a
# kernel does little with each; cases whose kernels do more say so (`Case.work`).
_INTERPRETED_WORK = 1 << 19
_EMULATED_WORK = 1 << 18
# The larger cases differ from the smaller ones in what the source does, which sm_80 has shown.
_EMULATED_AGAIN_WORK = 1 << 17
# Of CUDA C++ the one source makes nearly the same PTX for both. Where it has a path for sm_90 alone
# that is a kernel of its own, with the cases that a Triton kernel has there.
_CUDA_AGAIN_WORK = 1 << 14
_CUDA_OWN_PATH_ON_SM_90 = frozenset({"mla_decode", "mla_decode_value"})
_CUDA_AGAIN = "cuda[sm_90]"
WAYS = (
    Way("triton[interpreted]", "triton", 80, _interpreted, _INTERPRETED_WORK),
    Way("triton[sm_80]", "triton", 80, _emulated(80), _EMULATED_WORK),
    Way("triton[sm_90]", "triton", 90, _emulated(90), _EMULATED_AGAIN_WORK),
    Way("cuda[sm_80]", "cuda", 80, _emulated(80), _EMULATED_WORK),
    Way(_CUDA_AGAIN, "cuda", 90, _emulated(90), _CUDA_AGAIN_WORK),
)


def ways_of(op: str) -> list[Way]:
    """The ways in which an op's kernels can run, with the work that each can do of this op."""
    own = op in _CUDA_OWN_PATH_ON_SM_90
    return [
        replace(way, work_limit=_EMULATED_AGAIN_WORK) if own and way.name == _CUDA_AGAIN else way
        for way in WAYS
        if has_kernel(op, way.backend)
    ]


class _Backend:
    """A backend's module whose launches run in a way's block."""

    def __init__(self, module: Backend, way: Way) -> None:
        self._module, self._way = module, way
        self._launches = 0
        self.BATCH_INVARIANT = getattr(module, "BATCH_INVARIANT", False)

    def unsupported(self, *args: Any) -> str | None:
        with targeting(target_of(self._way.arch)):
            return self._module.unsupported(*args)

    def launch(self, outputs: Any, *args: Any) -> None:
        number, self._launches = self._launches, self._launches + 1
        with (
            targeting(target_of(self._way.arch)),
            self._way.context(as_tuple(outputs), number),
        ):
            self._module.launch(outputs, *args)


@contextlib.contextmanager
def with_way(op: str, way: Way) -> Iterator[str]:
    """Registers an op's backend this way within a block; yields the name to choose it by.

    Raises:
        RuntimeError: the backend cannot run here; says why.
    """
    contract = get_op(op)
    with simulated(way.backend):
        module = contract.load(way.backend)
    if isinstance(module, str):
        raise RuntimeError(module)
    register_backend(op, way.name, _Backend(module, way))
    try:
        yield way.name
    finally:
        del contract._loaded[way.name]
