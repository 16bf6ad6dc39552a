"""The complete model on the CUDA C++ kernels, executed as PTX: a picture, a clip, text, cached
steps. Ops that have no kernel in CUDA C++ run on the CPU library."""

from __future__ import annotations

import model_calls
import pytest
import torch

import kimi_ops
from kimi_ops._backends import has_kernel
from kimi_ops._dispatch import op_names
from kimi_ops.model.kimi import KimiK25
from kimi_ops.model.make_checkpoint import make_checkpoint, tiny_config
from kimi_ops.testing.oracle import assert_close_to_oracle
from kimi_ops.testing.runner import emulated

# What the kernels' names begin with, of all ops of the model that have one. No part of the model
# has a dense int4 layer, and the router and the experts select and sort for themselves.
STEMS = (
    "add_rms_norm",
    "mla_decode_split",
    "mla_decode_value",
    "mla_latent_write",
    "moe_experts_int4",
    "moe_route",
    "patch_merge",
    "rms_norm",
    "vision_rope",
)


@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=pytest.mark.full)])
@torch.no_grad()
def test_model_says_the_same_on_cuda_kernels(tmp_path, arch):
    make_checkpoint(tmp_path / "c", tiny_config(), dtype=torch.bfloat16, seed=5)
    model = KimiK25.from_pretrained(tmp_path / "c")
    ids, pixels = model_calls.prompt(model)
    with kimi_ops.use_backend("reference"):
        (tokens,) = model.generate(
            [ids.tolist()],
            pixel_values=pixels,
            grid_thws=model_calls.GRID,
            max_new_tokens=3,
            stop_ids=(),
        ).tokens
    assert len(tokens) == 3

    routing = model_calls.Routing()
    written = ",".join(f"{op}=cuda" for op in op_names() if has_kernel(op, "cuda"))
    with emulated(arch=arch) as emulation, kimi_ops.use_backend(written), routing.kept():
        actual = model_calls.logits(model, ids, pixels, tokens[:-1])
    # In float32 the model's error is a thousandth of bfloat16's: exact enough to measure that.
    exact = KimiK25.from_pretrained(tmp_path / "c", dtype=torch.float32)
    with kimi_ops.use_backend("reference"):
        with routing.taken():
            baseline = model_calls.logits(model, ids, pixels, tokens[:-1])
        with routing.taken():
            oracle = model_calls.logits(exact, ids, pixels, tokens[:-1]).double()
    assert actual.argmax(-1).tolist() == tokens
    assert_close_to_oracle("logits", actual, baseline, oracle)
    launched = {name for name, _ in emulation.launches}
    assert all(any(name.startswith(stem) for name in launched) for stem in STEMS), launched
