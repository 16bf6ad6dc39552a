"""The router with the tables that the experts need, in the same launch at decode."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from kimi_ops.bench import Args, BenchCase, Maker, Work
from kimi_ops.bench.case import size_of
from kimi_ops.bench.cases._router import REST, router
from kimi_ops.bench.cases._sizes import DECODE, EXPERTS, tokens_text
from kimi_ops.bench.pytest_case import benchmarks


def calls(new: Maker, tokens: int) -> Iterator[Args]:
    for x, gate, bias, _ in router(new, tokens):
        yield x, gate, bias, *REST, None


def work(x: Tensor, gate: Tensor, bias: Tensor, top_k: int, *_: Any) -> Work:
    written = len(x) * top_k * 12 + 4 * (EXPERTS + 1)
    return Work(size_of(x, gate, bias), written, 2 * len(x) * gate.numel())


CASES = [
    BenchCase("moe_route_sort", tokens_text(t), partial(calls, tokens=t), work,
              t not in (1, 64), "384 experts", t, "tokens")
    for t in DECODE
]  # fmt: skip
test_moe_route_sort = benchmarks(CASES)
