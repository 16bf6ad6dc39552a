"""Un-absorbed causal attention: prompts alone and mixed, and a chunk behind a long prefix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate

from torch import Tensor

from kimi_ops.bench import Args, BenchCase, Maker, Work
from kimi_ops.bench.case import size_of
from kimi_ops.bench.cases._sizes import HEADS, NOPE, PREFILL, SCALE, R, V
from kimi_ops.bench.pytest_case import benchmarks


def calls(new: Maker, queries: Sequence[int], keys: Sequence[int], heads: int) -> Iterator[Args]:
    ends = [new.ints([0, *accumulate(lengths)]) for lengths in (queries, keys)]
    while True:
        q = new.normal(sum(queries), heads, NOPE + R)
        k = new.normal(sum(keys), heads, NOPE + R)
        v = new.normal(sum(keys), heads, V)
        yield q, k, v, *ends, max(queries), max(keys), SCALE, True


def work(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor,
    max_q: int, max_k: int, scale: float, causal: bool,
) -> Work:  # fmt: skip
    # Query i of n sees m - n + i + 1 of the m keys.
    lengths = zip(ends_q.diff().tolist(), ends_k.diff().tolist(), strict=True)
    pairs = q.shape[1] * sum(n * (m - n) + n * (n + 1) // 2 for n, m in lengths)
    out = q.shape[0] * q.shape[1] * (V * q.element_size() + 4)
    return Work(size_of(q, k, v), out, 2 * pairs * (NOPE + R + V))


def case(queries: Sequence[int], keys: Sequence[int], heads: int, full: bool) -> BenchCase:
    prefix = f" behind {keys[0] - queries[0]:,} others" if keys != queries else ""
    name = f"{' + '.join(f'{n:,}' for n in queries)} tokens{prefix}, {heads} heads"
    built = partial(calls, queries=queries, keys=keys, heads=heads)
    one = len(queries) == 1 and keys == queries
    series = (f"{heads} heads", queries[0], "tokens") if one else ("", 0, "")
    return BenchCase("mla_prefill", name, built, work, full, *series)


CASES = [
    *(case([t], [t], h, (t, h) != (2048, 64)) for h in HEADS for t in PREFILL),
    case([17, 900, 130, 450, 64], [17, 900, 130, 450, 64], 64, full=False),
    case([1024], [32768], 64, full=True),
]
test_mla_prefill = benchmarks(CASES)
