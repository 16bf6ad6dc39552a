"""One tile on one case: which launches it makes, and whether the compilers make something usable.

Launches are laid out without executing anything, on meta tensors: a call of any size costs as much
as its host code.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest import mock

import torch

from kimi_ops._dispatch import get_op
from kimi_ops._target import Target, targeting
from kimi_ops.kernels import _tiles
from kimi_ops.testing.static import (
    KernelReport,
    TritonCompileError,
    report_triton,
    signature_of,
)
from kimi_ops.testing.static.page import problems
from kimi_ops.tune.cases import TuneCase

Forced = Mapping[str, Any]  # tile by the name of its choice
_META = torch.device("meta")


@dataclass(frozen=True)
class Launched:
    """A launch that a backend asked for.

    Attributes:
        kernel: under ``@triton.jit``.
        arguments: by name, all of them.
        grid: its sizes.
        options: of the compiler, ``num_warps`` and so on.
    """

    kernel: Any
    arguments: dict[str, Any]
    grid: tuple[int, ...]
    options: dict[str, Any]

    @property
    def ctas(self) -> int:
        """Programs of the grid."""
        return prod(self.grid)

    @property
    def specialisation(self) -> str:
        """What the compilers are given; equal for launches that are one binary."""
        special = signature_of(self.kernel, self.arguments)
        return f"{self.kernel.__name__} {special} {sorted(self.options.items())}"

    @property
    def bytes(self) -> int:
        """Of all tensors that it was given, each counted once."""
        tensors = {id(a): a for a in self.arguments.values() if isinstance(a, torch.Tensor)}
        return sum(t.numel() * t.element_size() for t in tensors.values())


@contextlib.contextmanager
def noting(*, execute: bool) -> Iterator[list[Launched]]:
    """Notes the Triton launches of a block, which are carried out or, without ``execute``, not."""
    function = importlib.import_module("triton").runtime.jit.JITFunction
    carry_out, noted = function.run, []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        names = [p.name for p in kernel.params]
        arguments = {p.name: p.default for p in kernel.params if p.has_default}
        arguments |= dict(zip(names, args, strict=False))
        arguments |= {name: value for name, value in named.items() if name in names}
        options = {name: value for name, value in named.items() if name not in names}
        sizes = grid(arguments) if callable(grid) else grid
        noted.append(Launched(kernel, arguments, tuple(int(s) for s in sizes), options))
        if execute:
            return carry_out(kernel, *args, grid=grid, warmup=warmup, **named)
        return None

    with mock.patch.object(function, "run", run):
        yield noted


def launch(op: str, args: Sequence[Any], outputs: Any) -> None:
    """Calls the ``launch`` of the op's Triton backend, past the dispatcher."""
    importlib.import_module(f"kimi_ops.kernels.{op}").launch(outputs, *args)


def laid_out(case: TuneCase, gpu: Target, forced: Forced) -> tuple[list[Launched], _tiles.Trial]:
    """The launches of a case in full size with these tiles, and what it asked for."""
    args = case.args(case.full, _META)
    outputs = get_op(case.op).outputs(*args)
    with targeting(gpu), _tiles.trying(forced) as trial, noting(execute=False) as noted:
        launch(case.op, args, outputs)
    return noted, trial


def compiled(launched: Launched, arch: str) -> KernelReport:
    """The static report of a launch; errors as `report_triton` has them."""
    signature, constexprs = signature_of(launched.kernel, launched.arguments)
    options = dict(launched.options)
    warps, stages = options.pop("num_warps", 4), options.pop("num_stages", 3)
    return report_triton(
        launched.kernel,
        arch,
        signature=signature,
        constexprs=constexprs,
        num_warps=warps,
        num_stages=stages,
        options=options,
    )


def unusable(launches: Sequence[Launched], arch: str) -> str | None:
    """Why a tile is dropped before anything runs: it does not compile, spills, or does not fit."""
    for launched in launches:
        try:
            found = problems(compiled(launched, arch))
        except TritonCompileError as error:
            return f"does not compile: {first_line(error)}"
        if found:
            return found[0]
    return None


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
