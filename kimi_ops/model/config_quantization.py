"""The quantisation block of a config: which linears are int4, and how their numbers are stored.

Kimi K2.5 stores its routed experts, and nothing else, as int4 in groups of 32 (compressed-tensors,
format `pack-quantized`). A block that says otherwise is a `ConfigError`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from kimi_ops.model.config_fields import (
    check_fields,
    choice,
    read_fields,
    require_object,
    show,
    strings,
    text,
)
from kimi_ops.model.errors import ConfigError
from kimi_ops.model.json_file import printable

INT4_GROUP = 32

RELEASED_IGNORE = (
    "lm_head",
    "re:.*self_attn.*",
    "re:.*shared_experts.*",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
)

# One module of each kind of linear that the checkpoint stores unquantised and the block must
# therefore ignore. Router, vision tower and projector are absent: the released block does not list
# them (they were never quantised), later revisions do, and both are right about the same file.
UNQUANTISED_LINEARS = (
    "language_model.lm_head",
    "language_model.model.layers.0.self_attn.q_a_proj",
    "language_model.model.layers.0.self_attn.q_b_proj",
    "language_model.model.layers.0.self_attn.kv_a_proj_with_mqa",
    "language_model.model.layers.0.self_attn.kv_b_proj",
    "language_model.model.layers.0.self_attn.o_proj",
    "language_model.model.layers.0.mlp.gate_proj",
    "language_model.model.layers.0.mlp.up_proj",
    "language_model.model.layers.0.mlp.down_proj",
    "language_model.model.layers.1.mlp.shared_experts.gate_proj",
    "language_model.model.layers.1.mlp.shared_experts.up_proj",
    "language_model.model.layers.1.mlp.shared_experts.down_proj",
)
QUANTISED_LINEARS = (
    "language_model.model.layers.1.mlp.experts.0.gate_proj",
    "language_model.model.layers.1.mlp.experts.0.up_proj",
    "language_model.model.layers.1.mlp.experts.0.down_proj",
)

# Patterns come from an untrusted file, and a general regular expression can run for ever or eat all
# memory while compiling. These forms cover every published pattern and can do neither.
SAFE_PATTERN = re.compile(r"\^?(?:[A-Za-z0-9_.-]|\\\.|\\d\+|\.\*|\((?:\?:)?\w+(?:\|\w+)*\))*\$?")
MAX_WILDCARDS = 4

WEIGHT_FIELDS = (
    "num_bits",
    "type",
    "symmetric",
    "strategy",
    "group_size",
    "dynamic",
    "actorder",
    "observer",
)
BLOCK_HARMLESS = {
    "config_groups",
    "global_compression_ratio",
    "kv_cache_scheme",
    "sparsity_config",
    "transform_config",
    "version",
}
GROUP_HARMLESS = {"weights", "input_activations", "output_activations", "format"}
WEIGHT_HARMLESS = {"block_structure", "observer_kwargs"}


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How the routed experts are stored: compressed-tensors `pack-quantized`, int4 in groups of 32.

    The released block is nested; this is its content laid flat. Every field but `observer` and
    `ignore` has one supported value. `ignore` names the linears that stay unquantised, exactly or
    as `re:` and a regular expression matched from the start of the module's name.
    """

    quant_method: str = choice("compressed-tensors", default="compressed-tensors")
    format: str = choice("pack-quantized", default="pack-quantized")
    quantization_status: str = choice("compressed", default="compressed")
    targets: tuple[str, ...] = choice(("Linear",), default=("Linear",))
    num_bits: int = choice(4, default=4)
    type: str = choice("int", default="int")
    symmetric: bool = choice(True, default=True)
    strategy: str = choice("group", default="group")
    group_size: int = choice(INT4_GROUP, default=INT4_GROUP)
    dynamic: bool = choice(False, default=False)
    actorder: None = choice(None, default=None)
    observer: str = text(default="minmax")
    ignore: tuple[str, ...] = strings(default=RELEASED_IGNORE)

    def __post_init__(self) -> None:
        check_fields(self, "quantization_config.")


def check_ignore_patterns(block: QuantizationConfig) -> None:
    """Raises `ConfigError` unless `block` quantises the routed experts and no other text linear."""
    for module in UNQUANTISED_LINEARS:
        if not any(_matches(pattern, module) for pattern in block.ignore):
            raise ConfigError(
                f"quantization_config.ignore does not cover {module}, which K2.5 stores "
                f"unquantised; got {show(list(block.ignore))}"
            )
    for module in QUANTISED_LINEARS:
        for pattern in block.ignore:
            if _matches(pattern, module):
                raise ConfigError(
                    f"quantization_config.ignore: {pattern!r} excludes {module}, which a "
                    "quantised K2.5 checkpoint stores as int4; leave the whole block out for "
                    "unquantised experts"
                )


def _matches(pattern: str, module: str) -> bool:
    if not pattern.startswith("re:"):
        # The released block writes `lm_head` for `language_model.lm_head`.
        return module == pattern or module.endswith(f".{pattern}")
    expression = pattern.removeprefix("re:")
    wildcards = expression.count("*") + expression.count("+")
    if len(expression) > 200 or wildcards > MAX_WILDCARDS or not SAFE_PATTERN.fullmatch(expression):
        raise ConfigError(
            f"quantization_config.ignore: {show(pattern)} is not supported; supported: names, "
            "'.', '.*', "
            r"'\.', '\d+', '(a|b)', '^' and '$', with at most "
            f"{MAX_WILDCARDS} repetitions"
        )
    return re.match(expression, module) is not None


def quantization_from_block(block: Any, where: str) -> QuantizationConfig | None:
    """Reads a released `quantization_config` block; None for null. Raises `ConfigError`."""
    if block is None:
        return None
    block = require_object(block, where)
    groups = require_object(block.get("config_groups"), f"{where}.config_groups")
    if len(groups) != 1:
        raise ConfigError(f"{where}.config_groups must hold one group, got {show(sorted(groups))}")
    name, group = next(iter(groups.items()))
    group_where = f"{where}.config_groups.{printable(name)}"
    group = require_object(group, group_where)
    weights = require_object(group.get("weights"), f"{group_where}.weights")
    _require_empty(block, where, ("kv_cache_scheme", "sparsity_config", "transform_config"))
    _require_empty(group, group_where, ("input_activations", "output_activations"))
    _require_empty(weights, f"{group_where}.weights", ("block_structure", "observer_kwargs"))
    if group.get("format", block.get("format")) not in (None, block.get("format")):
        raise ConfigError(
            f"{group_where}.format must equal {where}.format ({show(block.get('format'))}), "
            f"got {show(group['format'])}"
        )

    flat: dict[str, Any] = {}
    sections = (
        (block, where, ("quant_method", "format", "quantization_status", "ignore"), BLOCK_HARMLESS),
        (group, group_where, ("targets",), GROUP_HARMLESS),
        (weights, f"{group_where}.weights", WEIGHT_FIELDS, WEIGHT_HARMLESS),
    )
    for section, section_where, fields, harmless in sections:
        for key, value in section.items():
            if key in fields:
                flat[key] = value
            elif key not in harmless:
                raise ConfigError(
                    f"{section_where}.{printable(key)} is unknown and may change the model; got "
                    f"{show(value)}"
                )
        # What the released block spells out must not be guessed.
        for key in fields:
            if key not in section and key not in ("actorder", "observer", "dynamic"):
                raise ConfigError(f"{section_where}.{key} is missing")
    return QuantizationConfig(**read_fields(QuantizationConfig, flat, f"{where}.", harmless=()))


def _require_empty(section: dict[str, Any], where: str, keys: tuple[str, ...]) -> None:
    for key in keys:
        if section.get(key) not in (None, {}):
            raise ConfigError(f"{where}.{key} must be null, got {show(section[key])}")


def quantization_to_block(config: QuantizationConfig) -> dict[str, Any]:
    """The released, nested form of `config`."""
    weights: dict[str, Any] = {
        "actorder": config.actorder,
        "block_structure": None,
        "dynamic": config.dynamic,
        "group_size": config.group_size,
        "num_bits": config.num_bits,
        "observer": config.observer,
        "observer_kwargs": {},
        "strategy": config.strategy,
        "symmetric": config.symmetric,
        "type": config.type,
    }
    return {
        "config_groups": {
            "group_0": {
                "input_activations": None,
                "output_activations": None,
                "targets": list(config.targets),
                "weights": weights,
            }
        },
        "format": config.format,
        "ignore": list(config.ignore),
        "kv_cache_scheme": None,
        "quant_method": config.quant_method,
        "quantization_status": config.quantization_status,
    }
