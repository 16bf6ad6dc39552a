"""The same cases under pytest-benchmark, `pytest bench --benchmark-only`: its compare, its JSON.

pytest-benchmark times one contestant after the other, without ceilings and without peers; figures
of this project come from `kimi-ops bench`, which lets them take turns.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch

from kimi_ops._dispatch import get_op, resolve
from kimi_ops.bench.case import BenchCase
from kimi_ops.bench.measure import TooLarge, checked, rotation


def benchmarks(cases: Sequence[BenchCase]) -> Callable[..., None] | None:
    """A test function over the cases of one op; None where pytest is not installed."""
    if importlib.util.find_spec("pytest") is None:
        return None
    pytest = importlib.import_module("pytest")
    ordinary = [case for case in cases if not case.full]

    def test(benchmark: Any, case: BenchCase) -> None:
        op = get_op(case.op)
        benchmark.group = f"{case.op}, {case.name}"
        with torch.inference_mode():
            try:
                calls = rotation(case, torch.device("cpu"))
            except TooLarge as error:
                pytest.skip(str(error))
            checked(op, resolve(op.name, *calls[0]), calls[0])
            numbers = count()
            benchmark(lambda: op.overload(*calls[next(numbers) % len(calls)]))

    found: Callable[..., None] = pytest.mark.parametrize("case", ordinary, ids=str)(test)
    return found
