"""Reads and writes the released `config.json` as a `KimiK25Config`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from kimi_ops.model.config import KimiK25Config, RopeScaling, TextConfig, VisionConfig
from kimi_ops.model.config_fields import read_fields, require_object, show
from kimi_ops.model.config_quantization import quantization_from_block, quantization_to_block
from kimi_ops.model.errors import ConfigError
from kimi_ops.model.json_file import read_json_object

MAX_CONFIG_BYTES = 4 * 2**20

# Keys that configuration classes of transformers write into every file and that change nothing in a
# forward pass: bookkeeping, training-only values, and defaults of text generation.
BOOKKEEPING = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_internal",
        "_commit_hash",
        "_name_or_path",
        "add_cross_attention",
        "architectures",
        "auto_map",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "length_penalty",
        "max_length",
        "min_length",
        "model_type",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "output_scores",
        "pad_token_id",
        "prefix",
        "problem_type",
        "pruned_heads",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "typical_p",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    }
)
TOP_HARMLESS = BOOKKEEPING
TEXT_HARMLESS = BOOKKEEPING | {"ep_size", "quantization_config", "rope_parameters"}
VISION_HARMLESS = BOOKKEEPING | {"tie_word_embeddings"}
# Derived values that some dumps spell out; harmless where they agree with what they derive from.
TEXT_DERIVED = ("head_dim", "qk_head_dim", "rope_interleave")


def config_from_file(path: Path) -> KimiK25Config:
    """Reads `path`, or `path`/config.json for a directory. Raises `ConfigError` naming the file."""
    file = path / "config.json" if path.is_dir() else path
    try:
        return config_from_dict(read_json_object(file, MAX_CONFIG_BYTES, ConfigError))
    except ConfigError as fault:
        if str(fault).startswith(str(file)):
            raise
        raise ConfigError(f"{file}: {fault}") from None


def config_from_dict(values: dict[str, Any]) -> KimiK25Config:
    """Reads the content of a released-format `config.json`. Raises `ConfigError`."""
    values = require_object(values, "config")
    if values.get("model_type") != "kimi_k25":
        raise ConfigError(
            f"model_type must be 'kimi_k25' (Kimi K2.5), got {show(values.get('model_type'))}"
        )
    for key in ("text_config", "vision_config"):
        if key not in values:
            raise ConfigError(f"{key} is missing")
    text_values = require_object(values["text_config"], "text_config")
    vision_values = require_object(values["vision_config"], "vision_config")

    top = read_fields(KimiK25Config, _with_text_ids(values, text_values), "", TOP_HARMLESS)
    top["text_config"] = _text_from_dict(text_values)
    top["vision_config"] = VisionConfig(
        **read_fields(VisionConfig, vision_values, "vision_config.", VISION_HARMLESS)
    )
    outer = quantization_from_block(values.get("quantization_config"), "quantization_config")
    inner = quantization_from_block(
        text_values.get("quantization_config"), "text_config.quantization_config"
    )
    if outer is not None and inner is not None and outer != inner:
        raise ConfigError(
            "quantization_config and text_config.quantization_config disagree: "
            + _first_difference(outer, inner)
        )
    top["quantization_config"] = inner if outer is None else outer
    return KimiK25Config(**top)


def _with_text_ids(values: dict[str, Any], text_values: dict[str, Any]) -> dict[str, Any]:
    """`values` with special token ids that only `text_config` gives; both giving one must agree."""
    merged = dict(values)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        inner = text_values.get(key)
        if inner is not None and merged.setdefault(key, inner) != inner:
            raise ConfigError(
                f"{key} and text_config.{key} disagree: {show(merged[key])} and {show(inner)}"
            )
    return merged


def _text_from_dict(values: dict[str, Any]) -> TextConfig:
    remaining = {key: value for key, value in values.items() if key not in TEXT_DERIVED}
    # A `rope_parameters` object (transformers 5) carries rope_theta and the scaling in one.
    theta, scaling = _rope_parameters(values.get("rope_parameters"))
    if "rope_scaling" in values:
        outer = _rope_scaling(values["rope_scaling"], "text_config.rope_scaling")
        if values.get("rope_parameters") is not None and outer != scaling:
            raise ConfigError("text_config.rope_scaling and text_config.rope_parameters disagree")
        scaling = outer
    elif values.get("rope_parameters") is None:
        raise ConfigError("text_config.rope_scaling is missing (null for plain RoPE)")
    if theta is not None and remaining.setdefault("rope_theta", theta) != theta:
        raise ConfigError(
            "text_config.rope_theta and text_config.rope_parameters.rope_theta disagree: "
            f"{show(remaining['rope_theta'])} and {show(theta)}"
        )
    remaining["rope_scaling"] = None
    # The older and the newer name of one key; null is written for "not decided".
    dtypes = {values[key] for key in ("dtype", "torch_dtype") if isinstance(values.get(key), str)}
    if len(dtypes) > 1:
        raise ConfigError(f"text_config.dtype and torch_dtype disagree: {show(sorted(dtypes))}")
    remaining.pop("dtype", None)
    if dtypes:
        remaining["dtype"] = dtypes.pop()

    fields = read_fields(TextConfig, remaining, "text_config.", TEXT_HARMLESS)
    fields["rope_scaling"] = scaling
    config = TextConfig(**fields)
    derived = (config.qk_rope_head_dim, config.qk_head_dim, True)
    for key, expected in zip(TEXT_DERIVED, derived, strict=True):
        if values.get(key, expected) not in (None, expected):
            raise ConfigError(f"text_config.{key} must be {expected}, got {show(values[key])}")
    return config


def _rope_parameters(value: Any) -> tuple[Any, RopeScaling | None]:
    if value is None:
        return None, None
    where = "text_config.rope_parameters"
    rest = dict(require_object(value, where))
    theta = rest.pop("rope_theta", None)
    if rest.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"{where}.partial_rotary_factor must be 1.0, got {show(rest['partial_rotary_factor'])}"
        )
    rest.pop("partial_rotary_factor", None)
    return theta, _rope_scaling(rest, where)


def _rope_scaling(value: Any, where: str) -> RopeScaling | None:
    if value is None:
        return None
    values = dict(require_object(value, where))
    kinds = [values.pop(key) for key in ("rope_type", "type") if key in values]
    kind = kinds[0] if kinds else None
    if kind not in ("yarn", "default") or any(other != kind for other in kinds):
        raise ConfigError(
            f"{where}.type is not supported; supported: yarn, default; got {show(kinds)}"
        )
    for key, only in (("attention_factor", None), ("truncate", True)):
        if values.pop(key, only) is not only:
            raise ConfigError(
                f"{where}.{key} is not supported; supported: {show(only)}; got {show(value[key])}"
            )
    if kind == "default":
        if values:
            raise ConfigError(
                f"{where}: type default takes no parameters, got {show(sorted(values))}"
            )
        return None
    if ("mscale" in values) != ("mscale_all_dim" in values):
        raise ConfigError(f"{where}: mscale and mscale_all_dim must be given together")
    return RopeScaling(**read_fields(RopeScaling, values, f"{where}.", harmless=()))


def _first_difference(left: Any, right: Any) -> str:
    for field in dataclasses.fields(left):
        ours, theirs = getattr(left, field.name), getattr(right, field.name)
        if ours != theirs:
            return f"{field.name} is {show(ours)} and {show(theirs)}"
    return "no field"


def config_to_dict(config: KimiK25Config) -> dict[str, Any]:
    """The released form of `config`; `config_from_dict` gives an equal config back."""
    language = config.text_config
    text = dataclasses.asdict(language)
    if language.latent_norm_eps == language.rms_norm_eps:
        del text["latent_norm_eps"]
    vision = dataclasses.asdict(config.vision_config)
    vision["merge_kernel_size"] = list(config.vision_config.merge_kernel_size)
    token_ids = {
        f"{key}_token_id": getattr(config, f"{key}_token_id") for key in ("bos", "eos", "pad")
    }
    text |= token_ids
    result: dict[str, Any] = {
        "architectures": ["KimiK25ForConditionalGeneration"],
        **token_ids,
        "dtype": language.dtype,
        "ignore_index": config.ignore_index,
        "media_placeholder_token_id": config.media_placeholder_token_id,
        "model_type": config.model_type,
        "text_config": text,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_unified_vision_chunk": config.use_unified_vision_chunk,
        "video_placeholder": config.video_placeholder,
        "vision_config": vision,
    }
    if config.quantization_config is not None:
        result["quantization_config"] = quantization_to_block(config.quantization_config)
        text["quantization_config"] = quantization_to_block(config.quantization_config)
    return result
