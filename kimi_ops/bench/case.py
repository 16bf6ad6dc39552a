"""What is measured: calls of one op at sizes of Kimi K2.5, and the work that each must do."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Args = tuple[Any, ...]
_POOL = 1 << 25  # int32 values: 128 MiB of random codes, repeated where a case wants more


@dataclass(frozen=True)
class Work:
    """What a call must do at least, whoever does it.

    Attributes:
        read, written: bytes from and to memory: each argument that is used once, each result once.
        flops: of matrix products, a multiply-add counted as two; 0 where memory alone decides.
        dtype: of the products.
    """

    read: float
    written: float
    flops: float = 0.0
    dtype: torch.dtype = torch.bfloat16

    @property
    def bytes(self) -> float:
        """Both ways."""
        return self.read + self.written


class Maker:
    """Makes the tensors of a case on a device, from a seed.

    Attributes:
        device: of all tensors; on "meta" they have sizes alone.
        generator: of `torch.Generator`, on the CPU.
    """

    def __init__(self, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.device = torch.device(device)
        self.generator = torch.Generator().manual_seed(seed)
        self._pool: Tensor | None = None

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Normal deviates."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        values = torch.randn(shape, generator=self.generator)
        return values.mul_(std).to(dtype).to(self.device)

    def uniform(
        self, *shape: int, low: float = 0.0, high: float = 1.0, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Between two bounds."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        values = torch.rand(shape, generator=self.generator)
        return values.mul_(high - low).add_(low).to(dtype).to(self.device)

    def codes(self, *shape: int) -> Tensor:
        """int32 words of eight random nibbles each; beyond 128 MiB they repeat."""
        words = torch.empty(shape, dtype=torch.int32, device=self.device)
        if self.device.type == "meta":
            return words
        if self._pool is None:
            bounds = (-(2**31), 2**31)
            pool = torch.randint(*bounds, (_POOL,), generator=self.generator, dtype=torch.int32)
            self._pool = pool.to(self.device)
        flat = words.view(-1)
        for start in range(0, len(flat), _POOL):
            part = flat[start : start + _POOL]
            part.copy_(self._pool[: len(part)])
        return words

    def ints(self, values: Sequence[Any], dtype: torch.dtype = torch.int32) -> Tensor:
        """Integers as given."""
        return torch.tensor(values, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class BenchCase:
    """Calls of one op at one size.

    Attributes:
        op: its name.
        name: scenario and sizes, ``decode, 8 tokens, 384 experts``; unique within the op.
        calls: ``calls(maker)`` yields the arguments of one call after the other, without end, in
            the order of the schema; what calls share (weights) is one tensor.
        work: of a call with such arguments.
        full: left out of an ordinary run.
        series: cases that differ in one size alone share a name here, for plots: "decode".
        size: that size; what it counts is in ``unit``: "tokens", "cached tokens", "patches".
        unit: of ``size``.
    """

    op: str
    name: str
    calls: Callable[[Maker], Iterator[Args]]
    work: Callable[..., Work]
    full: bool = False
    series: str = ""
    size: int = 0
    unit: str = ""

    def __str__(self) -> str:
        return self.name


def size_of(*tensors: Tensor | None) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def cases_of(op: str, *, full: bool = False) -> list[BenchCase]:
    """The op's cases, without ``full`` those of an ordinary run; none where there is no file.

    Raises:
        ValueError: two cases of one name.
    """
    name = f"kimi_ops.bench.cases.bench_{op}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return []
    found: list[BenchCase] = list(module.CASES)
    names = [case.name for case in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{name}: two cases are named {twice[0]!r}")
    return [case for case in found if full or not case.full]
