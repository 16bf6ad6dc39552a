"""`moe_select`: every backend against the oracle, and the promises about ids."""

from __future__ import annotations

import pytest
import torch
from op_calls import on_device

import kimi_ops
from kimi_ops.reference.moe_select import moe_select
from kimi_ops.testing import check_op

OP = "moe_select"


def test_matches_oracle(backend, case):
    check_op(OP, case.args(), backend)


def test_ids_are_valid_and_distinct_whatever_the_values(backend, case):
    logits, bias, top_k, n_group, topk_group, scale, normalize = on_device(case.args())
    with kimi_ops.use_backend(moe_select=backend):
        _, ids = kimi_ops.moe_select(
            logits,
            bias,
            top_k,
            n_group=n_group,
            topk_group=topk_group,
            scale=scale,
            normalize=normalize,
        )
    assert ids.dtype == torch.int32
    assert bool(((ids >= 0) & (ids < logits.shape[1])).all())
    assert all(len(set(row)) == top_k for row in ids.tolist())


def test_nan_row_takes_the_first_experts(backend):
    logits = torch.full((2, 16), torch.nan)
    logits[1] = torch.arange(16.0)
    with kimi_ops.use_backend(moe_select=backend):
        weights, ids = kimi_ops.moe_select(logits, torch.zeros(16), 4)
    assert ids.tolist() == [[0, 1, 2, 3], [15, 14, 13, 12]]
    assert weights[0].isnan().all()
    assert weights[1].sum().item() == pytest.approx(1)


def test_ties_go_to_the_lower_id(backend):
    logits = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 1.0]])
    with kimi_ops.use_backend(moe_select=backend):
        _, ids = kimi_ops.moe_select(logits, torch.zeros(6), 5)
    assert ids.tolist() == [[1, 3, 5, 0, 2]]


def test_bias_steers_but_never_weighs():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    bias = torch.tensor([0.0, 0.0, 0.0, 10.0], dtype=torch.float64)
    weights, ids = moe_select(logits, bias, 2, scale=2.827)
    score = logits.sigmoid()[0]
    assert ids.tolist() == [[3, 0]]
    expected = score[[3, 0]] / (score[3] + score[0] + 1e-20) * 2.827
    torch.testing.assert_close(weights[0], expected)


def test_groups_keep_the_best_pair_sums():
    # Group 1 has the single best expert, group 0 the best pair: with one group kept, 0 wins.
    score = torch.tensor([[0.8, 0.7, 0.9, 0.1]], dtype=torch.float64)
    _, ids = moe_select(score.logit(), torch.zeros(4), 1, n_group=2, topk_group=1)
    assert ids.tolist() == [[0]]


def test_values_that_round_to_one_key_keep_their_order(backend):
    # One unit in the last place apart: a kernel that compares fewer bits must notice.
    bias = torch.full((40,), -100.0)
    bias[[3, 9, 21, 30]] = torch.tensor([1.0, 1 + 2**-23, 1 + 2**-22, 1.0])
    with kimi_ops.use_backend(moe_select=backend):
        _, ids = kimi_ops.moe_select(torch.full((1, 40), -104.0), bias, 4)
    assert ids.tolist() == [[21, 9, 3, 30]]


def test_infinite_biases(backend):
    bias = torch.zeros(12)
    bias[[2, 7]], bias[[0, 1]] = torch.inf, -torch.inf
    with kimi_ops.use_backend(moe_select=backend):
        _, ids = kimi_ops.moe_select(torch.arange(12.0)[None], bias, 12)
    assert ids.tolist() == [[2, 7, 11, 10, 9, 8, 6, 5, 4, 3, 0, 1]]
