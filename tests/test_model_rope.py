"""Rotary frequencies and the softmax scale: published numbers, and transformers beside them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from kimi_ops.model.config import KimiK25Config, RopeScaling
from kimi_ops.model.errors import ConfigError
from kimi_ops.model.make_checkpoint import tiny_config
from kimi_ops.model.rope import yarn_attention_factor, yarn_inv_freq

# Kimi K2.5 config.json.
RELEASED_ROPE = {
    "type": "yarn",
    "factor": 64,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1,
    "mscale_all_dim": 1,
}
# Published inverse frequencies of K2.5's YaRN, float32 to ten digits.
INV_FREQ = """
1.000000000e+00 7.131111026e-01 5.085274577e-01 3.626365364e-01 2.586001456e-01 1.844106168e-01
1.315052658e-01 9.377785772e-02 6.687403470e-02 4.377665743e-02 2.842795849e-02 1.828295551e-02
1.161915995e-02 7.274119649e-03 4.465848673e-03 2.670203801e-03 1.537296688e-03 8.346550749e-04
4.086460685e-04 1.583749690e-04 1.807023364e-05 1.288608382e-05 9.189209777e-06 6.552927061e-06
4.672965133e-06 3.332343113e-06 2.376330713e-06 1.694587809e-06 1.208429353e-06 8.617444109e-07
6.145194789e-07 4.382206384e-07
"""


@pytest.fixture(scope="module")
def released() -> KimiK25Config:
    return KimiK25Config.full_size()


def test_softmax_scale_is_the_published_one(released: KimiK25Config) -> None:
    magnitude = 0.1 * math.log(64) + 1
    assert released.text_config.softmax_scale == pytest.approx(192**-0.5 * magnitude**2, rel=1e-15)
    assert released.text_config.softmax_scale == pytest.approx(0.1446796258, abs=5e-11)
    plain = dataclasses.replace(released.text_config, rope_scaling=None)
    assert plain.softmax_scale == pytest.approx(192**-0.5, rel=1e-15)


def test_inv_freq_is_the_published_vector(released: KimiK25Config) -> None:
    expected = torch.tensor([float(number) for number in INV_FREQ.split()], dtype=torch.float64)
    actual = yarn_inv_freq(released.text_config)
    assert actual.dtype == torch.float32
    assert actual.shape == (32,)
    assert released.text_config.rope_ramp() == (8, 20)
    # The published vector was computed in float32 throughout: at most a few roundings of 2^-24
    # apart.
    torch.testing.assert_close(actual.double(), expected, rtol=4 * 2**-24, atol=0)
    assert yarn_attention_factor(released.text_config) == 1.0


def test_k2_ramp_differs_where_published(released: KimiK25Config) -> None:
    # K2-Instruct has beta_fast 1: its ramp runs 19..20, which changes 11 of the 32 frequencies.
    scaling = released.text_config.rope_scaling
    assert scaling is not None
    narrow = dataclasses.replace(scaling, beta_fast=1.0)
    k2 = dataclasses.replace(released.text_config, rope_scaling=narrow)
    assert k2.rope_ramp() == (19, 20)
    difference = yarn_inv_freq(k2) != yarn_inv_freq(released.text_config)
    assert difference.nonzero().flatten().tolist() == list(range(9, 20))


def test_plain_rope_frequencies(released: KimiK25Config) -> None:
    plain = dataclasses.replace(released.text_config, rope_scaling=None)
    expected = [50000 ** (-2 * i / 64) for i in range(32)]
    assert yarn_inv_freq(plain).tolist() == torch.tensor(expected, dtype=torch.float32).tolist()
    assert yarn_attention_factor(plain) == 1.0


def test_attention_factor_of_unequal_mscales(released: KimiK25Config) -> None:
    scaling = dataclasses.replace(RopeScaling(**_yarn()), mscale=0.707, mscale_all_dim=1.3)
    text = dataclasses.replace(released.text_config, rope_scaling=scaling)
    expected = (0.0707 * math.log(64) + 1) / (0.13 * math.log(64) + 1)
    assert yarn_attention_factor(text) == pytest.approx(expected, rel=1e-12)
    assert text.softmax_scale == pytest.approx(192**-0.5 * (0.13 * math.log(64) + 1) ** 2)


def _yarn(**changes: Any) -> dict[str, Any]:
    return RELEASED_ROPE | changes


@pytest.mark.parametrize(
    "scaling",
    [
        _yarn(),
        _yarn(factor=8.0, original_max_position_embeddings=1024),
        _yarn(beta_fast=64, beta_slow=2, mscale=0.707, mscale_all_dim=0.5),
        # Both ends of the ramp fall on one index.
        _yarn(beta_fast=1.3, beta_slow=1.2, original_max_position_embeddings=64, factor=2.0),
    ],
)
def test_inv_freq_agrees_with_transformers(
    released: KimiK25Config, scaling: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the second source")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    text = dataclasses.replace(released.text_config, rope_scaling=RopeScaling(**scaling))
    parameters = {key: value for key, value in scaling.items() if key != "type"}
    theirs = transformers.DeepseekV3Config(
        qk_rope_head_dim=64,
        max_position_embeddings=262144,
        rope_parameters=parameters | {"rope_type": "yarn", "rope_theta": 50000.0},
    )
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, device=torch.device("cpu"))
    # Theirs rounds to float32 at every step; a step costs 2^-24 relative, and powers a few more.
    torch.testing.assert_close(yarn_inv_freq(text), expected, rtol=16 * 2**-24, atol=0)
    assert yarn_attention_factor(text) == pytest.approx(factor, rel=1e-12)


def test_reversed_ramp_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty blend range"):
        tiny_config(
            text={"rope_theta": 1.5, "rope_scaling": RopeScaling(**_yarn()), "qk_rope_head_dim": 2}
        )
