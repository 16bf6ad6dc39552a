"""RoPE of the query and its product with W_UK: a batched product, one matrix per head."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kimi_ops.bench import Args, BenchCase, Maker, Work
from kimi_ops.bench.case import size_of
from kimi_ops.bench.cases._sizes import DECODE, HEADS, NOPE, PREFILL, C, R, V, tokens_text
from kimi_ops.bench.pytest_case import benchmarks
from kimi_ops.testing.inputs.mla import inv_freq


def calls(new: Maker, tokens: int, heads: int) -> Iterator[Args]:
    freq = inv_freq(R).to(new.device)
    positions = torch.arange(tokens, dtype=torch.int32).to(new.device)
    while True:
        # The key rows of kv_b_proj, as the model has them.
        w_uk = new.normal(heads, NOPE + V, C, std=NOPE**-0.5)[:, :NOPE]
        yield new.normal(tokens, heads, NOPE + R), w_uk, positions, freq


def work(q: Tensor, w_uk: Tensor, positions: Tensor, inv_freq: Tensor) -> Work:
    tokens, heads, _ = q.shape
    written = tokens * heads * (C + R) * q.element_size()
    return Work(size_of(q, w_uk, positions), written, 2 * tokens * heads * NOPE * C)


CASES = [
    BenchCase(
        "mla_absorb_query",
        f"{tokens_text(t)}, {h} heads",
        partial(calls, tokens=t, heads=h),
        work,
        (t, h) not in ((1, 64), (64, 64), (1024, 64)),
        f"{h} heads",
        t,
        "tokens",
    )
    for h in HEADS
    for t in (*DECODE, *PREFILL)
]
test_mla_absorb_query = benchmarks(CASES)
