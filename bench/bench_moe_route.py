"""The router: gate product, sigmoid, biased top 8 of 384, weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from kimi_ops.bench import Args, BenchCase, Maker, Work
from kimi_ops.bench.case import size_of
from kimi_ops.bench.cases._router import REST, router
from kimi_ops.bench.cases._sizes import DECODE, PREFILL, tokens_text
from kimi_ops.bench.pytest_case import benchmarks


def calls(new: Maker, tokens: int) -> Iterator[Args]:
    for x, gate, bias, _ in router(new, tokens):
        yield x, gate, bias, *REST


def work(x: Tensor, gate: Tensor, bias: Tensor, top_k: int, *_: Any) -> Work:
    return Work(size_of(x, gate, bias), len(x) * top_k * 8, 2 * len(x) * gate.numel())


CASES = [
    BenchCase("moe_route", tokens_text(t), partial(calls, tokens=t), work,
              t not in (1, 64, 1024), "384 experts", t, "tokens")
    for t in (*DECODE, *PREFILL)
]  # fmt: skip
test_moe_route = benchmarks(CASES)
