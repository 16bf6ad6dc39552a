"""Routed experts with trainable weights: values and gradients, against a plain double loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kimi_ops
from kimi_ops.model.errors import KimiError
from kimi_ops.testing.oracle import assert_close_to_oracle
from kimi_ops.train.experts import moe_experts

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def plain(x, gate_up, down, weights, ids):
    """A pair after the other, in the dtype of ``x``, summed in that of the weights."""
    total = [row.to(weights.dtype) * 0 for row in x]  # of x, so that there always is a gradient
    for t, row in enumerate(ids.tolist()):
        for k, expert in enumerate(row):
            if 0 <= expert < len(gate_up):
                gate, up = (gate_up[expert] @ x[t]).chunk(2)
                total[t] = total[t] + weights[t, k] * (down[expert] @ (F.silu(gate) * up))
    return torch.stack(total).to(x.dtype) if total else x * 1


def eager(x, gate_up, down, weights, ids):
    """What one would write with torch's matrix products; sums as above."""
    total = torch.zeros(x.shape, dtype=weights.dtype)
    for expert in range(len(gate_up)):
        tokens, k = (ids == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[tokens], gate_up[expert]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down[expert])
        total = total.index_add(0, tokens, weights[tokens, k, None] * y)
    return total.to(x.dtype)


def arguments(ids, experts=6, width=10, inner=4, dtype=F64):
    g = torch.Generator().manual_seed(2)
    ids = torch.as_tensor(ids)

    def normal(*shape, wide=dtype):
        return torch.randn(shape, generator=g, dtype=F64).to(wide)

    weights = normal(*ids.shape, wide=F64 if dtype == F64 else F32)
    gate_up, down = normal(experts, 2 * inner, width), normal(experts, width, inner)
    return normal(len(ids), width), gate_up, down, weights, ids


def results(f, args, dtype=None):
    """The value and the gradients to all but the ids, of a random projection."""
    inputs = [a.to(dtype or a.dtype).detach().requires_grad_() for a in args[:4]]
    y = f(*inputs, args[4])
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).bfloat16().to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy, allow_unused=True)]


def chosen(tokens, top_k, experts, seed=1):
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
    return scores.topk(top_k).indices.int()


# Of 6 experts.
ROUTINGS = {
    "even": chosen(9, 3, 6),
    "unused-experts": chosen(7, 2, 3),
    "skewed": torch.tensor([[0, 5], [0, 1], [0, 2], [0, 5], [3, 0], [0, 5]]),
    "one-takes-all": torch.full((8, 1), 4),
    "one-token": torch.tensor([[2, 0, 5]]),
    "no-token": torch.empty(0, 2, dtype=torch.int64),
    "twice": torch.tensor([[1, 1], [2, 1]]),
    "elsewhere": torch.tensor([[-1, 3], [6, 2], [2**32, -(2**32) + 1], [4, -1]]),
    "all-elsewhere": torch.full((3, 2), -1, dtype=torch.int32),
}
NAMES = ("y", "x", "gate_up", "down", "weights")


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_values_and_gradients_are_those_of_a_double_loop(routing, recompute):
    args = arguments(ROUTINGS[routing])
    found = results(lambda *a: moe_experts(*a, recompute=recompute), args)
    for name, ours, expected in zip(NAMES, found, results(plain, args), strict=True):
        expected = torch.zeros_like(ours) if expected is None else expected
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12, msg=lambda m: name + m)  # noqa: B023
    used = set(ROUTINGS[routing].flatten().tolist())
    for expert in set(range(6)) - used:
        assert not found[2][expert].any()
        assert not found[3][expert].any()
    here = (ROUTINGS[routing] >= 0) & (ROUTINGS[routing] < 6)
    assert not found[4][~here].any()
    assert not found[0][~here.any(1)].any()


@pytest.mark.parametrize("routing", [r for r in ROUTINGS if r != "no-token"])
def test_gradient_is_that_of_finite_differences(routing):
    *inputs, ids = arguments(ROUTINGS[routing], width=5, inner=3)
    inputs = [a.requires_grad_() for a in inputs]
    assert torch.autograd.gradcheck(lambda *a: moe_experts(*a, ids), inputs)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_error_is_within_twice_that_of_plain_torch(dtype):
    args = arguments(chosen(160, 4, 8), experts=8, width=64, inner=48, dtype=dtype)
    args = (args[0], args[1] * 0.125, args[2] * 0.125, *args[3:])
    found, naive = results(moe_experts, args), results(eager, args)
    for name, *three in zip(NAMES, found, naive, results(plain, args, F64), strict=True):
        assert three[0].dtype == (F32 if name == "weights" else dtype)
        # Against the largest error of the whole: a row of a weight's gradient has the roundings of
        # a few tokens, and those of one run say little about another's.
        assert_close_to_oracle(f"moe_experts: {name}", *(a.flatten() for a in three))
        ours, torchs = ((a.double() - three[2]).square().mean().sqrt() for a in three[:2])
        assert ours <= 1.25 * torchs, name  # 0.77 (16 bits) to 1.05 (float32) was measured


@pytest.mark.parametrize("dtype", [BF16, F32, F64])
def test_recomputation_and_repetition_change_no_bit(dtype):
    args = arguments(chosen(97, 3, 6), width=33, inner=7, dtype=dtype)
    first = results(moe_experts, args)
    for recompute in (True, False, False):
        again = results(lambda *a: moe_experts(*a, recompute=recompute), args)  # noqa: B023
        for name, a, b in zip(NAMES, first, again, strict=True):
            assert torch.equal(a, b), name


def test_recomputation_keeps_the_arguments_alone():
    kept = {}
    *inputs, ids = arguments(chosen(40, 3, 6), dtype=F32)
    inputs = [a.requires_grad_() for a in inputs]
    for recompute in (True, False):
        sizes = kept[recompute] = []

        def pack(tensor, sizes=sizes):
            if not any(tensor is a for a in inputs):
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            moe_experts(*inputs, ids, recompute=recompute)
    assert sorted(kept[True]) == [120, 120]  # the sort, there and back
    assert sorted(kept[False]) == [120, 120, 120 * 8]


def test_gradients_are_computed_for_those_who_want_them():
    args = arguments(ROUTINGS["skewed"])
    everything = results(moe_experts, args)[1:]
    for i, expected in enumerate(everything):
        inputs = [a.detach().requires_grad_(i == j) for j, a in enumerate(args[:4])]
        y = moe_experts(*inputs, args[4])
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).bfloat16().double()
        y.backward(dy)
        assert torch.equal(inputs[i].grad, expected)
        assert all(a.grad is None for j, a in enumerate(inputs) if j != i)
    with torch.no_grad():
        assert not moe_experts(*inputs, args[4]).requires_grad


def test_any_strides_will_do():
    args = arguments(chosen(12, 3, 6))
    strided = [a.transpose(0, -1).contiguous().transpose(0, -1) for a in args[:4]]
    for a, b in zip(results(moe_experts, (*strided, args[4])), results(plain, args), strict=True):
        torch.testing.assert_close(a, b)
    inputs = [a.clone().requires_grad_() for a in args[:4]]
    moe_experts(*inputs, args[4]).sum().backward()  # an expanded gradient
    assert torch.isfinite(inputs[0].grad).all()


def test_nan_of_a_token_stays_with_it_and_its_experts():
    x, *rest, ids = arguments(torch.tensor([[0, 1], [2, 3], [4, 0]]))
    x[1, 3] = torch.nan
    y, dx, dgate_up, *_ = results(moe_experts, (x, *rest, ids))
    assert y.isnan().any(1).tolist() == [False, True, False]
    assert dx.isnan().any(1).tolist() == [False, True, False]
    assert dgate_up.isnan().flatten(1).any(1).tolist() == [e in (2, 3) for e in range(6)]


def test_second_derivative_is_an_error():
    *inputs, ids = arguments(ROUTINGS["skewed"])
    inputs = [a.requires_grad_() for a in inputs]
    grads = torch.autograd.grad(moe_experts(*inputs, ids).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grads[0].sum().backward()


def test_router_trains_through_the_experts():
    """`moe_route` and this, end to end: the gradient reaches the gate."""
    g = torch.Generator().manual_seed(0)
    x, gate = torch.randn(20, 10, generator=g), torch.randn(6, 10, generator=g).requires_grad_()
    weights, ids = kimi_ops.moe_route(x, gate, torch.zeros(6), 2)
    _, gate_up, down, *_ = arguments(ids, dtype=F32)
    moe_experts(x, gate_up, down, weights, ids).square().sum().backward()
    assert gate.grad.abs().max() > 0


BAD = {
    "x must be [T, D] floats": {0: torch.zeros(3)},
    "gate_up must be [E, 2F, D] floats": {1: torch.zeros(3, 4)},
    "down must be [E, D, F] floats": {2: torch.zeros(6, 10, 4, dtype=torch.int32)},
    "gate_up must be [6, 8, 10]": {1: torch.zeros(6, 7, 10, dtype=F64)},
    "down must be [6, 10, 4]": {2: torch.zeros(5, 10, 4, dtype=F64)},
    "gate_up must be [6, 8, 10] and torch.float64": {1: torch.zeros(6, 8, 10)},
    "weights must be float32 or float64": {3: torch.zeros(6, 2, dtype=BF16)},
    "weights and ids must be [6, K]": {3: torch.zeros(5, 2)},
    "ids must be [T, K] integers": {4: torch.zeros(6, 2)},
    "ids must be int32 or int64": {4: torch.zeros(6, 2, dtype=torch.int16)},
    "x must be bfloat16": {0: torch.zeros(6, 10, dtype=torch.float8_e4m3fn)},
    "down must be on cpu": {2: torch.zeros(6, 10, 4, dtype=F64, device="meta")},
    "with no size 0": {1: torch.zeros(6, 0, 10, dtype=F64), 2: torch.zeros(6, 10, 0, dtype=F64)},
}


@pytest.mark.parametrize("words", BAD)
def test_bad_arguments_are_errors_by_name(words):
    args = list(arguments(ROUTINGS["skewed"]))
    for place, value in BAD[words].items():
        args[place] = value
    with pytest.raises(KimiError) as caught:
        moe_experts(*args)
    assert words in str(caught.value)
