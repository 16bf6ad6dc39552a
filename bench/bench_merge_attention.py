"""Merging two partial attentions of un-absorbed queries by their lse: memory alone decides."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kimi_ops.bench import Args, BenchCase, Maker, Work
from kimi_ops.bench.case import size_of
from kimi_ops.bench.cases._sizes import HEADS, PREFILL, V, tokens_text
from kimi_ops.bench.pytest_case import benchmarks


def calls(new: Maker, tokens: int, heads: int) -> Iterator[Args]:
    def side() -> tuple[Tensor, Tensor]:
        return new.normal(tokens, heads, V), new.normal(tokens, heads, dtype=torch.float32)

    while True:
        yield *side(), *side()


def work(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Work:
    return Work(2 * size_of(out_a, lse_a), size_of(out_a, lse_a))


CASES = [
    BenchCase("merge_attention", f"{tokens_text(t)}, {h} heads", partial(calls, tokens=t, heads=h),
              work, (t, h) != (2048, 64), f"{h} heads", t, "tokens")
    for h in HEADS
    for t in PREFILL
]  # fmt: skip
test_merge_attention = benchmarks(CASES)
