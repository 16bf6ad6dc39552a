"""Every check of every op: one clear error in the message form, eager and traced alike."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from op_calls import call, op_args
from torch._subclasses.fake_tensor import FakeTensorMode

import kimi_ops
from kimi_ops._check import _letters
from kimi_ops._dispatch import get_op

OPS = kimi_ops.op_names()
TENSORS = [(op, name) for op in OPS for name in get_op(op).checks.tensors]


def _with(op, name, value):
    args = list(op_args(op, 5))
    args[get_op(op).params.index(name)] = value(args[get_op(op).params.index(name)])
    return tuple(args)


def _raises(op, args, error, *words):
    """The call raises ``error`` in eager mode and under fake tensors, with the same message."""
    with pytest.raises(error) as eager:
        call(op, args)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = tuple(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args)
        with pytest.raises(error) as traced:
            call(op, fake)
    assert str(eager.value) == str(traced.value)
    for word in (f"{op}: ", *words):
        assert word in str(eager.value), str(eager.value)


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_wrong_dtype(op, name):
    args = _with(op, name, lambda x: x.to(torch.complex64))
    _raises(op, args, TypeError, f"{name} must be [", "got [", "complex64")


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_wrong_rank(op, name):
    spec = get_op(op).checks.tensors[name]
    _raises(
        op, _with(op, name, lambda x: x.flatten()[0]), ValueError, "got []"
    ) if spec.dims else None
    if not spec.prefix:
        args = _with(op, name, lambda x: x[None])
        _raises(op, args, ValueError, f"{name} must be {spec.shape_text}", "got [1, ")


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_wrong_size(op, name):
    """Each dimension by itself one larger, wherever something else fixes it."""
    checks = get_op(op).checks
    seen = Counter(n for s in checks.tensors.values() for d in s.dims for n in _letters(d))
    prefixes = sum(s.prefix for s in checks.tensors.values())
    spec = checks.tensors[name]
    tensor = op_args(op, 5)[get_op(op).params.index(name)]
    fixed = [
        i - len(spec.dims)
        for i, dim in enumerate(spec.dims)
        if (not dim.isidentifier() and dim != "n+1") or seen[dim] > 1
    ]
    if spec.prefix and prefixes > 1:
        fixed.append(-len(spec.dims) - 1)
    for dim in fixed:
        shape = list(tensor.shape)
        shape[dim] += 1
        larger = tensor.new_zeros(shape)
        _raises(op, _with(op, name, lambda _, x=larger: x), ValueError, " must ", "got ")


@pytest.mark.parametrize(("op", "name"), [(o, n) for o, n in TENSORS if n != get_op(o).params[0]])
def test_wrong_device(op, name):
    args = _with(op, name, lambda x: x.to("meta"))
    with pytest.raises(ValueError, match=f"{op}: {name} must be on cpu like .*, got meta"):
        get_op(op).overload(*args)


BAD_VALUES = [
    ("rms_norm", "eps", -1e-5, "eps must satisfy eps >= 0, got eps = -1e-05"),
    ("rms_norm", "eps", math.nan, "got eps = nan"),
    ("add_rms_norm", "eps", -1.0, "eps must satisfy"),
    ("mla_latent_write", "eps", -1.0, "eps must satisfy"),
    ("mla_latent_write", "kv_cache", torch.zeros(3, 0, 48), "P must satisfy P > 0, got P = 0"),
    ("mla_decode", "kv_cache", torch.zeros(3, 0, 48), "P must satisfy P > 0, got P = 0"),
    ("mla_decode", "kv_lora_rank", 0, "0 < kv_lora_rank <= q_latent.shape[-1], got kv_lora"),
    ("mla_decode", "kv_lora_rank", 49, "got kv_lora_rank = 49, q_latent = [5, 2, 4, 48]"),
    ("mla_decode_value", "kv_cache", torch.zeros(3, 0, 48), "P must satisfy P > 0, got P = 0"),
    ("mla_decode_value", "kv_lora_rank", 49, "got kv_lora_rank = 49, q_latent = [5, 2, 4, 48]"),
    ("mla_prefill", "max_seqlen_q", -1, "max_seqlen_q must satisfy"),
    ("mla_prefill", "max_seqlen_k", -1, "max_seqlen_k must satisfy"),
    ("mla_prefill", "cu_seqlens_q", torch.zeros(0, dtype=torch.int32), "must be [B+1] int32"),
    ("moe_route", "top_k", 17, "1 <= top_k <= min(32, E // n_group * topk_group), got top_k = 17"),
    ("moe_route", "top_k", 0, "got top_k = 0"),
    ("moe_route_sort", "top_k", 17, "got top_k = 17"),
    ("moe_route_sort", "expert_range", [3], "expert_range must satisfy"),
    ("moe_route_sort", "expert_range", [5, 17], "expert_range[1] <= E, got expert_range = [5, 17]"),
    ("moe_select", "top_k", 17, "got top_k = 17"),
    ("moe_select", "n_group", 3, "n_group and E must satisfy E % n_group == 0, got E = 16, n_gr"),
    ("moe_select", "n_group", 0, "n_group must satisfy n_group >= 1"),
    ("moe_select", "topk_group", 2, "topk_group must satisfy"),
    ("moe_select", "logits", torch.zeros(5, 1025), "E must satisfy 1 <= E <= 1024, got E = 1025"),
    ("moe_sort", "num_experts", 0, "num_experts must satisfy"),
    ("moe_sort", "expert_range", [3], "expert_range must satisfy"),
    ("moe_sort", "expert_range", [5, 3], "expert_range must satisfy"),
    ("moe_sort", "expert_range", [5, 17], "expert_range[1] <= num_experts"),
    ("moe_experts_int4", "expert_range", [3], "expert_range must satisfy"),
    ("moe_experts_int4", "expert_range", [0, 5], "expert_range and E must satisfy"),
    ("moe_experts_int4", "shared_down", None, "shared_gate_up and shared_down must satisfy"),
    ("moe_experts_int4", "shared_gate_up", None, "shared_gate_up and shared_down must satisfy"),
    ("moe_experts_int4", "x", torch.zeros(5, 100), "D must satisfy D % 32 == 0, got D = 100"),
    ("moe_experts_int4", "gate_up_packed", torch.zeros(4, 80, 16).int(), "F must satisfy"),
    ("int4_linear", "x", torch.zeros(5, 40), "K must satisfy K % 32 == 0, got K = 40"),
    ("vision_rope", "qkv", torch.zeros(5, 3, 2, 6), "head_dim must satisfy head_dim % 4 == 0"),
    ("vision_rope", "qkv", torch.zeros(5, 2, 2, 8), "qkv must be [L, 3, H, head_dim]"),
    ("vision_pos_embed", "x", torch.zeros(5, 15), "D must satisfy D % 2 == 0"),
    ("vision_pos_embed", "table", torch.zeros(0, 8, 16), "rows must satisfy rows > 0"),
    ("vision_pos_embed", "table", torch.zeros(8, 0, 16), "columns must satisfy columns > 0"),
    ("vision_pos_embed", "grid_thws", torch.zeros(5, 2).long(), "grid_thws must be [n, 3]"),
    ("vision_attention", "max_seqlen", -1, "max_seqlen must satisfy"),
    ("patch_merge", "merged_length", -1, "merged_length must satisfy"),
    ("patch_merge", "eps", -1.0, "eps must satisfy"),
    ("silu_mul", "gate_up", torch.zeros(5, 7), "gate_up must be [..., 2*F]"),
]


@pytest.mark.parametrize(("op", "name", "value", "message"), BAD_VALUES)
def test_bad_value(op, name, value, message):
    _raises(op, _with(op, name, lambda _: value), ValueError, message)


def test_every_rule_has_a_bad_value():
    """Each rule of each op is run into by a value above, and by nothing else before it."""
    reached = set()
    for op, name, value, _ in BAD_VALUES:
        with pytest.raises(ValueError, match=f"^{op}: ") as caught:
            call(op, _with(op, name, lambda _, v=value: v))
        reached.add(str(caught.value).partition(" must satisfy ")[0])
    # The router's rules are one text for all of its forms.
    router = get_op("moe_select").checks.rules
    assert get_op("moe_route").checks.rules == router
    assert router.items() <= get_op("moe_route_sort").checks.rules.items()
    forms = ("moe_route", "moe_route_sort")
    rules = {
        f"{op}: {key}"
        for op in OPS
        for key in get_op(op).checks.rules
        if not (op in forms and key in router)
    }
    assert rules <= reached


@pytest.mark.parametrize("op", OPS)
def test_error_reaches_the_user_of_torch_compile(op):
    torch._dynamo.reset()
    name = next(iter(get_op(op).checks.tensors))
    args = _with(op, name, lambda x: x.to(torch.complex64))
    compiled = torch.compile(lambda *a: call(op, a), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=f"{op}: {name} must be") as caught:
        compiled(*args)
    assert isinstance(caught.value, (TypeError, torch._dynamo.exc.TorchRuntimeError))


@pytest.mark.parametrize("op", OPS)
def test_nothing_ran_before_the_error(op):
    """Written arguments are as before when a later argument is refused."""
    contract = get_op(op)
    last = [n for n in contract.checks.tensors if n not in contract.mutates][-1]
    args = _with(op, last, lambda x: x.to(torch.complex64))
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    with pytest.raises(TypeError):
        call(op, args)
    for a, b in zip(args, before, strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_written_argument_that_overlaps_itself():
    args = _with("vision_rope", "qkv", lambda x: x[:, :, :1].expand(-1, -1, 2, -1))
    _raises("vision_rope", args, ValueError, "qkv is written and must not overlap itself")
    args = _with("mla_latent_write", "kv_cache", lambda x: x[:1].expand(4, -1, -1))
    _raises("mla_latent_write", args, ValueError, "kv_cache is written and must not overlap")


def test_not_a_tensor_is_torchs_own_error():
    with pytest.raises(RuntimeError, match=r"rms_norm\(\) Expected a value of type 'Tensor'"):
        kimi_ops.rms_norm([1.0], torch.ones(1), 1e-5)
