"""SwiGLU of the shared expert (width 2,048) and of the dense first layer (18,432)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from kimi_ops.bench import Args, BenchCase, Maker, Work
from kimi_ops.bench.case import size_of
from kimi_ops.bench.cases._sizes import DECODE, PREFILL, tokens_text
from kimi_ops.bench.pytest_case import benchmarks


def calls(new: Maker, tokens: int, width: int) -> Iterator[Args]:
    while True:
        yield (new.normal(tokens, 2 * width),)


def work(gate_up: Tensor) -> Work:
    return Work(read=size_of(gate_up), written=size_of(gate_up) / 2)


CASES = [
    BenchCase(
        "silu_mul",
        f"{tokens_text(t)}, width {width:,}",
        partial(calls, tokens=t, width=width),
        work,
        (t, width) not in ((1, 18432), (64, 2048), (4096, 2048), (4096, 18432)),
        f"width {width:,}",
        t,
        "tokens",
    )
    for width in (2048, 18432)
    for t in (*DECODE, *PREFILL)
]
test_silu_mul = benchmarks(CASES)
