"""`moe_sort`: every backend against the oracle, and the oracle against Python's own sort."""

from __future__ import annotations

from kimi_ops.reference.moe_sort import moe_sort
from kimi_ops.testing import check_op

OP = "moe_sort"


def test_matches_oracle(backend, case):
    check_op(OP, case.args(), backend)


def test_oracle_is_a_stable_sort(case):
    ids, experts, expert_range = case.args()
    first, last = expert_range or (0, experts)
    flat = ids.flatten().tolist()

    def bucket(pair):
        return flat[pair] - first if first <= flat[pair] < last else last - first

    order, offsets = moe_sort(ids, experts, expert_range)
    assert order.tolist() == sorted(range(len(flat)), key=bucket)
    counts = [sum(i == e for i in flat) for e in range(first, last)]
    assert offsets.tolist() == [sum(counts[:e]) for e in range(last - first + 1)]
