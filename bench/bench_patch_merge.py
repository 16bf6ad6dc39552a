"""From the encoder's last patches to the projector's input: norm, mean over frames, 2x2, norm."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kimi_ops.bench import Args, BenchCase, Maker, Work
from kimi_ops.bench.case import size_of
from kimi_ops.bench.cases._sizes import GRIDS, VISION_WIDTH
from kimi_ops.bench.pytest_case import benchmarks


def calls(new: Maker, grids: list[list[int]]) -> Iterator[Args]:
    norms = [new.normal(VISION_WIDTH) for _ in range(4)]
    merged = sum(h * w // 4 for _, h, w in grids)
    patches = sum(t * h * w for t, h, w in grids)
    while True:
        x = new.normal(patches, VISION_WIDTH)
        yield x, new.ints(grids, torch.int64), merged, *norms, 1e-5


def work(x: Tensor, grids: Tensor, merged: int, *_: Any) -> Work:
    return Work(read=size_of(x), written=merged * 4 * VISION_WIDTH * x.element_size())


CASES = [
    BenchCase("patch_merge", name, partial(calls, grids=grids), work,
              name not in ("picture at the limit, 1792x1792", "mixed batch of pictures"))
    for name, grids in GRIDS.items()
]  # fmt: skip
test_patch_merge = benchmarks(CASES)
