"""What calls of ops say and keep where gradients are wanted, and where none are."""

from __future__ import annotations

import inspect
import itertools
import re

import pytest
import torch
from gradient_calls import GRADIENTS, WITH, WITHOUT, differentiable, gradients
from op_calls import call, clone, op_args, tensors

import kimi_ops
from kimi_ops import _autograd
from kimi_ops._dispatch import get_op
from kimi_ops.autograd import _attention
from kimi_ops.testing.inputs import vision

F64, BF16 = torch.float64, torch.bfloat16
GRIDS = ((1, 2, 4), (3, 4, 2), (2, 2, 2))


@pytest.mark.parametrize("op", [op for op in WITHOUT if op != "moe_sort"])  # integers alone
def test_op_without_backward_says_so(op):
    args = list(clone(op_args(op, 3)))
    first = next(i for i, a in enumerate(args) if isinstance(a, torch.Tensor))
    args[first].requires_grad_()
    name = get_op(op).params[first]
    with pytest.raises(RuntimeError, match=f"^{op}: {name} requires grad, but the op has no back"):
        call(op, args)
    with torch.no_grad():
        assert not any(r.requires_grad for r in tensors(call(op, args)))


@pytest.mark.parametrize(
    ("op", "name", "known"),
    [("int4_linear", "scale", "x"), ("moe_experts_int4", "down_scale", "x, weights, shared_gate")],
)
def test_argument_without_gradient_says_so(op, name, known):
    args = list(clone(op_args(op, 3)))
    args[get_op(op).params.index(name)].requires_grad_()
    message = f"^{op}: {name} requires grad, but the op has no gradient for it, only for {known}"
    with pytest.raises(RuntimeError, match=message):
        call(op, args)


@pytest.mark.parametrize("op", GRADIENTS)
def test_docstring_says_what_has_a_gradient(op):
    line = re.search(r"^Gradients: (.+)$", inspect.getdoc(getattr(kimi_ops, op)), re.M)[1]
    assert line.startswith("none") == (GRADIENTS[op] is None)


def test_second_derivative_is_an_error():
    f, inputs = differentiable("silu_mul", op_args("silu_mul", 3, F64))
    (first,) = torch.autograd.grad(f(*inputs)[0].sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="silu_mul: the op has no second derivative"):
        first.sum().backward()


def test_functional_gradient_says_what_to_use():
    with pytest.raises(RuntimeError, match=r"silu_mul: torch.func cannot differentiate the op"):
        torch.func.grad(lambda x: kimi_ops.silu_mul(x).sum())(torch.ones(2, 4))


@pytest.mark.parametrize("op", WITH)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_gradient_is_kept_where_none_is_wanted(op, context):
    f, inputs = differentiable(op, op_args(op, 3))
    with context():
        assert not any(r.requires_grad for r in f(*inputs))


def test_only_what_is_in_demand_has_a_gradient():
    """And a result that is not used, ids and the selection bias are no obstacle."""
    x, gate, bias, *rest = op_args("moe_route", 4)
    for needs in ("x", "gate_weight", "bias"):
        args = [
            t.clone().requires_grad_(n == needs)
            for t, n in zip((x, gate, bias), ("x", "gate_weight", "bias"), strict=True)
        ]
        weights, ids = get_op("moe_route").overload(*args, *rest)
        assert not ids.requires_grad
        weights.square().sum().backward()
        assert [a.grad is not None for a in args] == [needs == "x", needs == "gate_weight", False]
    q, k, v, *rest = op_args("mla_prefill", 4)
    out, lse = get_op("mla_prefill").overload(q.requires_grad_(), k, v, *rest)
    lse.sum().backward()
    assert q.grad.isfinite().all()
    assert out.requires_grad


def test_written_argument_follows_the_rules_of_in_place_operations():
    qkv, grid = vision.vision_rope(torch.Generator().manual_seed(0), GRIDS, 2, 8, torch.float32)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        kimi_ops.vision_rope(qkv.clone().requires_grad_(), grid)
    before = qkv.clone().requires_grad_() * 1
    square = before * before
    kimi_ops.vision_rope(before, grid)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


@pytest.mark.parametrize("op", [op for op in GRADIENTS if get_op(op).mutates])
def test_written_argument_counts_as_changed(op):
    """Also where it needs no gradient: another operation may have saved it."""
    args = clone(op_args(op, 3))
    written = args[get_op(op).params.index(get_op(op).mutates[0])]
    factor = torch.ones(()).requires_grad_()
    product = written * factor
    call(op, args)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("op", [op for op in GRADIENTS if get_op(op).mutates])
def test_argument_of_inference_mode_can_be_written_outside(op):
    with torch.inference_mode():
        args = clone(op_args(op, 3))
    written = get_op(op).params.index(get_op(op).mutates[0])
    mixed = [
        a if i == written else b for i, (a, b) in enumerate(zip(args, op_args(op, 3), strict=True))
    ]
    call(op, tuple(mixed))


def test_backward_inside_autocast_keeps_its_dtypes():
    f, inputs = differentiable("moe_route", op_args("moe_route", 5))
    expected = gradients(f, inputs)
    with torch.autocast("cpu", BF16):
        found = gradients(f, inputs)
    assert all(map(torch.equal, found, expected))


def test_call_without_gradients_enters_the_implementation_directly(monkeypatch):
    """What keeps the Autograd key as cheap as none: no second way through the dispatcher."""
    monkeypatch.setattr(_autograd, "_below", None)
    x, weight = torch.randn(2, 4), torch.nn.Parameter(torch.ones(4))
    kimi_ops.rms_norm(x, weight.detach(), 1e-5)
    with torch.no_grad():
        kimi_ops.rms_norm(x, weight, 1e-5)


def test_view_that_negates_is_seen_as_such():
    """It reaches the Autograd key as its base in memory."""
    x, weight = torch.randn(2, 4), torch.ones(4)
    found = kimi_ops.rms_norm(torch._neg_view(x), weight, 1e-5)
    assert torch.equal(found, kimi_ops.rms_norm(-x, weight, 1e-5))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("with_lse", [True, False])
def test_short_segments_together_equal_long_ones_alone(causal, with_lse, monkeypatch):
    """Padded groups of segments against tile by tile, with empty ones and rows past the last."""
    torch.manual_seed(0)
    lengths_q, lengths_k = (3, 0, 17, 40, 1, 5), (3, 4, 20, 33, 9, 0)
    cu_q, cu_k = ([sum(n[:i]) for i in range(7)] for n in (lengths_q, lengths_k))
    q, k, v = (torch.randn(n, 4, w, dtype=torch.float64) for n, w in ((70, 24), (72, 24), (72, 16)))
    dout, dlse = torch.randn(70, 4, 16, dtype=torch.float64), torch.randn(70, 4).double()
    out, lse = torch.zeros_like(dout), torch.zeros(70, 4, dtype=torch.float64)
    for (a, b), (c, d) in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True):
        offset = (d - c) - (b - a) if causal else None
        lse[a:b] = _attention.log_sum_exp(q[a:b], k[c:d], 0.2, offset)
        score = torch.einsum("nhw,mhw->hnm", q[a:b], k[c:d]) * 0.2
        if causal:
            hidden = torch.arange(d - c) > torch.arange(b - a)[:, None] + offset
            score = score.masked_fill(hidden, -torch.inf)
        out[a:b] = torch.einsum("hnm,mhv->nhv", score.softmax(-1).nan_to_num(), v[c:d])
    found = []
    for fits in (lambda segment: True, lambda segment: False):
        monkeypatch.setattr(_attention, "_fits_a_tile", fits)
        gradients = tuple(torch.full_like(x, torch.nan) for x in (q, k, v))
        _attention.segment_gradients(
            dout, dlse, q, k, v, out, lse if with_lse else None, cu_q, cu_k, 0.2, causal, gradients
        )
        found.append(gradients)
    for together, alone in zip(*found, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
