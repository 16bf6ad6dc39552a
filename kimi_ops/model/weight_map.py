"""Every tensor of a released checkpoint and its place in the parameters that the model keeps.

The model keeps *fused* parameters: projections that read the same input are one matrix (their rows
stacked), and the experts of a layer are one array. Each tensor of a checkpoint is a whole fused
parameter or a slice of one; `weight_shape` tensors only repeat a shape and have no place.
Everything here follows from the config alone: names, shapes, dtypes, bytes and parameter counts.

Letters: D hidden size, Q query latent, C key-value latent, H heads, N / R / V nope, rope and value
head widths, E experts, F expert width, Dv vision width.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kimi_ops.model.config import KimiK25Config
from kimi_ops.model.config_quantization import INT4_GROUP
from kimi_ops.model.errors import ConfigError

NIBBLES_PER_WORD = 8


class Kind(enum.Enum):
    """What a tensor holds, which decides its dtype on disk and in memory."""

    FLOAT = "float"  # weights, norms, biases: one float dtype throughout a checkpoint
    SCALE = "scale"  # scales of int4 groups: the float dtype in which they were stored
    SELECTION_BIAS = "selection bias"  # router bias: always float32
    PACKED = "packed"  # int4 values, eight to an int32
    SHAPE = "shape"  # (out, in) of a packed weight: int32 in released files, int64 in newer tools'


class TensorSpec(NamedTuple):
    """Shape and dtype that a tensor must have."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return _elements(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a checkpoint tensor lives: `parameters[parameter][index]`; `()` is the whole."""

    parameter: str
    index: tuple[int | slice, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint tensor inside a fused parameter."""

    name: str
    shape: tuple[int, ...]
    index: tuple[int | slice, ...]


class FusedParameter(NamedTuple):
    """One parameter of the model and the checkpoint tensors that fill it completely."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    parts: list[Part]


class StoredTensor(NamedTuple):
    """One checkpoint tensor. `placement` is None, and `value` the content, for `weight_shape`."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    placement: Placement | None
    value: tuple[int, int] | None


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def check_config(config: object) -> None:
    """Raises `ConfigError` for anything but a `KimiK25Config`."""
    if not isinstance(config, KimiK25Config):
        raise ConfigError(
            f"config must be a KimiK25Config (KimiK25Config.from_file reads one), "
            f"got {type(config).__name__}"
        )


def check_layers(config: KimiK25Config, layers: range | None) -> range:
    """The decoder layers meant by `layers` (None: all). Raises `ConfigError` if there are none."""
    check_config(config)
    count = config.text_config.num_hidden_layers
    if layers is None:
        return range(count)
    if not isinstance(layers, range):
        raise ConfigError(f"layers must be a range such as range(0, {count}), got {layers!r:.80}")
    if layers.step != 1 or len(layers) == 0 or layers.start < 0 or layers.stop > count:
        raise ConfigError(
            f"layers must be a non-empty range with step 1 inside 0-{count - 1}, got {layers}"
        )
    return layers


def parse_layers(text: str, config: KimiK25Config) -> range:
    """Reads `"3"` or `"0-3"` (both ends included) as decoder layers. Raises `ConfigError`."""
    match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", str(text))
    if match is None:
        raise ConfigError(f"layers must look like '3' or '0-3', got {text!r}")
    first = int(match[1])
    return check_layers(config, range(first, int(match[2] or first) + 1))


def iter_fused(config: KimiK25Config, layers: range | None = None) -> Iterator[FusedParameter]:
    """The fused parameters in model order, each with the checkpoint tensors it is made of."""
    check_config(config)
    text = config.text_config
    vocab, width = text.vocab_size, text.hidden_size
    yield _whole("language.embed_tokens", "language_model.model.embed_tokens.weight", vocab, width)
    for layer in check_layers(config, layers):
        yield from _attention(config, layer)
        yield from _experts(config, layer) if text.is_moe_layer(layer) else _dense(config, layer)
    yield _whole("language.norm", "language_model.model.norm.weight", width)
    yield _whole("language.lm_head", "language_model.lm_head.weight", vocab, width)
    yield from _vision(config)
    yield from _projector(config)


def _whole(name: str, released: str, *shape: int, kind: Kind = Kind.FLOAT) -> FusedParameter:
    return FusedParameter(name, shape, kind, [Part(released, shape, ())])


def _stack_rows(name: str, columns: int, rows: dict[str, int]) -> FusedParameter:
    """A matrix [sum of rows, columns] made of the named matrices, one below the other."""
    parts, start = [], 0
    for released, count in rows.items():
        parts.append(Part(released, (count, columns), (slice(start, start + count),)))
        start += count
    return FusedParameter(name, (start, columns), Kind.FLOAT, parts)


def _attention(config: KimiK25Config, layer: int) -> Iterator[FusedParameter]:
    text = config.text_config
    heads, width, latent = text.num_attention_heads, text.hidden_size, text.kv_lora_rank
    mine, theirs = f"language.layers.{layer}", f"language_model.model.layers.{layer}"
    attn = f"{theirs}.self_attn"
    yield _whole(f"{mine}.input_layernorm", f"{theirs}.input_layernorm.weight", width)
    yield _stack_rows(
        f"{mine}.attn.qkv_a",
        width,
        {
            f"{attn}.q_a_proj.weight": text.q_lora_rank,
            f"{attn}.kv_a_proj_with_mqa.weight": latent + text.qk_rope_head_dim,
        },
    )
    yield _whole(f"{mine}.attn.q_a_layernorm", f"{attn}.q_a_layernorm.weight", text.q_lora_rank)
    yield _whole(f"{mine}.attn.kv_a_layernorm", f"{attn}.kv_a_layernorm.weight", latent)
    query = heads * text.qk_head_dim
    yield _whole(f"{mine}.attn.q_b", f"{attn}.q_b_proj.weight", query, text.q_lora_rank)
    key_value = heads * (text.qk_nope_head_dim + text.v_head_dim)
    yield _whole(f"{mine}.attn.kv_b", f"{attn}.kv_b_proj.weight", key_value, latent)
    yield _whole(f"{mine}.attn.o", f"{attn}.o_proj.weight", width, heads * text.v_head_dim)
    post = "post_attention_layernorm"
    yield _whole(f"{mine}.{post}", f"{theirs}.{post}.weight", width)


def _dense(config: KimiK25Config, layer: int) -> Iterator[FusedParameter]:
    width, inner = config.text_config.hidden_size, config.text_config.intermediate_size
    mine, theirs = f"language.layers.{layer}.mlp", f"language_model.model.layers.{layer}.mlp"
    yield _gate_up(f"{mine}.gate_up", theirs, width, inner)
    yield _whole(f"{mine}.down", f"{theirs}.down_proj.weight", width, inner)


def _gate_up(name: str, module: str, width: int, inner: int) -> FusedParameter:
    rows = {f"{module}.gate_proj.weight": inner, f"{module}.up_proj.weight": inner}
    return _stack_rows(name, width, rows)


def _experts(config: KimiK25Config, layer: int) -> Iterator[FusedParameter]:
    text = config.text_config
    experts, width, inner = text.n_routed_experts, text.hidden_size, text.moe_intermediate_size
    mine, theirs = f"language.layers.{layer}.moe", f"language_model.model.layers.{layer}.mlp"
    yield _whole(f"{mine}.gate", f"{theirs}.gate.weight", experts, width)
    bias = f"{theirs}.gate.e_score_correction_bias"
    yield _whole(f"{mine}.bias", bias, experts, kind=Kind.SELECTION_BIAS)
    # (suffix of our name, suffix of theirs, elements per stored column, kind)
    forms = [("", "weight", 1, Kind.FLOAT)]
    if config.quantization_config is not None:
        forms = [
            ("_packed", "weight_packed", NIBBLES_PER_WORD, Kind.PACKED),
            ("_scale", "weight_scale", INT4_GROUP, Kind.SCALE),
        ]
    for projections, rows, columns in ((("gate", "up"), inner, width), (("down",), width, inner)):
        for suffix, stored, per_column, kind in forms:
            shape = (rows, columns // per_column)
            parts = [
                Part(
                    f"{theirs}.experts.{expert}.{projection}_proj.{stored}",
                    shape,
                    (expert, slice(number * rows, (number + 1) * rows)),
                )
                for expert in range(experts)
                for number, projection in enumerate(projections)
            ]
            fused = (experts, len(projections) * rows, shape[1])
            yield FusedParameter(f"{mine}.{'_'.join(projections)}{suffix}", fused, kind, parts)
    shared = inner * text.n_shared_experts
    module = f"{theirs}.shared_experts"
    yield _gate_up(f"{mine}.shared_gate_up", module, width, shared)
    yield _whole(f"{mine}.shared_down", f"{module}.down_proj.weight", width, shared)


def _vision(config: KimiK25Config) -> Iterator[FusedParameter]:
    vision = config.vision_config
    width, inner, patch = vision.vt_hidden_size, vision.vt_intermediate_size, vision.patch_size
    embed = "vision_tower.patch_embed"
    kernel = (width, 3, patch, patch)
    yield _whole("vision.patch_embed_weight", f"{embed}.proj.weight", *kernel)
    yield _whole("vision.patch_embed_bias", f"{embed}.proj.bias", width)
    table = (vision.init_pos_emb_height, vision.init_pos_emb_width, width)
    yield _whole("vision.pos_emb", f"{embed}.pos_emb.weight", *table)
    for block in range(vision.vt_num_hidden_layers):
        mine, theirs = f"vision.blocks.{block}", f"vision_tower.encoder.blocks.{block}"
        for norm in ("norm0", "norm1"):
            yield from _affine(f"{mine}.{norm}", f"{theirs}.{norm}", width)
        yield from _affine(f"{mine}.wqkv", f"{theirs}.wqkv", 3 * width, width)
        yield from _affine(f"{mine}.wo", f"{theirs}.wo", width, width)
        yield from _affine(f"{mine}.fc0", f"{theirs}.mlp.fc0", inner, width)
        yield from _affine(f"{mine}.fc1", f"{theirs}.mlp.fc1", width, inner)
    yield from _affine("vision.final_layernorm", "vision_tower.encoder.final_layernorm", width)


def _affine(name: str, module: str, *shape: int) -> Iterator[FusedParameter]:
    """Weight [*shape] and bias [shape[0]] of a linear or a LayerNorm."""
    yield _whole(f"{name}_weight", f"{module}.weight", *shape)
    yield _whole(f"{name}_bias", f"{module}.bias", shape[0])


def _projector(config: KimiK25Config) -> Iterator[FusedParameter]:
    vision = config.vision_config
    merged = vision.merged_size
    yield from _affine("projector.pre_norm", "mm_projector.pre_norm", vision.mm_hidden_size)
    yield from _affine("projector.proj0", "mm_projector.proj.0", merged, merged)
    yield from _affine("projector.proj2", "mm_projector.proj.2", vision.text_hidden_size, merged)


def iter_tensors(config: KimiK25Config, layers: range | None = None) -> Iterator[StoredTensor]:
    """Every tensor of the released checkpoint, in the order in which this package writes them."""
    for fused in iter_fused(config, layers):
        for part in fused.parts:
            placement = Placement(fused.name, part.index)
            yield StoredTensor(part.name, part.shape, fused.kind, placement, None)
            if fused.kind is Kind.PACKED:
                yield StoredTensor(
                    shape_name(part.name), (2,), Kind.SHAPE, None, packed_shape(part.shape)
                )


def shape_name(packed_name: str) -> str:
    """The name of the `weight_shape` tensor that goes with a `weight_packed` tensor."""
    return packed_name.removesuffix("_packed") + "_shape"


def packed_shape(stored: tuple[int, ...]) -> tuple[int, int]:
    """The logical (out, in) of a packed weight from its stored shape [out, in / 8]."""
    return stored[0], stored[1] * NIBBLES_PER_WORD


def stored_dtype(kind: Kind, dtype: torch.dtype, scale_dtype: torch.dtype) -> torch.dtype:
    """The dtype of a tensor of `kind` in a checkpoint whose float tensors are `dtype`."""
    return {
        Kind.FLOAT: dtype,
        Kind.SCALE: scale_dtype,
        Kind.SELECTION_BIAS: torch.float32,
        Kind.PACKED: torch.int32,
        Kind.SHAPE: torch.int32,
    }[kind]


def expected_tensors(
    config: KimiK25Config, layers: range | None = None, *, dtype: torch.dtype = torch.bfloat16
) -> dict[str, TensorSpec]:
    """Shape and dtype of every released tensor by name (208,550 for the released model).

    `dtype` is that of the float tensors. `layers` selects decoder layers; embedding, norm, head,
    vision tower and projector are always included. Raises `ConfigError` for impossible `layers`.
    """
    return {
        tensor.name: TensorSpec(tensor.shape, stored_dtype(tensor.kind, dtype, dtype))
        for tensor in iter_tensors(config, layers)
    }


def weight_map(config: KimiK25Config, layers: range | None = None) -> dict[str, Placement]:
    """Where each released tensor goes. `weight_shape` tensors hold no weights and are left out."""
    return {
        tensor.name: tensor.placement
        for tensor in iter_tensors(config, layers)
        if tensor.placement is not None
    }


def fused_parameters(
    config: KimiK25Config,
    layers: range | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    scale_dtype: torch.dtype | None = None,
) -> dict[str, TensorSpec]:
    """Shape and dtype of every fused parameter by name; scales are `scale_dtype`, else `dtype`."""
    return {
        fused.name: TensorSpec(fused.shape, stored_dtype(fused.kind, dtype, scale_dtype or dtype))
        for fused in iter_fused(config, layers)
    }
