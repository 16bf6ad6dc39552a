"""`moe_sort`: every backend against the oracle, and the oracle against Python's own sort."""

from __future__ import annotations

import pytest

import kimi_ops
from kimi_ops.reference.moe_sort import moe_sort
from kimi_ops.testing import cases, check_op

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


@pytest.mark.parametrize("name", ["one", "foreign-range"])
def test_triton_sorts_in_one_launch(name):
    pytest.importorskip("triton", reason="needs triton: pip install 'triton>=3.4'")
    from kimi_ops.testing.runner import emulated

    ids, experts, expert_range = next(c for c in cases(OP) if c.name == name).args()
    with emulated(arch=80) as emulation, kimi_ops.use_backend(moe_sort="triton"):
        kimi_ops.moe_sort(ids, experts, expert_range=expert_range)
    assert [kernel for kernel, _ in emulation.launches] == ["moe_sort_kernel"]
