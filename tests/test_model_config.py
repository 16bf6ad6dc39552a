"""The config is read exactly, written back losslessly, and refused by key where it is wrong.

Expected values are those published for Kimi K2.5, or computed from the stated formula.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from kimi_ops.model.config import KimiK25Config, RopeScaling, TextConfig
from kimi_ops.model.config_quantization import QuantizationConfig
from kimi_ops.model.errors import ConfigError, KimiError
from kimi_ops.model.make_checkpoint import tiny_config

# Kimi K2.5 config.json.
RELEASED_TEXT = {
    "hidden_size": 7168,
    "n_routed_experts": 384,
    "num_hidden_layers": 61,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "moe_layer_freq": 1,
    "moe_intermediate_size": 2048,
    "intermediate_size": 18432,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "routed_scaling_factor": 2.827,
    "hidden_act": "silu",
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000,
    "max_position_embeddings": 262144,
    "vocab_size": 163840,
    "attention_bias": False,
    "attention_dropout": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "dtype": "bfloat16",
}
RELEASED_ROPE = {
    "type": "yarn",
    "factor": 64,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1,
    "mscale_all_dim": 1,
}
RELEASED_VISION = {
    "patch_size": 14,
    "init_pos_emb_height": 64,
    "init_pos_emb_width": 64,
    "init_pos_emb_time": 4,
    "pos_emb_type": "divided_fixed",
    "vt_num_hidden_layers": 27,
    "vt_hidden_size": 1152,
    "vt_num_attention_heads": 16,
    "vt_intermediate_size": 4304,
    "merge_kernel_size": (2, 2),
    "merge_type": "sd2_tpool",
    "video_attn_type": "spatial_temporal",
    "mm_projector_type": "patchmerger",
    "mm_hidden_size": 1152,
    "projector_hidden_act": "gelu",
    "projector_ln_eps": 1e-5,
    "text_hidden_size": 7168,
}
RELEASED_TOP = {
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "pad_token_id": 163839,
    "media_placeholder_token_id": 163605,
    "ignore_index": -100,
    "video_placeholder": "<|kimi_k25_video_placeholder|>",
    "use_unified_vision_chunk": True,
    "model_type": "kimi_k25",
}


@pytest.fixture(scope="module")
def released() -> KimiK25Config:
    return KimiK25Config.full_size()


@pytest.fixture
def values(released: KimiK25Config) -> dict[str, Any]:
    return released.to_dict()


def test_full_size_has_the_released_values(released: KimiK25Config) -> None:
    for section, expected in (
        (released.text_config, RELEASED_TEXT),
        (released.text_config.rope_scaling, RELEASED_ROPE),
        (released.vision_config, RELEASED_VISION),
        (released, RELEASED_TOP),
    ):
        for key, value in expected.items():
            assert getattr(section, key) == value, key
    assert released.text_config.latent_norm_eps == 1e-5
    assert released.vision_config.head_dim == 72
    assert [released.text_config.is_moe_layer(i) for i in (0, 1, 60)] == [False, True, True]
    block = released.quantization_config
    assert block is not None
    assert (block.num_bits, block.group_size, block.symmetric) == (4, 32, True)
    assert block.ignore == (
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    )


@pytest.mark.parametrize(
    "config",
    [
        KimiK25Config.full_size(),
        tiny_config(),
        tiny_config(quantized=False),
        tiny_config(text={"rope_scaling": None, "latent_norm_eps": 1e-6, "dtype": "float32"}),
        tiny_config(text={"n_group": 4, "topk_group": 2, "model_type": "deepseek_v3"}),
    ],
    ids=["full", "tiny", "unquantised", "plain-rope", "grouped"],
)
def test_to_dict_is_lossless_through_json(config: KimiK25Config) -> None:
    before = json.dumps(config.to_dict())
    assert KimiK25Config.from_dict(json.loads(before)) == config
    parsed = json.loads(before)
    KimiK25Config.from_dict(parsed)
    assert json.dumps(parsed) == before, "from_dict must not change its argument"


def test_from_file_takes_file_or_directory(tmp_path: Any, released: KimiK25Config) -> None:
    (tmp_path / "config.json").write_text(json.dumps(released.to_dict()))
    assert KimiK25Config.from_file(tmp_path) == released
    assert KimiK25Config.from_file(str(tmp_path / "config.json")) == released


def test_released_block_may_stand_once_or_twice(values: dict[str, Any]) -> None:
    expected = KimiK25Config.from_dict(values)
    outer = copy.deepcopy(values)
    del outer["text_config"]["quantization_config"]
    del values["quantization_config"]
    assert KimiK25Config.from_dict(outer) == KimiK25Config.from_dict(values) == expected


def test_transformers_style_rope_parameters(values: dict[str, Any]) -> None:
    expected = KimiK25Config.from_dict(values)
    text = values["text_config"]
    rope = text.pop("rope_scaling")
    rope["rope_type"] = rope.pop("type")
    text["rope_parameters"] = rope | {"rope_theta": text.pop("rope_theta")}
    assert KimiK25Config.from_dict(values) == expected
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    plain = KimiK25Config.from_dict(values).text_config
    assert (plain.rope_scaling, plain.rope_theta) == (None, 1e4)
    text["rope_theta"] = 5e4
    with pytest.raises(ConfigError, match=r"rope_parameters\.rope_theta disagree: 50000\.0 and 1"):
        KimiK25Config.from_dict(values)


def test_bookkeeping_keys_are_harmless(values: dict[str, Any]) -> None:
    expected = KimiK25Config.from_dict(values)
    for section in (values, values["text_config"], values["vision_config"]):
        section |= {"transformers_version": "4.57.1", "_name_or_path": "", "return_dict": True}
        section |= {"torch_dtype": "bfloat16", "use_cache": True, "auto_map": {"AutoConfig": "x.Y"}}
    assert KimiK25Config.from_dict(values) == expected


def test_later_ignore_lists_are_accepted(released: KimiK25Config) -> None:
    assert released.quantization_config is not None
    later = (*released.quantization_config.ignore, "re:.*vision_tower.*", "re:mm_projector.*")
    block = dataclasses.replace(released.quantization_config, ignore=later)
    assert dataclasses.replace(released, quantization_config=block).quantization_config == block


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """An edit that puts `value` at the dotted `path`; in the quantisation blocks, in both."""

    def edit(config: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        roots = [config]
        if parents and parents[0] == "quantization_config":
            roots.append(config["text_config"])
        for section in roots:
            for key in parents:
                section = section[key]
            section[last] = copy.deepcopy(value)

    return edit


WEIGHTS = "quantization_config.config_groups.group_0.weights"
IGNORE = [
    "lm_head",
    "re:.*self_attn.*",
    "re:.*shared_experts.*",
    r"re:.*mlp\.(gate|up|down)_proj.*",
]
REFUSED = [
    ("model_type", "llama", r"model_type must be 'kimi_k25'.*'llama'"),
    ("text_config", None, "text_config must be an object, got null"),
    ("text_config.model_type", "llama", r"text_config\.model_type .*kimi_k2.*deepseek_v3"),
    ("text_config.sliding_window", 4096, r"text_config\.sliding_window is unknown"),
    ("vision_config.vt_windowed", True, r"vision_config\.vt_windowed is unknown"),
    ("mtp", 1, "mtp is unknown"),
    ("text_config.scoring_func", "softmax", r"scoring_func .*'sigmoid', got 'softmax'"),
    ("text_config.topk_method", "greedy", r"topk_method .*'noaux_tc', got 'greedy'"),
    ("text_config.hidden_act", "gelu", r"hidden_act .*'silu', got 'gelu'"),
    ("text_config.attention_bias", True, r"attention_bias .*false, got true"),
    ("text_config.attention_bias", 0, r"attention_bias .*false, got 0"),
    ("text_config.attention_dropout", 0.1, "attention_dropout .*got 0.1"),
    ("text_config.tie_word_embeddings", True, "tie_word_embeddings .*got true"),
    ("tie_word_embeddings", True, "tie_word_embeddings .*got true"),
    ("text_config.q_lora_rank", None, "q_lora_rank must be an integer.*got null"),
    ("text_config.moe_layer_freq", 2, "moe_layer_freq .*got 2"),
    ("text_config.num_nextn_predict_layers", 1, "num_nextn_predict_layers .*supported: 0, got 1"),
    ("text_config.hidden_size", 7168.0, "hidden_size must be an integer.*got 7168.0"),
    ("text_config.hidden_size", True, "hidden_size must be an integer.*got true"),
    ("text_config.hidden_size", -1, "hidden_size must be an integer.*got -1"),
    ("text_config.hidden_size", 10**30, "hidden_size must be an integer"),
    ("text_config.hidden_size", "7168", "hidden_size must be an integer.*got '7168'"),
    ("text_config.rms_norm_eps", math.nan, "rms_norm_eps must be a number.*got nan"),
    ("text_config.rms_norm_eps", 0, "rms_norm_eps must be a number greater than 0"),
    ("text_config.routed_scaling_factor", math.inf, "routed_scaling_factor .*got inf"),
    ("text_config.norm_topk_prob", 1, "norm_topk_prob must be true or false, got 1"),
    ("text_config.num_key_value_heads", 8, "num_key_value_heads must equal.*got 8 and 64"),
    ("text_config.qk_rope_head_dim", 63, "qk_rope_head_dim must be even, got 63"),
    ("text_config.first_k_dense_replace", 62, "first_k_dense_replace must not exceed.*got 62"),
    ("text_config.n_group", 5, r"n_group must divide n_routed_experts \(384\), got 5"),
    ("text_config.n_group", 384, "n_group must leave at least 2 experts"),
    ("text_config.topk_group", 2, "topk_group must not exceed n_group"),
    ("text_config.num_experts_per_tok", 385, "num_experts_per_tok must not exceed.*got 385"),
    ("text_config.n_routed_experts", 4096, "num_hidden_layers x n_routed_experts must not exceed"),
    ("text_config.qk_head_dim", 128, "qk_head_dim must be 192, got 128"),
    ("text_config.bos_token_id", 1, "bos_token_id disagree: 163584 and 1"),
    ("text_config.torch_dtype", "float16", "dtype and torch_dtype disagree"),
    ("text_config.dtype", "float8", r"text_config\.dtype is not supported"),
    ("text_config.rope_scaling.type", "linear", "rope_scaling.type .*yarn"),
    ("text_config.rope_scaling.factor", 0.5, "rope_scaling.factor must be a number at least 1"),
    ("text_config.rope_scaling.beta_fast", 0.5, "beta_fast must be at least beta_slow"),
    ("text_config.rope_scaling.attention_factor", 1.5, "attention_factor is not supported"),
    ("text_config.rope_scaling.truncate", False, "truncate is not supported"),
    ("text_config.rope_scaling.short_factor", [1], "rope_scaling.short_factor is unknown"),
    ("text_config.rope_scaling", "yarn", "rope_scaling must be an object"),
    ("text_config.rope_parameters", {"rope_type": "default"}, "rope_parameters disagree"),
    ("vision_config.merge_type", "avg", "merge_type .*'sd2_tpool', got 'avg'"),
    ("vision_config.pos_emb_type", "rope", "pos_emb_type .*'divided_fixed'"),
    ("vision_config.mm_projector_type", "mlp", "mm_projector_type .*'patchmerger'"),
    ("vision_config.merge_kernel_size", [3, 3], r"merge_kernel_size .*\(2, 2\)"),
    ("vision_config.mm_hidden_size", 1024, "mm_hidden_size must equal vt_hidden_size"),
    ("vision_config.text_hidden_size", 4096, "text_hidden_size must equal.*7168.*got 4096"),
    ("vision_config.vt_num_attention_heads", 7, "vt_num_attention_heads must divide"),
    ("vision_config.vt_num_attention_heads", 64, "must be a multiple of 4 .*got 18"),
    ("bos_token_id", 163840, r"bos_token_id and text_config\.bos_token_id disagree"),
    ("media_placeholder_token_id", 163840, r"media_placeholder_token_id must be below.*163840"),
    ("use_unified_vision_chunk", False, "use_unified_vision_chunk .*got false"),
    (f"{WEIGHTS}.num_bits", 8, "quantization_config.num_bits .*supported: 4, got 8"),
    (f"{WEIGHTS}.group_size", 128, "group_size .*supported: 32, got 128"),
    (f"{WEIGHTS}.symmetric", False, "symmetric .*got false"),
    (f"{WEIGHTS}.actorder", "group", "actorder .*got 'group'"),
    (f"{WEIGHTS}.zero_point", True, "weights.zero_point is unknown"),
    ("quantization_config.format", "marlin-24", "quantization_config.format .*'pack-quantized'"),
    ("quantization_config.quant_method", "fp8", "quant_method .*'compressed-tensors'"),
    ("quantization_config.kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme must be null"),
    ("quantization_config.config_groups", {}, "config_groups must hold one group"),
    ("quantization_config.ignore", IGNORE[1:], "ignore does not cover language_model.lm_head"),
    ("quantization_config.ignore", IGNORE[:1], "ignore does not cover .*self_attn.q_a_proj"),
    ("quantization_config.ignore", [*IGNORE, "re:.*mlp.*"], "ignore: 're:.*mlp.*' excludes .*expe"),
    ("quantization_config.ignore", [*IGNORE, "Linear", 3], "ignore must be an array of strings"),
    ("quantization_config.ignore", ["re:((a+)+)+$", *IGNORE], "ignore: .* is not supported"),
    ("quantization_config.ignore", ["re:(a{65535}){65535}", *IGNORE], "is not supported"),
    ("quantization_config.ignore", ["re:" + ".*" * 30, *IGNORE], "is not supported"),
    ("quantization_config.ignore", ["re:(", *IGNORE], "is not supported"),
    ("text_config.moe_intermediate_size", 2040, "moe_intermediate_size must be a multiple of 32"),
]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    REFUSED,
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_wrong_value_is_named(values: dict[str, Any], path: str, value: Any, message: str) -> None:
    KimiK25Config.from_dict(values)
    _set(path, value)(values)
    with pytest.raises(ConfigError, match=message):
        KimiK25Config.from_dict(values)


def test_every_required_key_is_named_when_missing(values: dict[str, Any]) -> None:
    required = {f.name for f in dataclasses.fields(TextConfig) if f.default is dataclasses.MISSING}
    assert {"hidden_size", "q_lora_rank", "norm_topk_prob", "rope_theta"} <= required
    for key in [*sorted(required), "rope_scaling"]:
        broken = copy.deepcopy(values)
        del broken["text_config"][key]
        with pytest.raises(ConfigError, match=rf"text_config\.{key} is missing"):
            KimiK25Config.from_dict(broken)


def test_quantisation_blocks_must_agree(values: dict[str, Any]) -> None:
    values["text_config"]["quantization_config"]["ignore"].append("re:.*vision_tower.*")
    with pytest.raises(ConfigError, match="disagree: ignore is"):
        KimiK25Config.from_dict(values)


def test_mscale_must_be_given_in_pairs(values: dict[str, Any]) -> None:
    del values["text_config"]["rope_scaling"]["mscale"]
    with pytest.raises(ConfigError, match="mscale and mscale_all_dim must be given together"):
        KimiK25Config.from_dict(values)
    with pytest.raises(ConfigError, match="mscale must be 1 where mscale_all_dim is 0"):
        RopeScaling(factor=2.0, original_max_position_embeddings=64, mscale=0.7)


@pytest.mark.parametrize("value", [None, [], "x", 3, {}, {"model_type": "kimi_k25"}])
def test_not_a_config(value: Any) -> None:
    with pytest.raises(ConfigError):
        KimiK25Config.from_dict(value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "expected a JSON object, got list"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"a": 1, "a": 2}', "the key a is given twice"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"model_type": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b" " * (5 * 2**20), "longer than"),
        (b"{}", "model_type must be"),
    ],
)
def test_broken_file_is_named(tmp_path: Any, content: bytes, message: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        KimiK25Config.from_file(tmp_path)
    assert str(error.value).startswith(str(file))
    assert isinstance(error.value, KimiError)


def test_missing_file_is_named(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read"):
        KimiK25Config.from_file(tmp_path)


def test_construction_is_checked_like_a_file(released: KimiK25Config) -> None:
    with pytest.raises(ConfigError, match="hidden_size"):
        dataclasses.replace(released.text_config, hidden_size=0)
    smaller = dataclasses.replace(released.text_config, hidden_size=4096)
    with pytest.raises(ConfigError, match="text_hidden_size"):
        dataclasses.replace(released, text_config=smaller)
    with pytest.raises(ConfigError, match="rope_scaling must be a RopeScaling or None, got dict"):
        dataclasses.replace(released.text_config, rope_scaling=dict(RELEASED_ROPE))
    assert tiny_config(text={"rope_scaling": RELEASED_ROPE}).text_config.rope_scaling is not None
    with pytest.raises(ConfigError, match="num_bits"):
        QuantizationConfig(num_bits=8)


def test_tiny_config_follows_its_vocabulary() -> None:
    config = tiny_config(text={"vocab_size": 700, "num_attention_heads": 2}, ignore_index=-7)
    # Released: first special id 163584, media pad 21 above it, pad the last id.
    assert (config.bos_token_id, config.eos_token_id) == (444, 445)
    assert (config.media_placeholder_token_id, config.pad_token_id) == (465, 699)
    assert (config.text_config.num_key_value_heads, config.ignore_index) == (2, -7)
    with pytest.raises(ConfigError, match="TextConfig has no field hidden"):
        tiny_config(text={"hidden": 3})
    with pytest.raises(ConfigError, match="bos_token_id"):
        tiny_config(text={"vocab_size": 100})
