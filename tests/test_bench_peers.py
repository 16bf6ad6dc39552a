"""The peers of the benchmarks: their interface, and that each agrees with the reference here."""

from __future__ import annotations

import importlib
import pkgutil
import re
from functools import partial

import pytest
import torch
from op_calls import clone

import kimi_ops
from kimi_ops._dispatch import get_op, use_backend
from kimi_ops.bench import peers as package
from kimi_ops.bench.measure import APART
from kimi_ops.bench.peers import Declined, _attention, _experts, peers
from kimi_ops.testing.check import as_tuple
from kimi_ops.testing.inputs import int4, mla, moe, norm, normal, vision

BF16 = torch.bfloat16
PEERS = peers()
_IDS_APART = 0.0  # of integers


def _merge(generator):
    def side():
        lse = normal(generator, 9, 4, dtype=torch.float32, std=3)
        return normal(generator, 9, 4, 32, dtype=BF16), lse

    return *side(), *side()


def _decode(generator, value=0, in_order=False, **kind):
    lengths = kind.pop("lengths", (70, 70, 9))
    build = partial(mla.mla_decode_value, value=value) if value else mla.mla_decode
    q, cache, table, *rest = build(generator, lengths=lengths, heads=4, page=8, **kind)
    if in_order:
        used = -(-max(lengths) // 8)
        table[:, :used] = torch.arange(used * len(lengths)).view(len(lengths), used)
        cache = normal(generator, *cache.shape, dtype=BF16)
    return q, cache, table, *rest


def _padded(generator):
    *args, slots, cache, eps = mla.mla_latent_write(generator, tokens=9, page=8)
    slots = slots.masked_fill((slots < 0) | (slots >= 8 * len(cache)), -1)
    return *args, slots, cache, eps


_ROUTE = {"tokens": 9, "d": 64, "experts": 64, "top_k": 8}
_EXPERTS = {"tokens": 9, "experts": 12, "top_k": 3, "d": 128, "f": 256}
_GRIDS = ((1, 4, 6), (1, 2, 2))
_CLIPS = ((1, 4, 6), (3, 2, 4))
# op -> its calls: name -> what makes the arguments from a generator.
CALLS = {
    "rms_norm": {"": partial(norm.rms_norm, shape=(5, 64), dtype=BF16)},
    "add_rms_norm": {"": partial(norm.add_rms_norm, shape=(5, 64), dtype=BF16)},
    "silu_mul": {"": partial(norm.silu_mul, shape=(5, 64), dtype=BF16)},
    "mla_latent_write": {
        "padded": _padded,
        "fp8": partial(mla.mla_latent_write, tokens=3, page=8, fp8=True),
    },
    "mla_absorb_query": {"": partial(mla.mla_absorb_query, tokens=5, heads=4)},
    "mla_decode": {
        "": _decode,
        "in order": partial(_decode, lengths=(64, 64), in_order=True),
        "new tokens": partial(_decode, new=3),
        "fp8": partial(_decode, fp8=True),
    },
    "mla_decode_value": {"": partial(_decode, value=24)},
    "mla_project_value": {"": partial(mla.mla_project_value, tokens=5, heads=4)},
    "mla_prefill": {
        "": partial(mla.mla_prefill, queries=(9, 20), keys=(9, 20), heads=2),
        "longer keys": partial(mla.mla_prefill, queries=(9, 1), keys=(31, 4), heads=2),
        "all keys": partial(mla.mla_prefill, queries=(9,), keys=(31,), heads=2, causal=False),
    },
    "merge_attention": {"": _merge},
    "moe_select": {
        "": partial(moe.moe_select, **_ROUTE),
        "groups": partial(moe.moe_select, **_ROUTE, groups=(8, 4)),
    },
    "moe_route": {"": partial(moe.moe_route, **_ROUTE)},
    "moe_sort": {
        "": partial(moe.moe_sort, tokens=33, experts=48, top_k=6),
        "range": partial(
            moe.moe_sort, tokens=33, experts=48, top_k=6, routing="foreign", expert_range=(8, 20)
        ),
    },
    "moe_route_sort": {"": partial(moe.moe_route_sort, **_ROUTE, expert_range=(5, 30))},
    "moe_experts_int4": {
        "": partial(moe.moe_experts_int4, **_EXPERTS),
        "shared": partial(moe.moe_experts_int4, **_EXPERTS, shared=32),
        "range": partial(moe.moe_experts_int4, **_EXPERTS, expert_range=(4, 8)),
    },
    "int4_linear": {"": partial(int4.int4_linear, shape=(5, 128), n=48)},
    "vision_pos_embed": {
        "": partial(vision.vision_pos_embed, grids=_CLIPS, d=64, table=(8, 8)),
        "table's size": partial(vision.vision_pos_embed, grids=((1, 8, 8),), d=64, table=(8, 8)),
    },
    "vision_rope": {"": partial(vision.vision_rope, grids=_CLIPS, heads=2)},
    "vision_attention": {"": partial(vision.vision_attention, lengths=(9, 40), heads=2)},
    "patch_merge": {
        "": partial(vision.patch_merge, grids=_GRIDS, d=64),
        "clips": partial(vision.patch_merge, grids=_CLIPS, d=64),
    },
}
# A compiler takes seconds for each of these: the others are in the full grid.
_QUICK = ("vision_rope",)


def _cases():
    for name, peer in PEERS.items():
        for op in peer.OPS if "cpu" in peer.DEVICES else ():
            slow = name == "torch.compile" and op not in _QUICK
            for kind in CALLS[op]:
                label = "-".join(part for part in (name, op, kind) if part)
                yield pytest.param(
                    peer, op, kind, id=label, marks=[pytest.mark.full] if slow else []
                )


def _reference(op, args):
    contract = get_op(op)
    mine = clone(args)
    with use_backend(f"{op}=reference"):
        outputs = as_tuple(contract.overload(*mine))
    written = [mine[contract.params.index(name)] for name in contract.mutates]
    return written or outputs


@pytest.mark.parametrize(("peer", "op", "kind"), list(_cases()))
def test_peer_agrees_with_the_reference(peer, op, kind):
    if reason := peer.missing("cpu"):
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(1)
    first = CALLS[op][kind](generator)
    calls = [first, clone(first)]
    if op == "moe_experts_int4":  # whose calls share the weights
        calls[1] = (calls[1][0] * 2, *first[1:5], *calls[1][5:])
    expected = [_reference(op, call) for call in calls]
    before = [clone(call) for call in calls]
    with torch.inference_mode():
        try:
            run = peer.OPS[op](calls)
        except Declined as declined:
            pytest.skip(f"declined: {declined}")
        for i, wanted in enumerate(expected):
            found = as_tuple(run(i))
            for a, b in zip(found, wanted, strict=False):
                assert a.shape == b.shape
                a, b = a.double().nan_to_num(7), b.double().nan_to_num(7)
                limit = getattr(peer, "APART", APART) if b.any() else 0
                limit = limit if wanted[0].is_floating_point() else _IDS_APART
                assert (a - b).norm() <= limit * b.norm()
    written = {get_op(op).params.index(name) for name in get_op(op).mutates}
    for call, kept in zip(calls, before, strict=True):
        for place, (a, b) in enumerate(zip(call, kept, strict=True)):
            if isinstance(a, torch.Tensor) and place not in written:
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), place


@pytest.mark.parametrize("name", PEERS)
def test_peer_has_the_interface(name):
    peer = PEERS[name]
    assert name
    assert re.search(r"\d", peer.WRITTEN_AGAINST)
    assert set(peer.DEVICES) <= {"cpu", "cuda"}
    assert peer.OPS
    assert set(peer.OPS) <= set(kimi_ops.op_names())
    assert 0 < getattr(peer, "APART", APART) <= 5e-2
    assert peer.__doc__


@pytest.mark.parametrize("name", PEERS)
def test_what_is_missing_is_said_in_a_sentence_with_its_remedy(name, monkeypatch):
    peer = PEERS[name]
    for device in peer.DEVICES:
        _is_sentence(peer.missing(device))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(f"{peer.__name__}.find_spec", lambda name: None, raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    found = [peer.missing(device) for device in peer.DEVICES]
    for reason in found:
        _is_sentence(reason)
    if name not in ("torch eager", "torch SDPA", "torch int4pack"):  # torch is always there
        assert all(found)
        assert all("install" in reason or "build" in reason for reason in found)


def _is_sentence(reason):
    assert reason is None or re.fullmatch(r"\S+( \S+){3,}", reason)


def test_torch_eager_has_every_op():
    assert set(PEERS["torch eager"].OPS) == set(kimi_ops.op_names()) == set(CALLS)


def test_every_module_of_the_package_is_a_peer_of_its_own():
    modules = [m.name for m in pkgutil.iter_modules(package.__path__) if m.name[0] != "_"]
    assert len(modules) == len(PEERS)


def _declined(peer, op, *calls):
    with pytest.raises(Declined) as info:
        PEERS[peer].OPS[op](calls)
    _is_sentence(str(info.value))
    return str(info.value)


def test_copies_of_weights_and_scores_have_limits(monkeypatch):
    monkeypatch.setattr(_experts, "available_bytes", lambda device: 1 << 10)
    monkeypatch.setattr(_attention, "SCORE_BYTES", 1 << 10)
    generator = torch.Generator().manual_seed(1)
    experts = CALLS["moe_experts_int4"][""](generator)
    for peer in ("torch eager", "torch int4pack", "transformers"):
        if PEERS[peer].missing("cpu") is None:
            assert "experts would take" in _declined(peer, "moe_experts_int4", experts)
    linear = CALLS["int4_linear"][""](generator)
    assert "1 layers would take" in _declined("torch eager", "int4_linear", linear)
    prefill = CALLS["mla_prefill"][""](generator)
    assert "2 heads, 20 x 20," in _declined("torch eager", "mla_prefill", prefill)
    pictures = CALLS["vision_attention"][""](generator)
    assert "2 heads, 40 x 40," in _declined("torch eager", "vision_attention", pictures)


def test_calls_with_weights_of_their_own_are_declined():
    generator = torch.Generator().manual_seed(1)
    calls = [CALLS["moe_experts_int4"][""](generator) for _ in range(2)]
    assert "of its own" in _declined("torch eager", "moe_experts_int4", *calls)


def test_experts_that_no_call_chooses_are_not_repacked():
    generator = torch.Generator().manual_seed(1)
    args = moe.moe_experts_int4(generator, tokens=1, experts=12, top_k=3)
    assert _experts.chosen_experts([args, args]) == sorted(args[6].flatten().tolist())
    chosen, gate_up, down = _experts.wide_experts([args])
    assert len(chosen) == len(gate_up) == len(down) == 3


def test_weights_are_prepared_once_for_each_tensor():
    weight, other = torch.zeros(4), torch.zeros(4)
    made = []
    calls = [(0, weight), (0, other), (0, weight)]
    found = _experts.made_once(calls, 1, lambda call: made.append(call) or len(made))
    assert found == [1, 2, 1]
