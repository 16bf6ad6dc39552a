"""The CUDA C++ kernels of `moe_route`, executed as PTX: launches, counters, shapes, bytes."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import kimi_ops
from kimi_ops import _arrivals
from kimi_ops.testing import check_op
from kimi_ops.testing.inputs import moe
from kimi_ops.testing.runner import emulated
from kimi_ops.testing.ways import ways_of, with_way

pytest.importorskip("cuda.bindings", reason="needs NVRTC: pip install 'kimi-ops[compile]'")


def _inputs(tokens, d=320, experts=48, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(tokens)
    return moe.moe_route(generator, tokens, d, experts, 4, dtype)


def _route(args, seed=None):
    """Weights, ids and the launches."""
    x, gate, bias, top_k, *_ = args
    with emulated(arch=80, seed=seed) as emulation, kimi_ops.use_backend(moe_route="cuda"):
        weights, ids = kimi_ops.moe_route(x, gate, bias, top_k)
    return weights, ids, emulation.launches


@pytest.mark.parametrize(
    ("tokens", "experts", "launches"),
    [(1, 48, 1), (9, 48, 1), (17, 48, 1), (64, 48, 1), (65, 48, 2), (2, 400, 2)],
)
def test_one_launch_up_to_64_tokens_and_384_experts(tokens, experts, launches):
    assert len(_route(_inputs(tokens, experts=experts))[2]) == launches


@pytest.mark.parametrize("tokens", [3, 20])
def test_leaves_the_counters_at_zero(tokens):
    kept = torch.zeros(_arrivals.PER_LAUNCH, dtype=torch.int32)
    args = _inputs(tokens)
    with mock.patch.object(_arrivals, "counters", return_value=kept):
        first = _route(args, seed=1)
        assert not kept.any()
        again = _route(args, seed=2)  # in another order of the blocks
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@pytest.mark.parametrize(
    ("d", "experts"), [(40, 50), (100, 48), (8, 3)], ids=["ragged", "no-vectors", "tiny"]
)
@pytest.mark.parametrize("tokens", [3, 70])
def test_any_width(tokens, d, experts):
    way = next(w for w in ways_of("moe_route") if w.backend == "cuda")
    x, gate, bias, *_ = _inputs(tokens, d, experts)
    with with_way("moe_route", way) as backend:
        check_op("moe_route", (x, gate, bias, 2, 1, 1, 1.0, True), backend, repeats=1)


def test_rows_off_16_bytes_are_copied():
    args = _inputs(3)
    x = torch.empty(3 * 320 + 1, dtype=torch.bfloat16)[1:].view(3, 320).copy_(args[0])
    weights, ids, launches = _route((x, *args[1:]))
    assert len(launches) == 1
    assert torch.equal(weights, _route(args)[0])
    assert torch.equal(ids, _route(args)[1])


def test_reads_the_gate_once():
    x, gate, bias, *rest = _inputs(1, d=1024, experts=96)
    ((name, report),) = _route((x, gate, bias, *rest))[2]
    assert name == "moe_route_few_kernel_bf16_1"
    blocks, bias_bytes = 96 // 16 * 4, 4 * 96
    # The gate once, x once for 16 experts, the bias once a block, four parts of the logits.
    loads = gate.numel() * 2 + 96 // 16 * x.numel() * 2
    selection = blocks * bias_bytes + 4 * 96 * 4
    # A lane of every row past the last token loads the last one: the same sectors again.
    assert report.total.global_sectors * 32 <= 1.03 * (loads + selection) + 4096
    assert report.total.global_sectors <= 1.05 * report.total.global_sectors_ideal
    assert report.unique_read_bytes >= gate.numel() * 2
