"""Gradients of the ops: against finite differences of the reference, against torch's own gradient
of the reference in both precisions, and as torch's compiler sees them; and rounding to int4 that
lets gradients through.
"""

from __future__ import annotations

import importlib
import inspect
import re

import pytest
import torch
from op_calls import call, clone, op_args, tensors
from torch.utils._python_dispatch import TorchDispatchMode

import kimi_ops
from kimi_ops import _autograd
from kimi_ops._dispatch import get_op
from kimi_ops.autograd import _attention, mla_prefill, moe_experts_int4
from kimi_ops.quant import int4
from kimi_ops.testing.inputs import int4 as int4_inputs
from kimi_ops.testing.inputs import mla, moe, norm, strided, vision
from kimi_ops.testing.oracle import assert_close_to_oracle

F64, BF16 = torch.float64, torch.bfloat16
GRADIENTS = {op: _autograd.load_gradient(op) for op in kimi_ops.op_names()}
WITH = [op for op, module in GRADIENTS.items() if module]
WITHOUT = [op for op, module in GRADIENTS.items() if not module]
GRIDS = ((1, 2, 4), (3, 4, 2), (2, 2, 2))


def _lengths(args, cu_seqlens_q, cu_seqlens_k):
    """`mla_prefill` arguments with other offsets."""
    offsets = (torch.tensor(cu).int() for cu in (cu_seqlens_q, cu_seqlens_k))
    return (*args[:3], *offsets, *args[5:])


def _experts(g, t, tokens, ids=None, **options):
    args = list(moe.moe_experts_int4(g, tokens, 4, 2, 64, 32, t, shared=32))
    if ids is not None:
        args[6] = torch.tensor(ids).int()
        args[2], args[4] = args[2].nan_to_num(0.01), args[4].nan_to_num(0.01)
    for name, value in options.items():
        args[get_op("moe_experts_int4").params.index(name)] = value
    return tuple(args)


# name -> op, and arguments for a generator and a dtype
CASES = {
    "rms_norm": ("rms_norm", lambda g, t: norm.rms_norm(g, (3, 8), t)),
    "rms_norm-empty": ("rms_norm", lambda g, t: norm.rms_norm(g, (0, 8), t)),
    "rms_norm-row": ("rms_norm", lambda g, t: norm.rms_norm(g, (5,), t)),
    "add_rms_norm": ("add_rms_norm", lambda g, t: norm.add_rms_norm(g, (2, 2, 8), t)),
    "add_rms_norm-empty": ("add_rms_norm", lambda g, t: norm.add_rms_norm(g, (0, 8), t)),
    "silu_mul": ("silu_mul", lambda g, t: norm.silu_mul(g, (3, 8), t)),
    "silu_mul-steep": ("silu_mul", lambda g, t: (norm.silu_mul(g, (3, 8), t)[0] * 20,)),
    "silu_mul-empty": ("silu_mul", lambda g, t: norm.silu_mul(g, (2, 0), t)),
    "mla_prefill": (
        "mla_prefill",
        lambda g, t: mla.mla_prefill(g, (3, 1, 0, 2), (3, 5, 2, 2), 2, (6, 4), t),
    ),
    "mla_prefill-full": (
        "mla_prefill",
        lambda g, t: (*mla.mla_prefill(g, (2, 0, 4), (3, 2, 1), 2, (6, 4), t)[:-1], False),
    ),
    "mla_prefill-rows-past-the-end": (
        "mla_prefill",
        lambda g, t: _lengths(
            mla.mla_prefill(g, (4, 3), (4, 3), 2, (6, 4), t), (0, 2, 2, 5), (0, 2, 4, 6)
        ),
    ),
    "mla_prefill-no-sequence": (
        "mla_prefill",
        lambda g, t: _lengths(mla.mla_prefill(g, (2,), (2,), 2, (6, 4), t), (0,), (0,)),
    ),
    "merge_attention": ("merge_attention", lambda g, t: _merged(g, t)),
    "moe_route": ("moe_route", lambda g, t: moe.moe_route(g, 3, 12, 8, 3, t)),
    "moe_route-groups": (
        "moe_route",
        lambda g, t: moe.moe_route(g, 3, 12, 8, 2, t, groups=(4, 2), normalize=False),
    ),
    "moe_route-empty": ("moe_route", lambda g, t: moe.moe_route(g, 0, 12, 8, 3, t)),
    "moe_experts_int4": ("moe_experts_int4", lambda g, t: _experts(g, t, 3)),
    "moe_experts_int4-ids": (
        "moe_experts_int4",
        lambda g, t: _experts(
            g,
            t,
            3,
            ids=((5, 5), (2, 9), (4, 7)),
            expert_range=[3, 7],
            shared_gate_up=None,
            shared_down=None,
        ),
    ),
    "moe_experts_int4-empty": ("moe_experts_int4", lambda g, t: _experts(g, t, 0)),
    "int4_linear": ("int4_linear", lambda g, t: int4_inputs.int4_linear(g, (2, 1, 64), 5, t)),
    "int4_linear-empty": ("int4_linear", lambda g, t: int4_inputs.int4_linear(g, (0, 64), 5, t)),
    "vision_pos_embed": (
        "vision_pos_embed",
        lambda g, t: vision.vision_pos_embed(g, ((1, 1, 1), (2, 3, 5)), 4, (4, 3), t, padding=2),
    ),
    "vision_rope": ("vision_rope", lambda g, t: vision.vision_rope(g, GRIDS, 2, 8, t, padding=1)),
    "vision_attention": (
        "vision_attention",
        lambda g, t: vision.vision_attention(g, (0, 3, 1, 4), 2, 6, t, padding=2),
    ),
    "patch_merge": ("patch_merge", lambda g, t: vision.patch_merge(g, GRIDS, 4, t)),
    "patch_merge-padding": (
        "patch_merge",
        lambda g, t: vision.patch_merge(g, GRIDS, 4, t, padding=3, extra=2),
    ),
    "patch_merge-short": ("patch_merge", lambda g, t: _short(vision.patch_merge(g, GRIDS, 4, t))),
    "patch_merge-empty": ("patch_merge", lambda g, t: vision.patch_merge(g, (), 4, t)),
}


def _merged(g, t):
    args = mla.merge_attention(g, (4, 2, 3), t)
    lse = torch.float64 if t == F64 else torch.float32
    a, b = (torch.randn(4, 2, generator=g).to(lse) for _ in range(2))
    return args[0].nan_to_num(1.0), a, args[2].nan_to_num(1.0), b


def _short(args):
    """Entries that announce more patches than there are."""
    return (args[0][:-5], *args[1:])


def _arguments(given, dtype):
    op, build = CASES[given]
    args = list(build(torch.Generator().manual_seed(3), dtype))
    if dtype == F64:
        kinds = (torch.float32, BF16)
        names = GRADIENTS[op].GRADIENTS
        for i, (name, a) in enumerate(zip(get_op(op).params, args, strict=True)):
            if name in names and a is not None and a.dtype in kinds:
                args[i] = a.double()
    return op, tuple(args)


def _differentiable(op, args, run=None):
    """``f(*inputs)``, the floating results of the op as a function of the arguments that have a
    gradient, and those arguments, requiring one."""
    contract = get_op(op)
    run = run or (lambda *args: call(op, args))
    places = [
        i
        for i, (name, a) in enumerate(zip(contract.params, args, strict=True))
        if name in GRADIENTS[op].GRADIENTS and a is not None
    ]

    def f(*inputs):
        now = list(args)
        for i, x in zip(places, inputs, strict=True):
            now[i] = x * 1 if contract.mutates else x  # a leaf cannot be written
        result = run(*now)
        if contract.mutates and result is None:
            result = now[places[0]]
        return tuple(r for r in tensors(result) if r.is_floating_point())

    return f, [args[i].detach().clone().requires_grad_() for i in places]


def _gradients(f, inputs, seed=5):
    """Gradients of a random projection of the results of ``f``, from gradients with the dimensions
    in memory the other way round."""
    results = f(*inputs)
    g = torch.Generator().manual_seed(seed)
    grads = [torch.randn(r.shape[::-1], generator=g).bfloat16().to(r.dtype) for r in results]
    grads = [x.permute(*reversed(range(x.dim()))) for x in grads]
    return torch.autograd.grad(results, inputs, grads)


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("given", CASES)
def test_gradient_is_that_of_the_reference(given, layout, monkeypatch):
    """By finite differences in float64; attention in tiles of 2 queries and 2 keys."""
    monkeypatch.setattr(_attention, "_QUERIES", 2)
    monkeypatch.setattr(_attention, "_KEYS", 2)
    op, args = _arguments(given, F64)
    f, inputs = _differentiable(op, args)
    if layout == "strided":
        inputs = [strided(x.detach()).requires_grad_() for x in inputs]
    with kimi_ops.use_backend("reference"):
        few = sum(x.numel() for x in inputs) < 100  # else along random directions
        assert torch.autograd.gradcheck(_finite(f), inputs, fast_mode=not few)


def _finite(f):
    """``f`` with its results of -inf, which finite differences cannot take, put to 0."""
    return lambda *inputs: tuple(r.masked_fill(r == -torch.inf, 0) for r in f(*inputs))


ABSENT = {  # which side of each row has no keys
    "a": (torch.tensor([True, False, False]), torch.tensor([False, False, True])),
    "both": (torch.tensor([True, True, False]), torch.tensor([True, False, True])),
}


@pytest.mark.parametrize("absent", ABSENT)
def test_merged_side_without_keys_has_no_gradient(absent):
    absent_a, absent_b = ABSENT[absent]
    g = torch.Generator().manual_seed(1)
    inputs = [torch.randn(s, dtype=F64, generator=g) for s in ((3, 4), (3,)) * 2]
    inputs = [x.requires_grad_() for x in inputs]

    def f(out_a, lse_a, out_b, lse_b):
        return kimi_ops.merge_attention(
            out_a.masked_fill(absent_a[:, None], torch.nan),
            lse_a.masked_fill(absent_a, -torch.inf),
            out_b.masked_fill(absent_b[:, None], torch.nan),
            lse_b.masked_fill(absent_b, -torch.inf),
        )

    assert torch.autograd.gradcheck(_finite(f), inputs)


# Where plain torch has a gradient of the reference: not with queries that have no keys (NaN), nor
# where its loops have nothing to do.
PLAIN = [
    given
    for given in CASES
    if given not in ("mla_prefill-full", "mla_prefill-rows-past-the-end", "mla_prefill-no-sequence")
    and given not in ("moe_experts_int4-empty", "patch_merge-empty")
]


@pytest.mark.parametrize("given", PLAIN)
def test_bfloat16_gradient_is_within_the_budget(given):
    """Of the oracle: at most twice the error of plain torch's gradient of the reference. In float64
    the two agree.
    """
    op, args = _arguments(given, BF16)
    if op == "patch_merge":  # plain torch's gradient of a NaN row of padding is NaN
        args = (args[0].nan_to_num(1.0), *args[1:])
    plain = getattr(importlib.import_module(f"kimi_ops.reference.{op}"), op)
    names = [n for n in get_op(op).params if n in GRADIENTS[op].GRADIENTS]
    wide = tuple(
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() and n in names else a
        for n, a in zip(get_op(op).params, args, strict=True)
    )
    f, inputs = _differentiable(op, args)
    found = _gradients(f, inputs)
    naive = _gradients(_differentiable(op, args, plain)[0], inputs)
    exact = _gradients(*_differentiable(op, wide, plain))
    for ours, torchs in zip(_gradients(*_differentiable(op, wide)), exact, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-9, atol=1e-11)
    names = [n for n in names if args[get_op(op).params.index(n)] is not None]
    for name, *gradients in zip(names, found, naive, exact, strict=True):
        assert_close_to_oracle(f"{op}: gradient to {name}", *gradients)


def _opcheck_arguments(op):
    args = list(clone(op_args(op, 5)))
    for i, name in enumerate(get_op(op).params):
        if name in GRADIENTS[op].GRADIENTS and args[i] is not None:
            args[i].requires_grad_()
            if get_op(op).mutates:
                args[i] = args[i] * 1
    return args


@pytest.mark.parametrize("op", WITH)
def test_opcheck_with_gradients(op):
    result = torch.library.opcheck(get_op(op).overload, _opcheck_arguments(op))
    assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.parametrize("op", WITH)
def test_compiled_gradient_is_the_eager_one(op):
    """Up to the order of sums: compiled code lays incoming gradients out afresh."""
    f, inputs = _differentiable(op, op_args(op, 5, F64))
    torch._dynamo.reset()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for a, b in zip(_gradients(f, inputs), _gradients(compiled, inputs), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert not any(r.requires_grad for r in compiled(*inputs))


def test_backward_compiles_with_a_length_that_the_trace_does_not_know():
    x, grid, _, *norms, _ = op_args("patch_merge", 5)

    def merge(x):
        merged = (grid[:, 1] * grid[:, 2] // 4).sum().item()
        return (kimi_ops.patch_merge(x, grid, merged, *norms, 1e-5),)

    inputs = [x.clone().requires_grad_()]
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")
        assert torch.equal(_gradients(compiled, inputs)[0], _gradients(merge, inputs)[0])


def test_inductor_trains_a_block_of_ops():
    packed, scale = op_args("int4_linear", 3)[1:]

    def block(x, residual, weight):
        y, h = kimi_ops.add_rms_norm(x, residual, weight, 1e-5)
        return (kimi_ops.silu_mul(kimi_ops.int4_linear(y * 2, packed, scale)) + h[..., :20],)

    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(s, generator=g).requires_grad_() for s in ((3, 64), (3, 64), (64,))]
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)
    for a, b in zip(_gradients(block, inputs), _gradients(compiled, inputs), strict=True):
        torch.testing.assert_close(a, b)


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
    f, inputs = _differentiable("silu_mul", op_args("silu_mul", 3, F64))
    (first,) = torch.autograd.grad(f(*inputs)[0].sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="silu_mul: the op has no second derivative"):
        first.sum().backward()


def test_functional_gradient_says_what_to_use():
    with pytest.raises(RuntimeError, match=r"silu_mul: torch.func cannot differentiate the op"):
        torch.func.grad(lambda x: kimi_ops.silu_mul(x).sum())(torch.ones(2, 4))


@pytest.mark.parametrize("op", WITH)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_gradient_is_kept_where_none_is_wanted(op, context):
    f, inputs = _differentiable(op, op_args(op, 3))
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
    f, inputs = _differentiable("moe_route", op_args("moe_route", 5))
    expected = _gradients(f, inputs)
    with torch.autocast("cpu", BF16):
        found = _gradients(f, inputs)
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


class _Largest(TorchDispatchMode):
    """The most elements of any result in a block."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            for r in torch.utils._pytree.tree_leaves(result):
                self.numel = max(self.numel, r.numel() if isinstance(r, torch.Tensor) else 0)
        return result


def test_memory_of_attention_backward_is_linear_in_the_tokens():
    largest = []
    for n in (1024, 2048):
        args = mla.mla_prefill(torch.Generator().manual_seed(0), (n,), (n,), 1, (8, 8), BF16)
        out, lse = kimi_ops.mla_prefill(*args[:-1], causal=True)
        with _Largest() as seen:
            mla_prefill._compute(out, lse, *args[:3], out, lse, *args[3:5], 0.1, True)
        largest.append(seen.numel)
    assert largest == [_attention._QUERIES * _attention._KEYS] * 2


def test_experts_are_unpacked_one_at_a_time():
    args = moe.moe_experts_int4(torch.Generator().manual_seed(0), 4, 16, 2, 64, 64, BF16)
    with _Largest() as seen:
        moe_experts_int4._compute(args[0], *args[:7], None)
    assert seen.numel == 2 * 64 * 64


def test_fake_quantization_is_the_released_format_and_lets_gradients_through():
    for dtype in (BF16, torch.float16, torch.float32):
        g = torch.Generator().manual_seed(0)
        weight = (torch.randn(3, 5, 64, generator=g) / 8).to(dtype)
        weight[0, 0] = 0
        weight = weight.transpose(0, 1).requires_grad_()
        rounded = int4.fake_quantize(weight)
        packed, scale = int4.quantize(weight.detach())
        assert torch.equal(rounded, int4.dequantize(packed, scale, dtype))
        grad = torch.randn(rounded.shape, generator=g).to(dtype)
        assert torch.equal(torch.autograd.grad(rounded, weight, grad)[0], grad)
        # Rounding what is rounded changes nothing, as long as a group has its -8.
        with torch.no_grad():
            assert not int4.fake_quantize(weight).requires_grad


def test_fake_quantization_compiles_and_checks_its_argument():
    weight = torch.randn(4, 64).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(int4.fake_quantize, backend="aot_eager", fullgraph=True)(weight)
    assert torch.equal(compiled, int4.fake_quantize(weight))
    compiled.sum().backward()
    assert weight.grad.eq(1).all()
    with pytest.raises(ValueError, match="int4: weight must hold whole groups of 32"):
        int4.fake_quantize(torch.ones(4, 40))
    with pytest.raises(TypeError, match=r"int4: weight must be bfloat16\|float16\|float32"):
        int4.fake_quantize(torch.ones(4, 32, dtype=F64))
    broken = torch.ones(2, 64)
    broken[0, 40] = torch.nan
    assert int4.fake_quantize(broken).isnan().sum() == 32


def test_int4_training_lowers_a_loss():
    """The loss is that of the rounded weights; the gradient moves the weights behind them."""
    g = torch.Generator().manual_seed(0)
    x, target = torch.randn(64, 32, generator=g), torch.randn(32, 8, generator=g)
    weight = torch.nn.Parameter(torch.zeros(8, 32))
    optimizer = torch.optim.Adam([weight], lr=0.05)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (x @ int4.fake_quantize(weight).T - x @ target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
