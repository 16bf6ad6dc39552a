"""Gradients of the ops: against finite differences of the reference, against torch's own gradient
of the reference in both precisions, and as torch's compiler sees them.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from gradient_calls import GRADIENTS, WITH, differentiable, gradients
from op_calls import clone, op_args
from torch.utils._python_dispatch import TorchDispatchMode

import kimi_ops
from kimi_ops._dispatch import get_op
from kimi_ops.autograd import _attention, mla_prefill, moe_experts_int4
from kimi_ops.testing.inputs import int4 as int4_inputs
from kimi_ops.testing.inputs import mla, moe, norm, strided, vision
from kimi_ops.testing.oracle import assert_close_to_oracle

F64, BF16 = torch.float64, torch.bfloat16
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


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("given", CASES)
def test_gradient_is_that_of_the_reference(given, layout, monkeypatch):
    """By finite differences in float64; attention in tiles of 2 queries and 2 keys."""
    monkeypatch.setattr(_attention, "_QUERIES", 2)
    monkeypatch.setattr(_attention, "_KEYS", 2)
    op, args = _arguments(given, F64)
    f, inputs = differentiable(op, args)
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
    f, inputs = differentiable(op, args)
    found = gradients(f, inputs)
    naive = gradients(differentiable(op, args, plain)[0], inputs)
    exact = gradients(*differentiable(op, wide, plain))
    for ours, torchs in zip(gradients(*differentiable(op, wide)), exact, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-9, atol=1e-11)
    names = [n for n in names if args[get_op(op).params.index(n)] is not None]
    for name, *three in zip(names, found, naive, exact, strict=True):
        assert_close_to_oracle(f"{op}: gradient to {name}", *three)


def _opcheck_arguments(op):
    args = list(clone(op_args(op, 5)))
    for i, name in enumerate(get_op(op).params):
        if name in GRADIENTS[op].GRADIENTS and args[i] is not None:
            args[i].requires_grad_()
            if get_op(op).mutates:
                args[i] = args[i] * 1
    return args


@pytest.mark.parametrize("op", WITH)
def test_opcheck_withgradients(op):
    result = torch.library.opcheck(get_op(op).overload, _opcheck_arguments(op))
    assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.parametrize("op", WITH)
def test_compiled_gradient_is_the_eager_one(op):
    """Up to the order of sums: compiled code lays incoming gradients out afresh."""
    f, inputs = differentiable(op, op_args(op, 5, F64))
    torch._dynamo.reset()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients(f, inputs), gradients(compiled, inputs), strict=True):
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
        assert torch.equal(gradients(compiled, inputs)[0], gradients(merge, inputs)[0])


def test_inductor_trains_a_block_of_ops():
    packed, scale = op_args("int4_linear", 3)[1:]

    def block(x, residual, weight):
        y, h = kimi_ops.add_rms_norm(x, residual, weight, 1e-5)
        return (kimi_ops.silu_mul(kimi_ops.int4_linear(y * 2, packed, scale)) + h[..., :20],)

    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(s, generator=g).requires_grad_() for s in ((3, 64), (3, 64), (64,))]
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)
    for a, b in zip(gradients(block, inputs), gradients(compiled, inputs), strict=True):
        torch.testing.assert_close(a, b)


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
