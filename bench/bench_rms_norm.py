"""RMSNorm of the residual stream: memory alone decides."""

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
        yield new.normal(tokens, D), weight, 1e-5


def work(x: Tensor, weight: Tensor, eps: float) -> Work:
    return Work(read=size_of(x, weight), written=size_of(x))


CASES = [
    BenchCase("rms_norm", tokens_text(t), partial(calls, tokens=t), work,
              t not in (1, 64, 4096), "hidden size 7,168", t, "tokens")
    for t in (*DECODE, *PREFILL)
]  # fmt: skip
test_rms_norm = benchmarks(CASES)
