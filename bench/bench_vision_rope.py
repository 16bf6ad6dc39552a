"""Two-dimensional RoPE in place on q and k of the packed qkv: memory alone decides."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kimi_ops.bench import Args, BenchCase, Maker, Work
from kimi_ops.bench.case import size_of
from kimi_ops.bench.cases._sizes import GRIDS, VISION_DIM, VISION_HEADS
from kimi_ops.bench.pytest_case import benchmarks


def calls(new: Maker, grids: list[list[int]]) -> Iterator[Args]:
    patches = sum(t * h * w for t, h, w in grids)
    while True:
        yield new.normal(patches, 3, VISION_HEADS, VISION_DIM), new.ints(grids, torch.int64)


def work(qkv: Tensor, grids: Tensor) -> Work:
    both = size_of(qkv) * 2 / 3  # v is not touched
    return Work(read=both, written=both)


CASES = [
    BenchCase("vision_rope", name, partial(calls, grids=grids), work,
              name not in ("picture at the limit, 1792x1792", "mixed batch of pictures"))
    for name, grids in GRIDS.items()
]  # fmt: skip
test_vision_rope = benchmarks(CASES)
