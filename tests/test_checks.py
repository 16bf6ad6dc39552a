"""The notation of the contracts (`kimi_ops._check`), apart from any op."""

from __future__ import annotations

import pytest
import torch

from kimi_ops._check import Checks


def _check(checks, **args):
    Checks("op", tuple(args), checks).run(*args.values())


def test_letters_bind_wherever_they_first_can():
    checks = {"a": "[2*F, C+R] float", "b": "[R/2] float32", "c": "[C, F] int"}
    a, b, c = torch.ones(6, 10), torch.ones(3), torch.ones(4, 3).long()
    _check(checks, a=a, b=b, c=c)
    with pytest.raises(
        ValueError, match=r"b must be \[R/2\] float32 with R = 6, got \[2\] float32"
    ):
        _check(checks, a=a, b=b[:2], c=c)
    with pytest.raises(ValueError, match=r"a must be \[2\*F, C\+R\] .* with F = 3, C = 11"):
        _check(checks, a=a, b=b, c=torch.ones(11, 3).long())


def test_unsolvable_expression_is_one_number():
    checks = {"a": "[T, C+R] float", "b": "[C+R] like a"}
    _check(checks, a=torch.ones(2, 5), b=torch.ones(5))
    with pytest.raises(ValueError, match=r"b must be \[C\+R\] .* with C\+R = 5, got \[4\]"):
        _check(checks, a=torch.ones(2, 5), b=torch.ones(4))


def test_division_must_be_exact():
    checks = {"a": "[K] float", "b": "[K/8] int32"}
    _check(checks, a=torch.ones(16), b=torch.ones(2).int())
    with pytest.raises(ValueError, match="with K = 17, got"):
        _check(checks, a=torch.ones(17), b=torch.ones(2).int())


def test_any_leading_dimensions_but_the_same():
    checks = {"a": "[..., V] float", "b": "[...] float32"}
    for shape in ((), (3,), (2, 0, 3)):
        _check(checks, a=torch.ones(*shape, 4), b=torch.ones(shape))
    with pytest.raises(ValueError, match=r"b must be \[...\] float32 with ... = \[2\], got \[3\]"):
        _check(checks, a=torch.ones(2, 4), b=torch.ones(3))
    with pytest.raises(ValueError, match=r"a must be \[..., V\]"):
        _check(checks, a=torch.ones(()), b=torch.ones(()))


def test_optional_tensor():
    checks = {"a": "[T] float", "b": "optional [T] like a"}
    _check(checks, a=torch.ones(2), b=None)
    _check(checks, a=torch.ones(2), b=torch.ones(2))
    with pytest.raises(TypeError, match=r"b must be \[T\] float32 \(like a\), got \[2\] float64"):
        _check(checks, a=torch.ones(2), b=torch.ones(2).double())


def test_fixed_numbers():
    with pytest.raises(
        ValueError, match=r"a must be \[n, 3\] int32\|int64 with n = 5, got \[5, 2\]"
    ):
        _check({"a": "[n, 3] int"}, a=torch.ones(5, 2).int())


def test_a_contract_that_makes_no_sense_is_refused_at_definition():
    with pytest.raises(ValueError, match="checks name arguments that the schema lacks"):
        Checks("op", ("a",), {"a": "[T] float", "b": "[T] float"})
    with pytest.raises(ValueError, match="rules with letters that no tensor gives"):
        Checks("op", ("a",), {"a": "[T] float", "Z": "Z > 0"})
