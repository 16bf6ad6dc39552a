"""The memory plan adds up to the checkpoint's own bytes and splits what can be split.

Expected sizes are computed here from published shapes, independently of the plan's own sums.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from kimi_ops.model.config import KimiK25Config
from kimi_ops.model.errors import ConfigError, KimiError
from kimi_ops.model.make_checkpoint import tiny_config
from kimi_ops.model.plan import Plan, cache_bytes_per_token, parse_devices, plan
from kimi_ops.model.weight_map import expected_tensors

WEIGHTS = (
    "routed_experts",
    "shared_experts",
    "attention",
    "dense_layers",
    "router",
    "norms",
    "embed_tokens",
    "lm_head",
    "vision_tower",
    "projector",
)
# Published counts: MoE layers, experts, hidden size, expert width.
MOE, E, D, F = 60, 384, 7168, 2048
INT4_EXPERTS = MOE * E * 3 * (D * F // 2 + D * F // 32 * 2)


@pytest.fixture(scope="module")
def released() -> KimiK25Config:
    return KimiK25Config.full_size()


def weight_bytes(result: Plan) -> int:
    return sum(result.components[name] for name in WEIGHTS)


def test_one_device_holds_the_whole_checkpoint(released: KimiK25Config) -> None:
    result = plan(released, devices="cpu:768GB", context=32768)
    # The checkpoint also has two int32 of `weight_shape` for each packed matrix.
    shapes = MOE * E * 3 * 8
    assert weight_bytes(result) == 595_148_192_736 - shapes
    assert result.components["latent_cache"] == 32768 * 70_272
    assert result.fits
    assert result.largest_context == 262_144
    assert result.devices.kind == "cpu"
    assert result.parallel == "none"


def test_cache_per_token_is_the_published_one(released: KimiK25Config) -> None:
    assert cache_bytes_per_token(released) == 70_272


def test_an_fp8_cache_takes_less(released: KimiK25Config) -> None:
    assert cache_bytes_per_token(released, "fp8") == 61 * 656
    plain, fp8 = (
        plan(released, devices="8x141GB", context=262_144, batch=8, cache_format=form)
        for form in ("plain", "fp8")
    )
    freed = 8 * 262_144 * (70_272 - 61 * 656)
    assert plain.total_bytes - fp8.total_bytes == freed
    assert fp8.largest_context >= plain.largest_context
    assert "fp8 cache" in fp8.render()
    with pytest.raises(KimiError, match="cache_format must be one of plain, fp8"):
        plan(released, devices="8x141GB", context=1, cache_format="int8")  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [tiny_config(), tiny_config(quantized=False)])
@pytest.mark.parametrize("weights", ["int4", "bf16"])
def test_tiny_weights_are_the_files_bytes(config: KimiK25Config, weights: str) -> None:
    stored = tiny_config(quantized=weights == "int4")
    expected = sum(
        spec.nbytes
        for name, spec in expected_tensors(stored).items()
        if not name.endswith("weight_shape")
    )
    result = plan(config, devices="1x1GB", context=64, weights=weights)
    assert weight_bytes(result) == expected


def test_tensor_parallel_splits(released: KimiK25Config) -> None:
    one = plan(released, devices="1x2TB", context=1024).components
    eight = plan(released, devices="8x141GB", context=1024, parallel="tp8").components
    for name in ("routed_experts", "shared_experts", "dense_layers", "embed_tokens", "lm_head"):
        assert eight[name] * 8 == one[name], name
    for name in ("router", "norms", "vision_tower", "projector", "latent_cache"):
        assert eight[name] == one[name], name
    # Latent down-projections and latent norms of 61 layers stay whole, the heads are split.
    whole = 61 * ((1536 + 512 + 64) * 7168 + 1536 + 512) * 2
    heads = 61 * (64 * 192 * 1536 + 64 * 256 * 512 + 7168 * 64 * 128) * 2
    assert one["attention"] == whole + heads
    assert eight["attention"] == whole + heads // 8
    assert eight["routed_experts"] == INT4_EXPERTS // 8


def test_expert_parallel_splits_experts_and_batch(released: KimiK25Config) -> None:
    one = plan(released, devices="1x2TB", context=1024).components
    result = plan(released, devices="8x141GB", context=1024, batch=9, parallel="ep8")
    eight = result.components
    assert eight["routed_experts"] * 8 == one["routed_experts"]
    for name in set(WEIGHTS) - {"routed_experts"}:
        assert eight[name] == one[name], name
    # Nine sequences over eight devices: one device has two.
    assert result.local_batch == 2
    assert eight["latent_cache"] == 2 * 1024 * 70_272
    mixed = plan(released, devices="16x141GB", context=1024, batch=9, parallel="tp8ep16")
    assert mixed.local_batch == 5
    assert mixed.components["routed_experts"] == INT4_EXPERTS // 16
    assert mixed.components["lm_head"] == one["lm_head"] // 8


def test_bf16_experts(released: KimiK25Config) -> None:
    result = plan(released, devices="8x141GB", context=1024, weights="bf16")
    assert result.components["routed_experts"] == 1_014_686_023_680 * 2 // 8
    assert not result.fits
    assert result.free_bytes == 141 * 10**9 - result.total_bytes < 0
    assert result.largest_context == 0


@pytest.mark.parametrize("parallel", ["tp8", "tp8ep8", "ep8"])
def test_largest_context_is_exact(released: KimiK25Config, parallel: str) -> None:
    request: dict[str, Any] = {"devices": "8x141GB", "batch": 16, "parallel": parallel}
    largest = plan(released, context=1, **request).largest_context
    assert 1 < largest < 262_144
    assert plan(released, context=largest, **request).fits
    assert not plan(released, context=largest + 1, **request).fits


def test_workspace_is_the_stated_formula(released: KimiK25Config) -> None:
    result = plan(released, devices="1x2TB", context=262_144, batch=3)
    experts = 8192 * (2 * 7168 + 8 * (3 * 2048 + 7168)) * 2
    attention = 8192 * (2 * 7168 + 1536 + 576 + 64 * (2 * 192 + 2 * 128)) * 2
    dense = 8192 * (2 * 7168 + 3 * 18432) * 2
    vision = 16384 * (5 * 1152 + 4304) * 2
    logits = 3 * 163840 * 4
    expected = max(experts, attention, dense, vision) + logits
    assert result.components["workspace"] == expected
    short = plan(released, devices="1x2TB", context=16)
    assert short.components["workspace"] == vision + 163840 * 4
    assert "8192" in result.to_dict()["workspace_formula"]


def test_to_dict_is_json_and_complete(released: KimiK25Config) -> None:
    result = plan(released, devices="8x141GB", context=262_144, batch=4)
    values = json.loads(json.dumps(result.to_dict()))
    assert values["total_bytes"] == sum(values["components"].values()) == result.total_bytes
    assert values["devices"] == {"kind": "gpu", "count": 8, "memory_bytes": 141 * 10**9}
    assert (values["fits"], values["parallel"], values["weights"]) == (False, "tp8", "int4")
    assert values["free_bytes"] == 141 * 10**9 - values["total_bytes"]
    assert (
        set(values["components"])
        == set(values["splits"])
        == {
            *WEIGHTS,
            "latent_cache",
            "workspace",
            "reserve",
        }
    )


def test_render_shows_every_row_and_the_verdict(released: KimiK25Config) -> None:
    result = plan(released, devices="8x141GB", context=262_144, batch=4)
    text = result.render()
    for name, size in result.components.items():
        line = next(line for line in text.splitlines() if name.replace("_", " ") in line)
        assert f"{size / 1e9:,.3f}" in line
    assert "missing" in text
    assert "it does not fit" in text
    assert f"{result.largest_context:,} tokens" in text
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "left free" in plan(released, devices="8x141GB", context=4096).render()
    assert "No context fits" in plan(released, devices="2x80GB", context=4096).render()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8x141GB", ("gpu", 8, 141 * 10**9)),
        ("80GiB", ("gpu", 1, 80 * 2**30)),
        ("cpu:768GB", ("cpu", 1, 768 * 10**9)),
        ("cpu:1.5TiB", ("cpu", 1, 3 * 2**39)),
        ("2x0.5TB", ("gpu", 2, 5 * 10**11)),
    ],
)
def test_devices_are_parsed(text: str, expected: tuple[str, int, int]) -> None:
    assert dataclasses.astuple(parse_devices(text)) == expected


@pytest.mark.parametrize(
    "text",
    ["", "8", "8x", "x141GB", "8x141", "8x141MB", "0x141GB", "8x0GB", "-1x5GB", "8x141GB ", "cpu:",
     "2xcpu:5GB", "8x1e3GB", "8X141GB", "9" * 40 + "x1GB", "8xnanGB"],
)  # fmt: skip
def test_bad_devices(released: KimiK25Config, text: str) -> None:
    with pytest.raises(ConfigError, match="devices must look like"):
        plan(released, devices=text, context=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": "pp8"}, "parallel must be"),
        ({"parallel": ""}, "parallel must be"),
        ({"parallel": "ep8tp8"}, "parallel must be"),
        ({"parallel": "tp4"}, "must use all 8 device"),
        ({"parallel": "none"}, "must use all 8 device"),
        ({"parallel": "tp0ep8"}, "a degree must be at least 1"),
        ({"parallel": "tp3ep8"}, "must use all 8 device"),
        ({"devices": "128x80GB", "parallel": "tp128"}, "128 does not divide num_attention_heads"),
        ({"devices": "5x80GB", "parallel": "ep5"}, r"5 does not divide n_routed_experts \(384\)"),
        ({"devices": "3x80GB"}, "3 does not divide num_attention_heads"),
        ({"weights": "fp8"}, "weights must be 'int4' or 'bf16', got 'fp8'"),
        ({"context": 0}, "context must be from 1 to 262144"),
        ({"context": 262_145}, "context must be from 1 to 262144"),
        ({"context": 1.5}, "context must be from 1 to 262144"),
        ({"batch": 0}, "batch must be from 1"),
        ({"batch": True}, "batch must be from 1"),
    ],
)
def test_impossible_requests(
    released: KimiK25Config, changes: dict[str, Any], message: str
) -> None:
    request: dict[str, Any] = {"devices": "8x141GB", "context": 1024}
    plan(released, **request)
    with pytest.raises(ConfigError, match=message):
        plan(released, **(request | changes))


def test_int4_groups_must_stay_whole() -> None:
    # Width 64 in two groups of 32: four ways would cut a group, and unquantised would not.
    config = tiny_config()
    with pytest.raises(ConfigError, match=r"moe_intermediate_size \(64\) does not split into 4"):
        plan(config, devices="4x1GB", context=8)
    plan(config, devices="4x1GB", context=8, weights="bf16")
    plan(config, devices="4x1GB", context=8, parallel="tp4ep4")


def test_uneven_vocabulary_counts_the_larger_share() -> None:
    config = tiny_config(text={"vocab_size": 1001})
    result = plan(config, devices="2x1GB", context=8)
    assert result.components["embed_tokens"] == 501 * 128 * 2
