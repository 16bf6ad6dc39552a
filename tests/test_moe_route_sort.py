"""`moe_route_sort`: every backend against the oracle, the oracle against its halves; launches."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import kimi_ops
from kimi_ops import _arrivals
from kimi_ops.testing import cases, check_op
from kimi_ops.testing.check import bitwise_equal
from kimi_ops.testing.inputs import moe

OP = "moe_route_sort"


def test_matches_oracle(backend, case):
    check_op(OP, case.args(), backend)


def test_oracle_is_the_router_and_then_the_sort(case):
    *args, expert_range = case.args()
    named = dict(zip(("n_group", "topk_group", "scale", "normalize"), args[4:], strict=True))
    with kimi_ops.use_backend("reference"):
        found = kimi_ops.moe_route_sort(*args[:4], **named, expert_range=expert_range)
        weights, ids = kimi_ops.moe_route(*args[:4], **named)
        tables = kimi_ops.moe_sort(ids, len(args[1]), expert_range=expert_range)
    for one, other in zip(found, (weights, ids, *tables), strict=True):
        assert bitwise_equal(one, other)


def test_every_pair_is_where_its_expert_is():
    """Against the definition itself, without a sort."""
    x, gate, bias, top_k, *_ = next(c for c in cases(OP) if c.name == "bf16-64").args()
    _, ids, order, offsets = kimi_ops.moe_route_sort(x, gate, bias, top_k)
    for expert in range(len(gate)):
        mine = order[offsets[expert] : offsets[expert + 1]].tolist()
        assert mine == (ids.flatten() == expert).nonzero().flatten().tolist()


def _routed(language, args, seed=None):
    """Results and names of the launches, executed as PTX."""
    needs = {"triton": "triton", "cuda": "cuda.bindings"}[language]
    pytest.importorskip(needs, reason="needs the compiler of its kernels")
    from kimi_ops.testing.runner import emulated

    x, gate, bias, top_k, *_ = args
    with emulated(arch=80, seed=seed) as emulation, kimi_ops.use_backend(f"{OP}={language}"):
        results = kimi_ops.moe_route_sort(x, gate, bias, top_k)
    return results, [name for name, _ in emulation.launches]


def _args(tokens):
    generator = torch.Generator().manual_seed(tokens)
    with torch.device("cpu"):  # where the generator is
        return moe.moe_route(generator, tokens, 64, 48, 4)


@pytest.mark.parametrize("language", ["triton", "cuda"])
@pytest.mark.parametrize(("tokens", "launches"), [(1, 1), (65, 3)])
def test_one_launch_up_to_64_tokens(language, tokens, launches):
    _, names = _routed(language, _args(tokens))
    assert len(names) == launches
    assert any(name.startswith("moe_sort") for name in names) == (launches == 3)


@pytest.mark.parametrize("language", ["triton", "cuda"])
def test_leaves_the_counters_at_zero(language):
    """Of several groups of tokens, and that of the groups."""
    kept = torch.zeros(_arrivals.PER_LAUNCH, dtype=torch.int32)
    with mock.patch.object(_arrivals, "counters", return_value=kept):
        first, names = _routed(language, _args(20), seed=1)
        assert len(names) == 1
        assert not kept.any()
        again, _ = _routed(language, _args(20), seed=2)  # in another order of the blocks
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
