"""The selection bias moves an unbalanced router towards balance."""

from __future__ import annotations

import pytest
import torch

import kimi_ops
from kimi_ops.model.errors import KimiError
from kimi_ops.train.balance import ExpertLoad, update_bias_

E, K, D = 16, 2, 24


def test_unbalanced_router_becomes_balanced():
    """Two micro-batches a step; some experts start with far larger scores than others."""
    gate = torch.randn(E, D) * 0.2
    gate[:, 0] = torch.linspace(-1.5, 1.5, E)  # the first channel is 1 in every token
    bias = torch.zeros(E)
    load, violations = ExpertLoad(E), []
    for _ in range(250):
        load.reset()
        for _ in range(2):
            x = torch.randn(256, D)
            x[:, 0] = 1
            load.add(kimi_ops.moe_route(x, gate, bias, K)[1])
        assert int(load.counts.sum()) == 2 * 256 * K
        violations.append(load.violation())
        update_bias_(bias, load.counts, speed=5e-3)
    assert violations[0] > 2
    assert sum(violations[-20:]) / 20 < 0.35
    assert 0.25 < float(load.share().min()) < float(load.share().max()) < 4
    assert torch.equal(bias.argsort(), torch.arange(E).flip(0)) or bias[0] > bias[-1]


def test_bias_moves_by_the_sign_alone():
    bias = torch.tensor([0.5, 0.0, -0.25, 0.0])
    update_bias_(bias, torch.tensor([100, 4, 2, 2]), speed=0.125)  # the mean is 27
    assert bias.tolist() == [0.375, 0.125, -0.125, 0.125]
    update_bias_(bias, torch.tensor([9, 3, 6, 6]), speed=0.125)  # two are at the mean
    assert bias.tolist() == [0.25, 0.25, -0.125, 0.125]
    update_bias_(bias, torch.zeros(4, dtype=torch.int64))
    assert bias.tolist() == [0.25, 0.25, -0.125, 0.125]


def test_load_is_summed_over_micro_batches():
    load = ExpertLoad(4)
    assert load.share().tolist() == [1, 1, 1, 1]
    load.add(torch.tensor([[0, 1], [0, 2]], dtype=torch.int32))
    load.add(torch.tensor([[0, 1]]))
    load.add(torch.empty(0, 2, dtype=torch.int32))
    assert load.counts.tolist() == [3, 2, 1, 0]
    assert load.share().tolist() == [2, pytest.approx(4 / 3), pytest.approx(2 / 3), 0]
    assert load.violation() == 1
    load.reset()
    assert not load.counts.any()


def test_bad_arguments_are_errors():
    with pytest.raises(KimiError, match=r"0 .. 3, got 0 .. 4"):
        ExpertLoad(4).add(torch.tensor([[0, 4]]))
    with pytest.raises(KimiError, match="experts must be at least 1"):
        ExpertLoad(0)
    counts = torch.ones(4, dtype=torch.int64)
    with pytest.raises(KimiError, match="float32"):
        update_bias_(torch.zeros(4, dtype=torch.bfloat16), counts)
    with pytest.raises(KimiError, match="counts must be"):
        update_bias_(torch.zeros(5), counts)
    with pytest.raises(KimiError, match="speed"):
        update_bias_(torch.zeros(4), counts, speed=-1.0)
