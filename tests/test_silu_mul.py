"""`silu_mul`: every backend against the oracle, and the oracle against the formula."""

from __future__ import annotations

import math

import torch

from kimi_ops.reference.silu_mul import silu_mul
from kimi_ops.testing import check_op

OP = "silu_mul"


def test_matches_oracle(backend, case):
    check_op(OP, case.args(), backend)


def test_gate_comes_first():
    gate, up = 1.5, -0.25
    y = silu_mul(torch.tensor([gate, up], dtype=torch.float64))
    assert math.isclose(y.item(), gate / (1 + math.exp(-gate)) * up, rel_tol=1e-14)
