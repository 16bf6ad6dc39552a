"""`moe_route`: every backend against the oracle, the oracle against transformers' router."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

import kimi_ops
from kimi_ops import _arrivals
from kimi_ops.reference.moe_route import moe_route
from kimi_ops.testing import cases, check_op
from kimi_ops.testing.inputs import moe

OP = "moe_route"


def test_matches_oracle(backend, case):
    check_op(OP, case.args(), backend)


@pytest.mark.parametrize(
    "name", ["bf16-kimi-17", "bf16-144", "bf16-groups", "bf16-kimi-1", "fp32-9x64", "bf16-1024"]
)
def test_reference_is_transformers_router(name):
    case = next(c for c in cases(OP) if c.name == name)
    x, gate, bias, top_k, n_group, topk_group, scale, normalize = case.args()
    config = DeepseekV3Config(
        hidden_size=x.shape[1],
        n_routed_experts=len(gate),
        num_experts_per_tok=top_k,
        n_group=n_group,
        topk_group=topk_group,
        routed_scaling_factor=scale,
        norm_topk_prob=normalize,
    )
    router = DeepseekV3TopkRouter(config)
    router.weight.data, router.e_score_correction_bias = gate, bias
    with torch.no_grad():
        _, theirs, their_ids = router(x)
    weights, ids = moe_route(x, gate, bias, top_k, n_group, topk_group, scale, normalize)
    # Their order is unspecified, so both are put in the order of ids.
    ids, order = ids.long().sort(-1)
    their_ids, their_order = their_ids.sort(-1)
    assert torch.equal(ids, their_ids)
    torch.testing.assert_close(weights.gather(1, order), theirs.gather(1, their_order))


def test_gate_is_a_float32_product():
    # Rounded to bfloat16, both logits would be 1 and the tie would go to expert 0.
    x = torch.ones(1, 32).bfloat16()
    gate = torch.full((2, 32), 1 / 32).bfloat16()
    gate[1, 0] += 2**-11
    assert moe_route(x, gate, torch.zeros(2), 1)[1].tolist() == [[1]]


def _triton(x, gate, bias, top_k=4, arch=90, seed=None):
    """Weights, ids and names of the launches of the Triton kernels, executed as PTX."""
    pytest.importorskip("triton", reason="needs triton: pip install 'triton>=3.4'")
    from kimi_ops.testing.runner import emulated

    with emulated(arch=arch, seed=seed) as emulation, kimi_ops.use_backend(moe_route="triton"):
        weights, ids = kimi_ops.moe_route(x, gate, bias, top_k)
    return weights, ids, [name for name, _ in emulation.launches]


def _small(tokens, dtype=torch.bfloat16):
    with torch.device("cpu"):  # where the generator is
        args = moe.moe_route(torch.Generator().manual_seed(tokens), tokens, 320, 48, 4, dtype)
    return args[:3]


@pytest.mark.parametrize(("tokens", "launches"), [(1, 1), (4, 1), (5, 1), (64, 1), (65, 2)])
def test_triton_takes_one_launch_up_to_64_tokens(tokens, launches):
    *_, names = _triton(*_small(tokens))
    assert len(names) == launches


def test_triton_multiplies_two_dtypes_in_float32(backend):
    for tokens in (2, 9):
        x, gate, bias = _small(tokens, torch.float32)
        check_op(OP, (x.bfloat16(), gate, bias, 4, 1, 1, 1.0, True), backend, repeats=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tiles_of_triton_3_4(monkeypatch, dtype):
    """It has no product of less than 16 columns; both dtypes' tiles, with the Triton here."""
    kernels = pytest.importorskip("kimi_ops.kernels.moe_route", reason="needs triton")
    from kimi_ops.kernels._moe_route_tiles import narrow
    from kimi_ops.testing.ways import WAYS, with_way

    tiles = dict(zip(("NARROW", "NARROW_FLOAT32"), narrow("3.4.0"), strict=True))
    assert {tile.T for tile in tiles.values()} == {16}
    for name, tile in tiles.items():
        monkeypatch.setattr(kernels, name, tile)
    way = next(way for way in WAYS if way.name == "triton[sm_80]")
    with with_way(OP, way) as name:
        check_op(OP, (*_small(20, dtype), 4, 1, 1, 1.0, True), name)


@pytest.mark.parametrize("tokens", [3, 20])
def test_triton_leaves_the_counters_at_zero(tokens):
    pytest.importorskip("triton", reason="needs triton: pip install 'triton>=3.4'")
    kept = torch.zeros(_arrivals.PER_LAUNCH, dtype=torch.int32)
    args = _small(tokens)
    with mock.patch.object(_arrivals, "counters", return_value=kept):
        first = _triton(*args, seed=1)
        assert not kept.any()
        again = _triton(*args, seed=2)  # in another order of the programs
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_triton_row_does_not_depend_on_its_batch():
    x, gate, bias = _small(66)
    with kimi_ops.batch_invariant():
        weights, ids, _ = _triton(x, gate, bias)
        for rows in (slice(7, 8), slice(3, 9)):
            alone = _triton(x[rows], gate, bias)
            assert torch.equal(alone[0], weights[rows])
            assert torch.equal(alone[1], ids[rows])


def test_counters_are_shared_by_launches_of_one_stream_only():
    device = torch.device("cuda", 0)
    with (
        mock.patch.object(_arrivals, "_POOLS", {}),
        mock.patch.object(_arrivals, "_LAUNCHES", 4),
        mock.patch.object(_arrivals, "_zeros", lambda _, n: torch.zeros(n, dtype=torch.int32)),
        mock.patch("torch.cuda.synchronize"),
        mock.patch("torch.cuda.is_current_stream_capturing") as recording,
        mock.patch("torch.cuda.current_stream") as current,
    ):

        def place():
            """Of the counters that a launch gets."""
            return _arrivals.counters(device).data_ptr()

        recording.return_value, current.return_value.cuda_stream = True, 1
        early = _arrivals.counters(device)  # recorded before the device has any: the graph's own
        recording.return_value = False
        eager = place()
        assert place() == eager != early.data_ptr()
        current.return_value.cuda_stream = 2
        other = place()
        assert other != eager
        recording.return_value = True
        graphs = {place(), place()}
        assert len(graphs | {eager, other}) == 4  # no two launches of a graph share
        used_up = _arrivals.counters(device)
        assert used_up.data_ptr() not in graphs | {eager, other}
        recording.return_value = False
        assert place() == other
