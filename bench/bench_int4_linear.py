"""A dense W4A16 product: one expert's down projection, and the shape of a fused gate and up."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kimi_ops.bench import Args, BenchCase, Maker, Work
from kimi_ops.bench.case import size_of
from kimi_ops.bench.cases._sizes import DECODE, PREFILL, D, F, tokens_text
from kimi_ops.bench.pytest_case import benchmarks

BF16 = torch.bfloat16


def calls(new: Maker, tokens: int, n: int, k: int) -> Iterator[Args]:
    while True:
        scale = new.uniform(n, k // 32, low=1e-3, high=1e-2, dtype=BF16)
        yield new.normal(tokens, k), new.codes(n, k // 8), scale


def work(x: Tensor, packed: Tensor, scale: Tensor) -> Work:
    n, k = len(packed), x.shape[-1]
    return Work(size_of(x, packed, scale), 2 * len(x) * n, 2 * len(x) * n * k)


CASES = [
    BenchCase(
        "int4_linear",
        f"{tokens_text(t)}, {k:,} to {n:,}",
        partial(calls, tokens=t, n=n, k=k),
        work,
        (t, n) not in ((1, 2 * F), (8, 2 * F), (64, 2 * F), (1024, D)),
        f"{k:,} to {n:,}",
        t,
        "tokens",
    )
    for n, k in ((2 * F, D), (D, F))
    for t in (*DECODE, *PREFILL)
]
test_int4_linear = benchmarks(CASES)
