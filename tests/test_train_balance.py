"""The selection bias moves an unbalanced router towards balance; so does a sequence's loss."""

from __future__ import annotations

import itertools

import pytest
import torch

import kimi_ops
from kimi_ops.model.errors import KimiError
from kimi_ops.train.balance import ExpertLoad, sequence_balance_loss, update_bias_

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


def _plain_loss(scores, ids, starts, alpha):
    """Equations 17 to 20, a number after the other."""
    losses = []
    for start, stop in itertools.pairwise(starts):
        tokens, loss = range(start, stop), 0.0
        for i in range(E):
            f = E / (K * len(tokens)) * sum(i in ids[t].tolist() for t in tokens)
            p = sum(scores[t, i] / sum(scores[t, j] for j in range(E)) for t in tokens)
            loss = loss + alpha * f * p / len(tokens)
        losses.append(loss)
    return sum(losses) / len(losses)


def test_sequence_loss_is_that_of_the_equations():
    scores = torch.rand(12, E, dtype=torch.float64).requires_grad_()
    ids = scores.topk(K).indices.int()
    expected = _plain_loss(scores, ids, [0, 5, 6, 12], 0.25)
    offsets = torch.tensor([0, 0, 5, 6, 6, 12], dtype=torch.int32)  # two have no tokens
    found = sequence_balance_loss(scores, ids, offsets, 0.25)
    torch.testing.assert_close(found, expected)
    ours, plain = (torch.autograd.grad(loss, scores)[0] for loss in (found, expected))
    torch.testing.assert_close(ours, plain)
    few = scores.detach()[:3].clone().requires_grad_()
    offsets = torch.tensor([0, 1, 3])
    assert torch.autograd.gradcheck(lambda s: sequence_balance_loss(s, ids[:3], offsets, 0.25), few)


def test_sequence_loss_of_balance_and_of_collapse():
    even = torch.arange(E).view(-1, K)
    offsets = torch.tensor([0, len(even)])
    scores = torch.full((len(even), E), 0.5)
    assert sequence_balance_loss(scores, even, offsets, 0.125).item() == pytest.approx(0.125)
    collapsed = torch.tensor([[0, 1]]).expand(len(even), K)
    scores = (torch.arange(E) < K).float().expand(len(even), E)
    found = sequence_balance_loss(scores.bfloat16(), collapsed, offsets, 0.125)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(0.125 * E / K)
    assert sequence_balance_loss(scores[:0], even[:0], torch.tensor([0]), 1.0).item() == 0
    assert sequence_balance_loss(scores * 0, even, offsets, 1.0).item() == 0


def test_sequence_loss_evens_the_load_of_a_sequence():
    """Gradient descent on the loss alone, on a router that prefers two experts."""
    x = torch.randn(64, D)
    gate = torch.randn(E, D) * 0.2
    x[:, 0], gate[:K, 0] = 1, 3.0
    gate.requires_grad_()
    offsets, violations = torch.tensor([0, 64]), []
    for _ in range(200):
        scores = (x @ gate.T).sigmoid()
        ids = scores.topk(K).indices
        load = ExpertLoad(E)
        load.add(ids)
        violations.append(load.violation())
        (gradient,) = torch.autograd.grad(sequence_balance_loss(scores, ids, offsets, 1.0), gate)
        gate.data -= 0.5 * gradient
    assert violations[0] > 6
    assert violations[-1] < 0.6 * violations[0]


def test_bad_arguments_of_the_sequence_loss_are_errors():
    scores, ids, offsets = torch.rand(4, E), torch.zeros(4, K).long(), torch.tensor([0, 4])
    for words, args in {
        r"scores must be \[T, E\]": (scores[0], ids, offsets),
        r"ids must be \[T, K\]": (scores, ids.float(), offsets),
        r"ids must be \[4, K\]": (scores, ids[:3], offsets),
        "0 .. 15, got 16": (scores, ids + E, offsets),
        "cu_seqlens must be": (scores, ids, offsets.float()),
        r"from 0 to 4, got \[0, 3\]": (scores, ids, torch.tensor([0, 3])),
        r"from 0 to 4, got \[0, 5, 4\]": (scores, ids, torch.tensor([0, 5, 4])),
    }.items():
        with pytest.raises(KimiError, match=words):
            sequence_balance_loss(*args, 1.0)
