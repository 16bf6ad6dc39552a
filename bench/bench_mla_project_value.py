"""The latent attention result times W_UV: a batched product, one matrix per head."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from kimi_ops.bench import Args, BenchCase, Maker, Work
from kimi_ops.bench.case import size_of
from kimi_ops.bench.cases._sizes import DECODE, HEADS, NOPE, PREFILL, C, V, tokens_text
from kimi_ops.bench.pytest_case import benchmarks


def calls(new: Maker, tokens: int, heads: int) -> Iterator[Args]:
    while True:
        # The value rows of kv_b_proj, as the model has them.
        w_uv = new.normal(heads, NOPE + V, C, std=C**-0.5)[:, NOPE:]
        yield new.normal(tokens, heads, C), w_uv


def work(out: Tensor, w_uv: Tensor) -> Work:
    tokens, heads, _ = out.shape
    written = tokens * heads * V * out.element_size()
    return Work(size_of(out, w_uv), written, 2 * tokens * heads * V * C)


CASES = [
    BenchCase(
        "mla_project_value",
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
test_mla_project_value = benchmarks(CASES)
