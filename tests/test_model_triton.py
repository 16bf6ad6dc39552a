"""The complete model on the Triton kernels alone, interpreted and as PTX: a picture, a clip, text,
cached steps; and what a decoder layer launches."""

from __future__ import annotations

import contextlib

import model_calls
import pytest
import torch
from op_calls import Requests

import kimi_ops
from kimi_ops._target import targeting
from kimi_ops.model.kimi import KimiK25
from kimi_ops.model.make_checkpoint import make_checkpoint, tiny_config
from kimi_ops.testing.oracle import assert_close_to_oracle
from kimi_ops.testing.runner import emulated, target_of
from kimi_ops.testing.triton_interpreter import interpreted

FOLLOWING = (11, 12)  # ids of the cached steps
# What the kernels' names begin with. No part of the model has a dense int4 layer, a prompt in one
# part has nothing to merge, and the router and the experts select and sort for themselves.
STEMS = (
    "add_rms_norm",
    "mla_absorb_query",
    "mla_decode",
    "mla_latent_write",
    "mla_project_value",
    "moe_experts_int4",
    "moe_route",
    "packed_attention",  # of mla_prefill and vision_attention
    "patch_merge",
    "rms_norm",
    "silu_mul",
    "vision_pos_embed",
    "vision_rope",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton") / "checkpoint"
    make_checkpoint(folder, tiny_config(), dtype=torch.bfloat16, seed=5)
    return folder


@contextlib.contextmanager
def _way(arch):
    """Interpreted, or as PTX for an architecture; gives a function that names what was launched."""
    if arch is None:
        with targeting(target_of(80)), interpreted(seed=3) as report:
            yield lambda: {launch.kernel for launch in report.launches}
    else:
        with emulated(arch=arch) as emulation:
            yield lambda: {name for name, _ in emulation.launches}


@pytest.mark.parametrize("arch", [None, 80, 90], ids=["interpreted", "sm_80", "sm_90"])
@torch.no_grad()
def test_model_runs_on_triton_kernels_alone(folder, arch):
    model = KimiK25.from_pretrained(folder)
    ids, pixels = model_calls.prompt(model)

    routing = model_calls.Routing()
    with _way(arch) as launched, kimi_ops.use_backend("triton"), routing.kept():
        actual = model_calls.logits(model, ids, pixels, FOLLOWING)
    with routing.taken():
        baseline = model_calls.logits(model, ids, pixels, FOLLOWING)
    # In float32 the model's error is a thousandth of bfloat16's: exact enough to measure that.
    exact = KimiK25.from_pretrained(folder, dtype=torch.float32)
    with routing.taken():
        oracle = model_calls.logits(exact, ids, pixels, FOLLOWING).double()
    assert baseline.std() > 0.1  # weights that make a difference
    assert_close_to_oracle("logits", actual, baseline, oracle)
    found = launched()
    assert all(any(name.startswith(stem) for name in found) for stem in STEMS), found


@pytest.mark.parametrize(("tokens", "value"), [(9, "mla_project_value"), (70, "mla_decode_value")])
@torch.no_grad()
def test_a_moe_layer_at_decode_is_eleven_kernels_and_three_matrix_products(tmp_path, tokens, value):
    """Also where attention is split over the cached tokens: its parts are joined in the kernel that
    projects."""
    layers = 3  # the first one dense
    make_checkpoint(tmp_path / "c", tiny_config(text={"num_hidden_layers": layers}), seed=5)
    model = KimiK25.from_pretrained(tmp_path / "c")
    cache = model.new_cache(num_pages=tokens // 7 + 1, page_size=7)
    sequence = cache.add_sequence()
    model.hidden_states(
        model.embed(torch.arange(tokens)), cache.extend([sequence], [tokens]), cache
    )

    x, recorder = model.language.embed(torch.tensor([11])), Requests()
    step = cache.extend([sequence], [1])
    with targeting(target_of(80)), interpreted(seed=3) as report, kimi_ops.use_backend("triton"):
        model.hidden_states(x, step, cache)
    with recorder:
        model.hidden_states(x, step, cache)
    kernels = [launch.kernel for launch in report.launches]
    routed = [n for n, name in enumerate(kernels) if name.startswith("moe_route")]
    assert len(routed) == layers - 1
    assert routed[1] - routed[0] == 11, kernels  # from router to router
    assert sum(name.startswith(value) for name in kernels) == layers, kernels
    asked = [str(function) for function in recorder.made]
    others = [n for n in asked if not n.startswith("kimi_ops.") and "empty" not in n]
    assert set(others) == {"aten.mm.default"}  # nothing copies, casts, concatenates or fills
    dense = 2  # the first layer's gate and up in one, and down
    assert len(others) == 3 * layers + dense
