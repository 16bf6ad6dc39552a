"""Decode attention with the value projection in its second stage: what the model calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from kimi_ops.bench import Args, BenchCase, Maker, Work
from kimi_ops.bench.case import size_of
from kimi_ops.bench.cases import _decode
from kimi_ops.bench.cases._sizes import NOPE, SCALE, C, V
from kimi_ops.bench.pytest_case import benchmarks


def calls(new: Maker, *sizes: int) -> Iterator[Args]:
    heads = sizes[2]
    for args in _decode.queries_and_cache(new, *sizes):
        w_uv = new.normal(heads, NOPE + V, C, std=C**-0.5)[:, NOPE:]
        yield *args, w_uv, SCALE, C


def work(q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, w_uv: Tensor, *_: Any) -> Work:
    plain, rows = _decode.work(q, cache, lengths), q.shape[:3].numel()
    return replace(
        plain,
        read=plain.read + size_of(w_uv),
        written=rows * V * q.element_size(),
        flops=plain.flops + 2 * rows * C * V,
    )


CASES = [
    BenchCase("mla_decode_value", _decode.name(*sizes), partial(_decode.called, calls, sizes), work,
              sizes not in _decode.ORDINARY[1:2], *_decode.series(*sizes))
    for sizes in (*_decode.ORDINARY, *_decode.FULL)
]  # fmt: skip
test_mla_decode_value = benchmarks(CASES)
