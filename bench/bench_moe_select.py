"""The selection alone, from logits: for engines that have a gate product of their own."""

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
    for _, _, bias, logits in router(new, tokens):
        yield logits, bias, *REST


def work(logits: Tensor, bias: Tensor, top_k: int, *_: Any) -> Work:
    return Work(size_of(logits, bias), len(logits) * top_k * 8)


CASES = [
    BenchCase("moe_select", tokens_text(t), partial(calls, tokens=t), work,
              t not in (1, 64, 1024), "384 experts", t, "tokens")
    for t in (*DECODE, *PREFILL)
]  # fmt: skip
test_moe_select = benchmarks(CASES)
