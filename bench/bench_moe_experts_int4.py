"""The routed experts from the checkpoint's int4 weights: reading those that are chosen decides up
to some 64 tokens, the products beyond."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kimi_ops.bench import Args, BenchCase, Maker, Work
from kimi_ops.bench.case import size_of
from kimi_ops.bench.cases._routing import routed
from kimi_ops.bench.cases._sizes import (
    CHOSEN,
    DECODE,
    EXPERTS,
    PREFILL,
    ROUTED_SCALE,
    D,
    F,
    tokens_text,
)
from kimi_ops.bench.pytest_case import benchmarks

BF16 = torch.bfloat16
# Of a third of the experts, as a machine of 24 GiB can hold them twice.
RESIDENT = 128


def calls(
    new: Maker, tokens: int, width: int, local: int, experts: int, routing: str, shared: bool
) -> Iterator[Args]:
    """`local` of `experts` experts are here, the first ones."""
    scales = {"low": 1e-3, "high": 1e-2, "dtype": BF16}
    gate_up = new.codes(local, 2 * width, D // 8), new.uniform(local, 2 * width, D // 32, **scales)
    down = new.codes(local, D, width // 8), new.uniform(local, D, width // 32, **scales)
    dense = (new.normal(2 * width, D, std=D**-0.5), new.normal(D, width, std=width**-0.5))
    span = None if local == experts else [0, local]
    while True:
        ids = routed(new, tokens, experts, routing)
        weights = new.uniform(tokens, CHOSEN, high=ROUTED_SCALE / CHOSEN)
        shared_weights = dense if shared else (None, None)
        yield new.normal(tokens, D), *gate_up, *down, weights, ids, *shared_weights, span


def work(
    x: Tensor, gate_up: Tensor, gate_up_scale: Tensor, down: Tensor, down_scale: Tensor,
    weights: Tensor, ids: Tensor, shared_gate_up: Tensor | None, shared_down: Tensor | None,
    span: list[int] | None,
) -> Work:  # fmt: skip
    here = ids[(ids >= 0) & (ids < len(gate_up))]
    packed = (gate_up, gate_up_scale, down, down_scale)
    read = len(here.unique()) * sum(size_of(t) / len(t) for t in packed)
    width, d = down.shape[2] * 8, x.shape[1]
    rows = len(here) + (len(x) if shared_gate_up is not None else 0)
    read += size_of(x, weights, ids, shared_gate_up, shared_down)
    return Work(read, size_of(x), 6 * rows * width * d)


def case(
    tokens: int, width: int = F, local: int = EXPERTS, experts: int = EXPERTS,
    routing: str = "uniform", shared: bool = False, full: bool = True,
) -> BenchCase:  # fmt: skip
    sizes = {"tokens": tokens, "width": width, "local": local, "experts": experts,
             "routing": routing, "shared": shared}  # fmt: skip
    what = f"{experts} experts" if local == experts else f"{local} of {experts} experts"
    series = f"{what}, width {width:,}, {routing}" + ", with the shared one" * shared
    name = f"{tokens_text(tokens)}, {series}"
    built = partial(calls, **sizes)
    return BenchCase("moe_experts_int4", name, built, work, full, series, tokens, "tokens")


CASES = [
    *(case(t, full=t not in (1, 8, 16, 64)) for t in DECODE),
    *(case(t, local=RESIDENT, experts=RESIDENT, full=t != 1024) for t in (64, *PREFILL)),
    *(case(t, width=F // ranks) for ranks in (2, 4, 8, 16) for t in (1, 8, 64)),
    *(case(t, local=EXPERTS // 8, full=t != 64) for t in (1, 64, 1024)),
    *(case(t, local=RESIDENT, experts=RESIDENT, routing="skewed") for t in (64, 1024)),
    *(case(t, local=RESIDENT, experts=RESIDENT, routing="one expert") for t in (64, 1024)),
    *(case(t, shared=True) for t in (1, 8)),
]
test_moe_experts_int4 = benchmarks(CASES)
