"""Full attention within each picture or clip, head dimension 72."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import accumulate

from torch import Tensor

from kimi_ops.bench import Args, BenchCase, Maker, Work
from kimi_ops.bench.case import size_of
from kimi_ops.bench.cases._sizes import GRIDS, VISION_DIM, VISION_HEADS
from kimi_ops.bench.pytest_case import benchmarks


def calls(new: Maker, grids: list[list[int]], heads: int) -> Iterator[Args]:
    lengths = [t * h * w for t, h, w in grids]
    ends = new.ints([0, *accumulate(lengths)])
    while True:
        q, k, v = new.normal(sum(lengths), 3, heads, VISION_DIM).unbind(1)
        yield q, k, v, ends, max(lengths), VISION_DIM**-0.5


def work(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, scale: float) -> Work:
    pairs = q.shape[1] * int(ends.diff().long().square().sum())
    return Work(3 * size_of(q), size_of(q), 4 * pairs * VISION_DIM)


CASES = [
    BenchCase("vision_attention", name, partial(calls, grids=grids, heads=VISION_HEADS), work,
              name not in ("picture 896x896", "mixed batch of pictures"))
    for name, grids in GRIDS.items()
]  # fmt: skip
test_vision_attention = benchmarks(CASES)
