"""`rms_norm`: every backend against the oracle, and the oracle against torch and transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

import kimi_ops
from kimi_ops.reference.rms_norm import rms_norm
from kimi_ops.testing import check_op

OP = "rms_norm"


def test_matches_oracle(backend, case):
    check_op(OP, case.args(), backend)


def test_oracle_is_torchs_definition():
    x, weight = torch.randn(5, 96, dtype=torch.float64), torch.randn(96, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (96,), weight, 1e-5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounds_where_transformers_does(dtype):
    module = DeepseekV3RMSNorm(1536, eps=1e-5)
    module.weight.data = torch.randn(1536).to(dtype)
    x = torch.randn(33, 1536).to(dtype)
    with kimi_ops.use_backend("reference"):
        y = kimi_ops.rms_norm(x, module.weight.data, 1e-5)
    assert torch.equal(y, module(x).detach())


def test_eps_is_inside_the_root():
    x = torch.zeros(1, 4, dtype=torch.float64)
    x[0, 0] = 2e-3
    expected = 2e-3 / (1e-6 + 1e-2) ** 0.5
    y = rms_norm(x, torch.ones(4, dtype=torch.float64), 1e-2)
    assert y[0, 0].item() == pytest.approx(expected, rel=1e-12)
