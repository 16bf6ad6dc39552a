"""The comparison with the oracle, apart from any op: what it accepts and what it refuses."""

from __future__ import annotations

import pytest
import torch

from kimi_ops.testing import assert_close_to_oracle
from kimi_ops.testing.oracle import assert_no_lean

ORACLE = torch.linspace(-4, 4, 64, dtype=torch.float64).view(4, 16)
BASELINE = ORACLE.bfloat16()


def test_rounding_passes_and_twice_the_budget_does_not():
    worst = assert_close_to_oracle("y", BASELINE, BASELINE, ORACLE)
    assert 0 < worst.ratio <= 0.5
    assert worst.elements == 64
    wrong = BASELINE.clone()
    wrong[2, 5] += 2 * worst.budget + 0.1
    with pytest.raises(AssertionError, match=r"1 elements over budget; worst y\[2, 5\] = "):
        assert_close_to_oracle("y", wrong, BASELINE, ORACLE)


def test_budget_is_of_the_row_and_not_of_the_tensor():
    baseline = BASELINE.clone()
    baseline[0] += 1  # plain torch is bad in row 0, so a kernel may be too; elsewhere it may not
    shifted = BASELINE.clone()
    shifted[0] += 1
    assert_close_to_oracle("y", shifted, baseline, ORACLE)
    shifted = BASELINE.clone()
    shifted[1] += 1
    with pytest.raises(AssertionError, match="16 elements over budget"):
        assert_close_to_oracle("y", shifted, baseline, ORACLE)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_special_values_must_be_in_their_places(value):
    oracle, right = ORACLE.clone(), BASELINE.clone()
    oracle[1, 2] = right[1, 2] = value
    assert_close_to_oracle("y", right, right, oracle)
    with pytest.raises(AssertionError, match=r"y\[1, 2\] .* misplaced"):
        assert_close_to_oracle("y", BASELINE, right, oracle)
    with pytest.raises(AssertionError, match=r"y\[1, 2\] .* misplaced"):
        assert_close_to_oracle("y", right, BASELINE, ORACLE)


def test_overflow_of_the_dtype_is_infinity():
    oracle = torch.tensor([1e6, -1e6], dtype=torch.float64)
    result = oracle.half()
    assert result.isinf().all()
    assert_close_to_oracle("y", result, result, oracle)


def test_integers_are_equal_or_wrong():
    ids = torch.arange(6, dtype=torch.int32)
    assert assert_close_to_oracle("ids", ids, ids, ids).elements == 6
    with pytest.raises(AssertionError, match=r"ids\[3\] differs: 4, oracle 3 \(1 of 6 elements\)"):
        assert_close_to_oracle("ids", ids + (ids == 3), ids, ids)


def test_shape_and_dtype_are_part_of_the_result():
    with pytest.raises(AssertionError, match="y: shape"):
        assert_close_to_oracle("y", BASELINE[:1], BASELINE, ORACLE)
    with pytest.raises(AssertionError, match=r"y: torch.float32, expected torch.bfloat16"):
        assert_close_to_oracle("y", BASELINE.float(), BASELINE, ORACLE)


def test_zero_where_the_oracle_is_zero():
    zero = torch.zeros(2, 3)
    assert assert_close_to_oracle("y", zero, zero, zero.double()).error == 0
    with pytest.raises(AssertionError, match="over budget"):
        assert_close_to_oracle("y", zero + 1e-30, zero, zero.double())


def test_lean_of_whole_rows_averages_out_over_rows_only():
    """Rows off as a whole in plain torch too: a softmax's sum is rounded once for all of a row."""
    torch.manual_seed(0)
    exact = torch.rand(16, 512, dtype=torch.float64) + 0.5
    signs = torch.tensor([1.0, -1.0] * 8, dtype=torch.float64)[:, None]
    naive = 2e-7 * exact * signs
    error = 2e-7 * exact * torch.where(torch.arange(16)[:, None] < 12, 1.0, -1.0)  # leans by 1e-7
    assert_no_lean("y", error, naive, exact, 2.0**-24)
    # Where plain torch's errors of the same size are independent of each other, that is a lean.
    naive = naive.abs() * torch.randint(0, 2, exact.shape).mul(2).sub(1)
    with pytest.raises(AssertionError, match="all errors lean to one side"):
        assert_no_lean("y", error, naive, exact, 2.0**-24)
