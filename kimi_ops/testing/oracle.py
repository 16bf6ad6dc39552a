"""Comparison of a kernel's results with its oracle, the reference in float64.

The tolerance is no constant: it comes from the data. Plain low-precision torch (the reference in
the kernel's own dtype, the *baseline*) makes some error on the same inputs; a kernel may make twice
that error plus one rounding::

    budget = 2 * (max over the row of |baseline - oracle| + eps / 2 * |oracle|)

A row is the last dimension (more of them where it is short): its elements share inputs and scale,
and the largest error among them says more than the one that the same element happened to have.
Where an op's errors are relative by nature (norms, SwiGLU) the row's largest *relative* error
counts, so that a channel of small weight is held to its own size.

An error that is the same everywhere hides below such a budget, so the mean of the signed errors is
held to what rounding can add up to. Where the oracle is NaN or infinite the result must be so too.
Integers must equal the baseline's: what is chosen by float32 scores is chosen by float32 scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ROW = 16  # a row's largest error is taken over at least so many elements, where there are as many


@dataclass(frozen=True)
class Comparison:
    """The worst element of one result.

    Attributes:
        name: which result.
        index: of the element whose error is the largest part of its budget.
        actual, oracle: its two values.
        error, budget: their distance, and what was allowed.
        elements: how many were compared.
    """

    name: str
    index: tuple[int, ...]
    actual: float
    oracle: float
    error: float
    budget: float
    elements: int

    @property
    def ratio(self) -> float:
        """Error over budget; above 1 is wrong."""
        return self.error / self.budget if self.budget > 0 else float(self.error > 0) * torch.inf

    def __str__(self) -> str:
        return (
            f"{self.name}{list(self.index)} = {self.actual!r}, oracle {self.oracle!r}: "
            f"error {self.error:.3g} is {self.ratio:.3g} of its budget {self.budget:.3g} "
            f"({self.elements} elements)"
        )


def assert_close_to_oracle(
    name: str, actual: Tensor, baseline: Tensor, oracle: Tensor, *, relative: bool = False
) -> Comparison:
    """Asserts that one result is within the budget, and returns its worst element.

    Args:
        name: for the message.
        actual: the kernel's result.
        baseline: plain torch's result in the same dtype, same shape.
        oracle: the float64 truth, same shape; not looked at for integers.
        relative: the op's errors are relative by nature.

    Raises:
        AssertionError: another shape or dtype than the baseline's, NaN or inf in other places
            than the oracle's, an integer that differs, an element over its budget, or errors that
            lean to one side; with the worst element, its index and both values.
    """
    assert actual.shape == baseline.shape == oracle.shape, (
        f"{name}: shape {list(actual.shape)}, expected {list(oracle.shape)}"
    )
    assert actual.dtype == baseline.dtype, f"{name}: {actual.dtype}, expected {baseline.dtype}"
    if actual.numel() == 0:
        return Comparison(name, (), 0.0, 0.0, 0.0, 0.0, 0)
    if not actual.dtype.is_floating_point:
        wrong = (actual != baseline).nonzero()
        assert len(wrong) == 0, _first_wrong(name, actual, baseline, wrong, "differs")
        return Comparison(name, (), 0.0, 0.0, 0.0, 0.0, actual.numel())

    # A value beyond the dtype's range is rounded to infinity by any correct kernel.
    expected = oracle.to(actual.dtype)
    for test, what in ((torch.isnan, "NaN"), (torch.isposinf, "inf"), (torch.isneginf, "-inf")):
        wrong = (test(actual) != test(expected)).nonzero()
        assert len(wrong) == 0, _first_wrong(name, actual, oracle, wrong, f"{what} misplaced")

    finite = expected.isfinite() & baseline.isfinite()
    zero = oracle.new_zeros(())
    exact = torch.where(finite, oracle, zero)
    error = torch.where(finite, actual.double() - exact, zero)
    naive = torch.where(finite, baseline.double() - exact, zero)
    budget = budget_of(naive, exact, actual.dtype, relative=relative)
    worst = worst_within(name, actual, oracle, error, budget)
    assert_no_lean(name, error, naive, exact, torch.finfo(actual.dtype).eps / 2)
    return worst


def budget_of(
    naive: Tensor, exact: Tensor, dtype: torch.dtype, *, relative: bool = False
) -> Tensor:
    """What each element of a result in ``dtype`` may be off.

    Args:
        naive: errors of the baseline.
        exact: the oracle, finite.
        dtype: of the result.
        relative: as in `assert_close_to_oracle`.
    """
    if relative:
        share = torch.where(exact == 0, 0, naive.abs() / exact.abs())
        allowed = _row_maximum(share) * exact.abs()
    else:
        allowed = _row_maximum(naive.abs()).expand_as(exact)
    info = torch.finfo(dtype)
    # Below the smallest subnormal step no kernel can be closer than rounding to it.
    return 2 * (allowed + info.eps / 2 * exact.abs()) + info.smallest_normal * info.eps


def worst_within(
    name: str, actual: Tensor, oracle: Tensor, error: Tensor, budget: Tensor
) -> Comparison:
    """Asserts that each error is within its budget; returns the worst element."""
    at = int((error.abs() / budget).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), actual.shape))
    worst = Comparison(
        name,
        index,
        float(actual[index]),
        float(oracle[index]),
        float(error[index].abs()),
        float(budget[index]),
        actual.numel(),
    )
    over = int((error.abs() > budget).sum())
    assert over == 0, f"{over} elements over budget; worst {worst}"
    return worst


def _row_maximum(x: Tensor) -> Tensor:
    """Maximum over the fewest trailing dimensions that hold `_ROW` elements, kept for broadcast."""
    dims, elements = 0, 1
    while dims < x.dim() and elements < _ROW:
        dims += 1
        elements *= x.shape[-dims]
    return x.amax(dim=tuple(range(-dims, 0)), keepdim=True) if dims else x


def assert_no_lean(name: str, error: Tensor, naive: Tensor, exact: Tensor, rounding: float) -> None:
    """The mean error, signed so that growing counts as positive, relative to the mean magnitude.

    Independent roundings average out: n errors of relative size r leave about r / sqrt(n), of which
    four times are allowed; a quarter of a rounding always is, since few kernels round to nearest in
    every inner step, and twice what plain torch itself leans. What a row (the last dimension) has
    in common, such as the rounded sum of a softmax, averages out over rows only, and is counted so.
    """
    magnitude = float(exact.abs().sum())
    if magnitude == 0:
        return
    lean = abs(float((error * exact.sign()).sum())) / magnitude
    usual = abs(float((naive * exact.sign()).sum())) / magnitude
    by_row = (naive * exact.sign()).sum(-1) if naive.dim() else naive
    errors = naive.square().sum().maximum(by_row.square().sum())
    spread = float(errors.sqrt() + rounding * exact.square().sum().sqrt()) / magnitude
    allowed = 2 * usual + max(rounding / 2, 4 * spread)
    assert lean <= allowed, (
        f"{name}: all errors lean to one side: {lean:.3g} of the magnitude on average, where "
        f"{allowed:.3g} is what rounding leaves"
    )


def _first_wrong(name: str, actual: Tensor, oracle: Tensor, wrong: Tensor, what: str) -> str:
    index = tuple(wrong[0].tolist())
    return (
        f"{name}{list(index)} {what}: {actual[index].item()!r}, oracle {oracle[index].item()!r} "
        f"({len(wrong)} of {actual.numel()} elements)"
    )
