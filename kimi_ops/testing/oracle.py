"""Comparison of a kernel with its oracle, the reference in float64.

The tolerance is no constant: it comes from the data. Plain low-precision torch (the reference in
the kernel's own dtype) makes some error on the same inputs; a kernel may make twice that error plus
one rounding band::

    budget = 2 * (max over the row of |baseline - oracle| + eps(dtype) * |oracle|)

A row is the last dimension: its elements share inputs and scale, and the largest error among them
says more than the one that the same element happened to have. Where the oracle is NaN or infinite
the result must be so too, and integer results must be equal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kimi_ops._dispatch import Op, get_op, use_backend


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
    name: str, actual: Tensor, baseline: Tensor, oracle: Tensor
) -> Comparison:
    """Asserts that one result is within the budget, and returns its worst element.

    Args:
        name: for the message.
        actual: the kernel's result.
        baseline: plain torch's result in the same dtype, same shape.
        oracle: the float64 (or integer) truth, same shape.

    Raises:
        AssertionError: another shape or dtype than the baseline's, NaN or inf in other places
            than the oracle's, an integer that differs, or an element over its budget; with the
            worst element, its index and both values.
    """
    assert actual.shape == baseline.shape == oracle.shape, (
        f"{name}: shape {list(actual.shape)}, expected {list(oracle.shape)}"
    )
    assert actual.dtype == baseline.dtype, f"{name}: {actual.dtype}, expected {baseline.dtype}"
    if actual.numel() == 0:
        return Comparison(name, (), 0.0, 0.0, 0.0, 0.0, 0)
    if not actual.dtype.is_floating_point:
        wrong = (actual != oracle).nonzero()
        assert len(wrong) == 0, _first_wrong(name, actual, oracle, wrong, "differs")
        return Comparison(name, (), 0.0, 0.0, 0.0, 0.0, actual.numel())

    # A value beyond the dtype's range is rounded to infinity by any correct kernel.
    expected = oracle.to(actual.dtype)
    for test, what in ((torch.isnan, "NaN"), (torch.isposinf, "inf"), (torch.isneginf, "-inf")):
        wrong = (test(actual) != test(expected)).nonzero()
        assert len(wrong) == 0, _first_wrong(name, actual, oracle, wrong, f"{what} misplaced")

    finite = expected.isfinite()
    zero = oracle.new_zeros(())
    exact = torch.where(finite, oracle, zero)
    error = torch.where(finite, actual.double() - exact, zero).abs()
    naive = torch.where(finite & baseline.isfinite(), baseline.double() - exact, zero).abs()
    if naive.dim():
        naive = naive.amax(-1, keepdim=True)
    budget = 2 * (naive + torch.finfo(actual.dtype).eps * exact.abs())
    # Below the smallest subnormal step no kernel can be closer than rounding to it.
    budget = budget + torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps

    at = int((error / budget).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), actual.shape))
    worst = Comparison(
        name,
        index,
        float(actual[index]),
        float(oracle[index]),
        float(error[index]),
        float(budget[index]),
        actual.numel(),
    )
    over = int((error > budget).sum())
    assert over == 0, f"{over} elements over budget; worst {worst}"
    return worst


def _first_wrong(name: str, actual: Tensor, oracle: Tensor, wrong: Tensor, what: str) -> str:
    index = tuple(wrong[0].tolist())
    return (
        f"{name}{list(index)} {what}: {actual[index].item()!r}, oracle {oracle[index].item()!r} "
        f"({len(wrong)} of {actual.numel()} elements)"
    )


@contextlib.contextmanager
def poisoned_outputs(op: str) -> Iterator[None]:
    """Fills every output of an op with NaN (integers with -77,777,777) before its kernel runs.

    What a kernel leaves unwritten then shows. Not for concurrent use of the same op.
    """
    contract = get_op(op)
    allocate = contract.outputs

    def poisoned(*args: Any) -> Any:
        outputs = allocate(*args)
        for tensor in _tensors(outputs):
            tensor.fill_(torch.nan if tensor.dtype.is_floating_point else -77_777_777)
        return outputs

    contract.outputs = poisoned
    try:
        yield
    finally:
        contract.outputs = allocate


def _tensors(outputs: Any) -> tuple[Tensor, ...]:
    if outputs is None:
        return ()
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _copy(args: Sequence[Any], *, exact: bool) -> tuple[Any, ...]:
    """The arguments with tensors copied, strides kept; floating ones in float64 if ``exact``."""
    copies = []
    for arg in args:
        if isinstance(arg, Tensor):
            copy = torch.empty_strided(
                arg.shape, arg.stride(), dtype=arg.dtype, device=arg.device
            ).copy_(arg)
            copies.append(copy.double() if exact and arg.dtype.is_floating_point else copy)
        else:
            copies.append(arg)
    return tuple(copies)


def _reference(op: Op, args: Sequence[Any], *, exact: bool) -> tuple[Tensor, ...]:
    """Outputs and written arguments of the reference, on copies of ``args``."""
    args = _copy(args, exact=exact)
    reference = op.load("reference")
    assert not isinstance(reference, str), reference
    outputs = op.outputs(*args)
    reference.launch(outputs, *args)
    return (*_tensors(outputs), *_written(op, args))


def _written(op: Op, args: Sequence[Any]) -> tuple[Tensor, ...]:
    return tuple(args[op.params.index(name)] for name in op.mutates)


def check_op(
    op: str, args: Sequence[Any], backend: str, *, device: str = "cpu", repeats: int = 2
) -> list[Comparison]:
    """The test body that every backend of every op must pass, on one set of arguments.

    Runs the op with its outputs poisoned; compares outputs and written arguments with the oracle;
    checks that no other argument changed and that repeated runs are bitwise equal.

    Args:
        op: name of the op.
        args: all its arguments in the order of the schema, on any device.
        backend: name for `use_backend`.
        device: where to run.
        repeats: number of runs.

    Returns:
        The worst element of each result.

    Raises:
        AssertionError: what was wrong, with the element.
    """
    contract = get_op(op)
    args = tuple(a.to(device) if isinstance(a, Tensor) else a for a in args)
    oracle = _reference(contract, args, exact=True)
    baseline = _reference(contract, args, exact=False)
    runs = []
    for _ in range(repeats):
        mine = _copy(args, exact=False)
        with use_backend(f"{op}={backend}"), poisoned_outputs(op):
            outputs = _tensors(contract.overload(*mine))
        for name, before, after in zip(contract.params, args, mine, strict=True):
            if isinstance(before, Tensor) and name not in contract.mutates:
                assert _bitwise_equal(before, after), f"{op} changed its argument {name}"
        runs.append((*outputs, *_written(contract, mine)))
    for again in runs[1:]:
        for number, (first, second) in enumerate(zip(runs[0], again, strict=True)):
            assert _bitwise_equal(first, second), f"{op}: result {number} differs between runs"
    count = len(runs[0]) - len(contract.mutates)
    names = [f"output {i}" for i in range(count)] + list(contract.mutates)
    return [
        assert_close_to_oracle(f"{op} {name}", *tensors)
        for name, *tensors in zip(names, runs[0], baseline, oracle, strict=True)
    ]


def _bitwise_equal(a: Tensor, b: Tensor) -> bool:
    if a.dtype.is_floating_point:
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        a, b = a.contiguous().view(kind), b.contiguous().view(kind)
    return torch.equal(a, b)
