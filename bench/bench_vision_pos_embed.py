"""The learned table resampled to each picture and clip, added to the patches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kimi_ops.bench import Args, BenchCase, Maker, Work
from kimi_ops.bench.case import size_of
from kimi_ops.bench.cases._sizes import GRIDS, VISION_WIDTH
from kimi_ops.bench.pytest_case import benchmarks


def calls(new: Maker, grids: list[list[int]]) -> Iterator[Args]:
    table = new.normal(64, 64, VISION_WIDTH)
    while True:
        x = new.normal(sum(t * h * w for t, h, w in grids), VISION_WIDTH)
        yield x, table, new.ints(grids, torch.int64)


def work(x: Tensor, table: Tensor, grids: Tensor) -> Work:
    return Work(read=size_of(x, table), written=size_of(x))


CASES = [
    BenchCase("vision_pos_embed", name, partial(calls, grids=grids), work,
              name not in ("picture 896x896", "mixed batch of pictures"))
    for name, grids in GRIDS.items()
]  # fmt: skip
test_vision_pos_embed = benchmarks(CASES)
