"""`add_rms_norm`: every backend against the oracle; the fused form equals the two steps."""

from __future__ import annotations

import torch

import kimi_ops
from kimi_ops.testing import check_op

OP = "add_rms_norm"


def test_matches_oracle(backend, case):
    check_op(OP, case.args(), backend)


def test_norm_is_that_of_the_rounded_sum(backend):
    x, residual = torch.randn(9, 512).bfloat16(), torch.randn(9, 512).bfloat16()
    weight = torch.randn(512).bfloat16()
    with kimi_ops.use_backend(add_rms_norm=backend, rms_norm="reference"):
        y, h = kimi_ops.add_rms_norm(x, residual, weight, 1e-5)
        assert torch.equal(h, x + residual)
        expected = kimi_ops.rms_norm(h, weight, 1e-5)
    # One bfloat16 step: backends may differ from the reference in the order of the sum.
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=0)


def test_outputs_alias_no_input(backend):
    x, residual = torch.randn(2, 64), torch.zeros(2, 64)
    with kimi_ops.use_backend(add_rms_norm=backend):
        y, h = kimi_ops.add_rms_norm(x, residual, torch.ones(64), 1e-5)
    pointers = {t.untyped_storage().data_ptr() for t in (x, residual, y, h)}
    assert len(pointers) == 4
