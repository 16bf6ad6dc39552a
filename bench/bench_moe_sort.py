"""Tokens in the order of their experts, and where each expert's begin."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from kimi_ops.bench import Args, BenchCase, Maker, Work
from kimi_ops.bench.case import size_of
from kimi_ops.bench.cases._routing import routed
from kimi_ops.bench.cases._sizes import DECODE, EXPERTS, PREFILL, tokens_text
from kimi_ops.bench.pytest_case import benchmarks


def calls(new: Maker, tokens: int, routing: str) -> Iterator[Args]:
    while True:
        yield routed(new, tokens, EXPERTS, routing), EXPERTS, None


def work(ids: Tensor, experts: int, *_: Any) -> Work:
    return Work(size_of(ids), size_of(ids) + 4 * (experts + 1))


CASES = [
    BenchCase("moe_sort", f"{tokens_text(t)}, {routing}", partial(calls, tokens=t, routing=routing),
              work, t not in (64, 4096) or routing != "uniform", routing, t, "tokens")
    for routing in ("uniform", "skewed", "one expert")
    for t in (*DECODE, *PREFILL)
]  # fmt: skip
test_moe_sort = benchmarks(CASES)
