"""Absorbed decode attention over the paged latent cache: 121 operations a byte with 64 heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch import Tensor

from kimi_ops.bench import Args, BenchCase, Maker, Work
from kimi_ops.bench.cases import _decode
from kimi_ops.bench.cases._sizes import SCALE, C
from kimi_ops.bench.pytest_case import benchmarks


def calls(new: Maker, *sizes: int) -> Iterator[Args]:
    for args in _decode.queries_and_cache(new, *sizes):
        yield *args, SCALE, C


def work(q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, scale: float, c: int) -> Work:
    rows = q.shape[:3].numel()
    return replace(_decode.work(q, cache, lengths), written=rows * (c * q.element_size() + 4))


CASES = [
    BenchCase("mla_decode", _decode.name(*sizes), partial(_decode.called, calls, sizes), work,
              sizes in _decode.FULL, *_decode.series(*sizes))
    for sizes in (*_decode.ORDINARY, *_decode.FULL)
]  # fmt: skip
test_mla_decode = benchmarks(CASES)
