"""Hostile inputs for every op, one module per family.

A `Case` makes the arguments of one call, all of them, in the order of the schema, on the CPU and
from a seed of its own. What a kernel must not touch is poisoned: cache entries past a sequence's
length and unused pages are NaN, unused page ids are absurd, sizes sit on and around tile borders,
tensors are strided. Cases marked ``full`` are large and run only when asked for; kernels that are
interpreted or emulated leave out those of more ``work`` than they can do in a few seconds.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

CASES: dict[str, dict[str, Case]] = {}


@dataclass(frozen=True)
class Case:
    """One set of arguments.

    Attributes:
        op, name: what it is for; the name tells what is special about it.
        build: ``build(generator)`` returns the arguments.
        full: part of the full grid only.
        declared_work: see `work`; None: as many units as the arguments have elements.
    """

    op: str
    name: str
    build: Callable[[torch.Generator], tuple[Any, ...]]
    full: bool = False
    declared_work: int | None = None

    @property
    def work(self) -> int:
        """How slow a kernel is to interpret or emulate: elements of the arguments, unless declared.

        Declared where elements mislead (padding that no kernel reads, a table of which it reads
        little, work that grows faster), so that each way has cases of K2.5's own widths.
        """
        if self.declared_work is not None:
            return self.declared_work
        return sum(arg.numel() for arg in self.args() if isinstance(arg, torch.Tensor))

    def args(self) -> tuple[Any, ...]:
        """The arguments, the same ones at every call, on the CPU whatever the default device."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.op}/{self.name}".encode()))
        with torch.device("cpu"):
            return self.build(generator)

    def __str__(self) -> str:
        return self.name


def add(
    op: str,
    name: str,
    build: Callable[..., tuple[Any, ...]],
    *,
    full: bool = False,
    work: int | None = None,
    **options: Any,
) -> None:
    """Registers a case; ``build(generator, **options)`` returns its arguments."""
    assert name not in CASES.setdefault(op, {}), f"{op} has two cases {name}"
    CASES[op][name] = Case(op, name, partial(build, **options), full, work)


def cases(op: str, *, full: bool = False) -> list[Case]:
    """The op's cases; without ``full`` those of an ordinary test run.

    Raises:
        KeyError: unknown op.
    """
    return [case for case in CASES[op].values() if full or not case.full]


def normal(
    generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.bfloat16, std: float = 1.0
) -> torch.Tensor:
    """Normal deviates, rounded to ``dtype``."""
    return (torch.randn(shape, generator=generator) * std).to(dtype)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values in a tensor whose rows are a slice of wider ones, the rest of it NaN."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 24), torch.nan)
    wide[..., 8 : 8 + x.shape[-1]] = x
    return wide[..., 8 : 8 + x.shape[-1]]


DTYPE_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
}

from kimi_ops.testing.inputs import int4, mla, moe, norm, vision  # noqa: E402, F401  register
