"""The residual addition and RMSNorm in one pass: memory alone decides."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from kimi_ops.bench import Args, BenchCase, Maker, Work
from kimi_ops.bench.case import size_of
from kimi_ops.bench.cases._sizes import DECODE, PREFILL, D, tokens_text
from kimi_ops.bench.pytest_case import benchmarks


def calls(new: Maker, tokens: int) -> Iterator[Args]:
    weight = new.normal(D)
    while True:
        yield new.normal(tokens, D), new.normal(tokens, D), weight, 1e-5


def work(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Work:
    return Work(read=size_of(x, residual, weight), written=2 * size_of(x))


CASES = [
    BenchCase("add_rms_norm", tokens_text(t), partial(calls, tokens=t), work,
              t not in (1, 64, 4096), "hidden size 7,168", t, "tokens")
    for t in (*DECODE, *PREFILL)
]  # fmt: skip
test_add_rms_norm = benchmarks(CASES)
