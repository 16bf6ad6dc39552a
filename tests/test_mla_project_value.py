"""`mla_project_value`: every backend against the oracle, and the oracle head by head."""

from __future__ import annotations

import torch

from kimi_ops.reference.mla_project_value import mla_project_value
from kimi_ops.testing import check_op

OP = "mla_project_value"


def test_matches_oracle(backend, case):
    check_op(OP, case.args(), backend)


def test_oracle_head_by_head():
    out, w_uv = torch.randn(5, 3, 16).double(), torch.randn(3, 7, 16).double()
    expected = torch.stack([out[:, h] @ w_uv[h].T for h in range(3)], dim=1)
    torch.testing.assert_close(mla_project_value(out, w_uv), expected)
