"""The test body catches what it is there for: each reference with one line made wrong.

An error is planted in the text of a reference, the result is registered as a backend, and the
same `check_op` that every kernel must pass has to refuse it on the op's ordinary cases.
"""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType, SimpleNamespace

import pytest
import torch

import kimi_ops
from kimi_ops._dispatch import _OPS, get_op
from kimi_ops.testing import cases, check_op

# op: (what is wrong, module that holds the line, the line, the line made wrong)
PLANTED = [
    ("rms_norm", "eps outside the root", ".mean(-1, keepdim=True) + eps).rsqrt()",
     ".mean(-1, keepdim=True)).rsqrt() + eps"),
    ("rms_norm", "weight forgotten", "return weight * normal.to(x.dtype)",
     "return normal.to(x.dtype)"),
    ("rms_norm", "statistics in low precision", "wide = widen(x)", "wide = x"),
    ("add_rms_norm", "norm of the input alone", "rms_norm(h, weight, eps), h",
     "rms_norm(x, weight, eps), h"),
    ("silu_mul", "gate and up swapped", "gate, up = gate_up", "up, gate = gate_up"),
    ("mla_latent_write", "rope values normalised too", "rope(key,",
     "rope(rms_norm(key, key.new_ones(key.shape[1]), eps),"),
    ("mla_latent_write", "position off by one", "rope(key, positions,", "rope(key, positions + 1,"),
    ("mla_latent_write", "slot -1 written", "inside = (slots >= 0) &", "inside = (slots >= -1) &"),
    ("mla_latent_write", "weights exchanged", "rms_norm(latent, kv_norm_weight, eps)",
     "rms_norm(latent, q_norm_weight[: latent.shape[1]], eps)"),
    ("mla_absorb_query", "rope left out", "rope(rotary, positions, inv_freq)", "rotary"),
    ("mla_absorb_query", "heads mixed up", '"thn,hnc->thc", nope, w_uk',
     '"thn,hnc->thc", nope, w_uk.flip(0)'),
    ("mla_decode", "causal mask off by one", "hidden = token >= limit", "hidden = token > limit"),
    ("mla_decode", "new tokens not causal", "torch.arange(new - 1, -1, -1, device=device)",
     "torch.zeros(new, dtype=torch.long)"),
    ("mla_decode", "scale forgotten", "widen(kv)) * scale", "widen(kv)) * 1.0"),
    ("mla_latent_write", "fp8 cache: key before latent", "pack(entry, len(kv_norm_weight))",
     "pack(entry.roll(2 * len(inv_freq), 1), len(kv_norm_weight))"),
    ("mla_latent_write", "fp8 cache: scale of the neighbour",
     "entry = pack(entry, len(kv_norm_weight))",
     "entry = pack(entry, len(kv_norm_weight))\n        c = len(kv_norm_weight)\n"
     "        entry[:, c : c + 16] = entry[:, c : c + 16].roll(1, 0)"),
    ("mla_decode", "fp8 cache: scale of the neighbour", "unpack(entry, kv_lora_rank, kv.dtype)",
     "unpack(torch.cat((entry[:, :kv_lora_rank], entry[:, kv_lora_rank:][:, :16].roll(1, 0),"
     " entry[:, kv_lora_rank + 16 :]), 1), kv_lora_rank, kv.dtype)"),
    ("mla_decode", "fp8 cache: rope values from the scale on",
     "unpack(entry, kv_lora_rank, kv.dtype)",
     "unpack(torch.cat((entry[:, : kv_lora_rank + 16], entry[:, kv_lora_rank : -16]), 1),"
     " kv_lora_rank, kv.dtype)"),
    ("mla_decode", "lse to base 2", "return out, lse.", "return out, 1.4426950408889634 * lse."),
    ("mla_decode", "unused tail not left out", "used = token < length[:, None]",
     "used = token < (length[:, None] + 1).clamp(max=capacity)"),
    ("mla_decode_value", "heads mixed up", "out.flatten(0, 1), w_uv)",
     "out.flatten(0, 1), w_uv.flip(0))"),
    ("mla_decode_value", "sequences mixed up", "value.view(", "value.flip(0).view("),
    ("mla_decode_value", "heads and tokens exchanged", "mla_project_value(out.flatten(0, 1), w_uv)",
     "mla_project_value(out.transpose(1, 2).reshape(-1, *out.shape[2:]), w_uv)"),
    ("mla_project_value", "weight transposed", '"thc,hvc->thv", out, w_uv',
     '"thc,hcv->thv", out, w_uv.reshape(w_uv.shape[0], w_uv.shape[2], w_uv.shape[1])'),
    ("mla_prefill", "causal mask off by one", "offset = (k1 - k0) - (q1 - q0)",
     "offset = 1 + (k1 - k0) - (q1 - q0)"),
    ("mla_prefill", "aligned top left", "(k1 - k0) - (q1 - q0) if", "0 if"),
    ("mla_prefill", "rows of no sequence unset", "q.new_full(q.shape[:2], -torch.inf)",
     "q.new_zeros(q.shape[:2])"),
    ("merge_attention", "empty side multiplied by zero", ".masked_fill(absent, 0)", ""),
    ("merge_attention", "sides exchanged", "(out_a, lse_a), (out_b, lse_b)",
     "(out_a, lse_b), (out_b, lse_a)"),
    ("moe_select", "bias in the weights", "weights = score.gather", "weights = choice.gather"),
    ("moe_select", "NaN ranks first", "tier = number.int()", "tier = (~number).int()"),
    ("moe_select", "dropped groups leak", "tier += 2 * kept", "tier += 0 * kept"),
    ("moe_select", "ties to the higher id",
     "values.sort(dim=-1, descending=True, stable=True).indices",
     "values.shape[-1] - 1 - values.flip(-1).sort(dim=-1, descending=True, stable=True).indices"),
    ("moe_select", "scaled before normalising", "weights = score.gather(1, ids)",
     "weights = score.gather(1, ids) * scale"),
    ("moe_select", "group score of one expert", "values[..., :2].sum(-1)", "values[..., 0]"),
    ("moe_route", "bfloat16 gate", "wide @ gate_weight.to(wide.dtype).T",
     "(x.bfloat16() @ gate_weight.bfloat16().T).to(wide.dtype)"),
    ("moe_route", "bias forgotten", "moe_select(logits, bias,", "moe_select(logits, 0 * bias,"),
    ("moe_route_sort", "tables of another batch", "moe_sort(routed[1],",
     "moe_sort(routed[1].flip(0),"),
    ("moe_route_sort", "expert range ignored", "len(gate_weight), expert_range)",
     "len(gate_weight), None if expert_range is None else"
     " (0, expert_range[1] - expert_range[0]))"),
    ("moe_sort", "not stable", "local.sort(stable=True)", "local.flip(0).sort(stable=True)"),
    ("moe_sort", "offsets off by one", "torch.searchsorted(by_expert, experts)",
     "torch.searchsorted(by_expert, experts, right=True)"),
    ("moe_experts_int4", "gate and up swapped", "x[tokens] @ gate_up.T",
     "x[tokens] @ gate_up.roll(len(gate_up) // 2, 0).T"),
    ("moe_experts_int4", "down weights unscaled", "down_scale[expert], x.dtype",
     "torch.ones_like(down_scale[expert]), x.dtype"),
    ("moe_experts_int4", "routing weight forgotten", "weights.to(total.dtype).masked_fill",
     "torch.ones_like(weights).masked_fill"),
    ("moe_experts_int4", "shared expert scaled", "silu_mul(x @ shared_gate_up.T) @ shared_down.T",
     "2.827 * (silu_mul(x @ shared_gate_up.T) @ shared_down.T)"),
    ("moe_experts_int4", "repeated choice counted once", ".sum(1)", ".amax(1)"),
    ("moe_experts_int4", "expert range ignored", "(expert_range[0] if expert_range else 0)", "0"),
    ("int4_linear", "scale of the next group", "dequantize(packed, scale,",
     "dequantize(packed, scale.roll(1, 1),"),
    ("int4_linear", "rows shifted", "x @ dequantize(packed, scale, x.dtype).T",
     "(x @ dequantize(packed, scale, x.dtype).T).roll(1, -1)"),
    ("vision_pos_embed", "rows and columns exchanged", "= taps(place.row, place.h, table.shape[0]",
     "= taps(place.column, place.w, table.shape[0]"),
    ("vision_pos_embed", "other cubic coefficient", "_A = -0.75", "_A = -0.5"),
    ("vision_pos_embed", "corners aligned",
     "(index.to(dtype) + 0.5) * (table_size / size.to(dtype)) - 0.5",
     "index.to(dtype) * ((table_size - 1) / (size.to(dtype) - 1).clamp(min=1))"),
    ("vision_pos_embed", "no time for the first frame", "(place.t == 1)", "(place.frame == 0)"),
    ("vision_rope", "x and y exchanged", "(place.column, place.row)", "(place.row, place.column)"),
    ("vision_rope", "value rotated too", "return torch.cat((rotated, qkv[:, 2:]), dim=1)",
     "return torch.cat((rotated, rotate_pairs(qkv[:, 2:], angles(qkv, grid_thws))), dim=1)"),
    ("vision_attention", "segments not separated", "starts = cu_seqlens.tolist()",
     "starts = [0, max(cu_seqlens.tolist())]"),
    ("vision_attention", "scale of another width", "v[part], scale", "v[part], scale * 1.1"),
    ("patch_merge", "rows and columns of a block exchanged",
     "place.row % 2 * 2 + place.column % 2", "place.column % 2 * 2 + place.row % 2"),
    ("patch_merge", "sum over frames", "widen(normal) / place.t[:, None]", "widen(normal)"),
    ("patch_merge", "norm after the mean", "normal = layer_norm(x, (width,), final_weight,"
     " final_bias, eps)", "normal = x"),
]  # fmt: skip


def _planted(op: str, right: str, wrong: str) -> ModuleType:
    """The op's reference as a module of its own, with one piece of text replaced."""
    original = importlib.import_module(f"kimi_ops.reference.{op}")
    source = inspect.getsource(original)
    assert source.count(right) == 1, f"{op}: {source.count(right)} times {right!r}"
    module = ModuleType(f"planted_{op}")
    exec(compile(source.replace(right, wrong), f"<planted {op}>", "exec"), module.__dict__)
    return module


@pytest.fixture
def register():
    before = {op: dict(get_op(op)._loaded) for op in kimi_ops.op_names()}
    yield kimi_ops.register_backend
    for op, loaded in before.items():
        _OPS[op]._loaded.clear()
        _OPS[op]._loaded.update(loaded)


def _first_failure(op: str) -> str | None:
    for case in cases(op):
        try:
            check_op(op, case.args(), "planted")
        except AssertionError as error:
            return f"{case}: {error}"
    return None


@pytest.mark.parametrize(
    ("op", "what", "right", "wrong"), PLANTED, ids=[f"{p[0]}: {p[1]}" for p in PLANTED]
)
def test_planted_error_is_caught(register, record_property, op, what, right, wrong):
    register(op, "planted", _planted(op, right, wrong))
    failure = _first_failure(op)
    assert failure is not None, f"{op}: nothing noticed that {what}"
    record_property("caught", failure)


@pytest.mark.parametrize("op", kimi_ops.op_names())
def test_unchanged_copy_passes(register, op):
    source = inspect.getsource(importlib.import_module(f"kimi_ops.reference.{op}"))
    module = ModuleType(f"copy_of_{op}")
    exec(compile(source, f"<copy of {op}>", "exec"), module.__dict__)
    register(op, "planted", module)
    assert _first_failure(op) is None


def test_every_op_has_a_planted_error():
    assert {op for op, *_ in PLANTED} == set(kimi_ops.op_names())


def _beyond(y, offset):
    """The element that lies ``offset`` elements behind the first one of ``y``."""
    return y.as_strided((1,), (1,), y.storage_offset() + offset)


def _behaviour(change):
    reference = get_op("rms_norm").load("reference")

    def launch(y, x, weight, eps):
        reference.launch(y, x, weight, eps)
        change(y, x)

    return SimpleNamespace(launch=launch, unsupported=lambda *args: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y, x: y[-1:].fill_(torch.nan), "NaN misplaced"),
        (lambda y, x: x.mul_(2), "changed its argument x"),
        (lambda y, x: y.mul_(1 + 1e-2 * torch.rand(())), "differs between runs"),
        (lambda y, x: y.mul_(1.01), "all errors lean to one side"),
        (lambda y, x: _beyond(y, y.numel()).fill_(0), "wrote outside its output 0"),
        (lambda y, x: _beyond(y, -1).fill_(0), "wrote outside its output 0"),
        (lambda y, x: y[..., 5].zero_(), "over budget"),
    ],
    ids=[
        "a row left unwritten",
        "an argument written",
        "another result each time",
        "one per cent too large",
        "written past the end",
        "written before the start",
        "one channel left out",
    ],
)
def test_misbehaviour_is_caught(register, change, message):
    register("rms_norm", "planted", _behaviour(change))
    with pytest.raises(AssertionError, match=message):
        check_op("rms_norm", cases("rms_norm")[1].args(), "planted")


@pytest.mark.parametrize("op", ["rms_norm", "mla_decode", "moe_experts_int4", "vision_attention"])
def test_strides_ignored_are_noticed(register, op):
    reference, contract = get_op(op).load("reference"), get_op(op)
    for name in contract.checks.tensors:
        index = contract.params.index(name)

        def launch(outputs, *args, index=index):
            wrong, arg = list(args), args[index]
            if arg is not None:
                packed = torch.empty(arg.shape).stride()
                wrong[index] = arg.as_strided(arg.shape, packed, arg.storage_offset())
            reference.launch(outputs, *wrong)

        module = SimpleNamespace(launch=launch, unsupported=lambda *args: None)
        register(op, "planted", module)
        assert _first_failure(op) is not None, f"{op}: nothing noticed that {name} may be strided"


def test_unwritten_output_is_poison(register):
    skip_last = SimpleNamespace(
        launch=lambda y, x, w, eps: (
            get_op("rms_norm").load("reference").launch(y[:-1], x[:-1], w, eps)
        ),
        unsupported=lambda *args: None,
    )
    register("rms_norm", "planted", skip_last)
    with pytest.raises(AssertionError, match=r"output 0\[2, 0\] NaN misplaced: nan"):
        check_op("rms_norm", cases("rms_norm")[1].args(), "planted")
