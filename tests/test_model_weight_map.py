"""The inventory of the released files and its map into fused parameters.

Names, shapes, dtypes, bytes and parameter counts are those published for Kimi K2.5.
"""

from __future__ import annotations

import pytest
import torch
from checkpoint_files import (
    LAYER,
    small_config,
)

from kimi_ops.model.config import KimiK25Config
from kimi_ops.model.errors import ConfigError
from kimi_ops.model.make_checkpoint import tiny_config
from kimi_ops.model.parameter_counts import parameter_counts
from kimi_ops.model.weight_map import (
    expected_tensors,
    fused_parameters,
    parse_layers,
    weight_map,
)

# Kimi K2.5: published names and shapes, one of each kind, by dtype.
RELEASED = {
    torch.bfloat16: {
        "language_model.model.embed_tokens.weight": (163840, 7168),
        "language_model.lm_head.weight": (163840, 7168),
        "language_model.model.norm.weight": (7168,),
        f"{LAYER}.60.input_layernorm.weight": (7168,),
        f"{LAYER}.60.post_attention_layernorm.weight": (7168,),
        f"{LAYER}.60.self_attn.q_a_proj.weight": (1536, 7168),
        f"{LAYER}.60.self_attn.q_a_layernorm.weight": (1536,),
        f"{LAYER}.60.self_attn.q_b_proj.weight": (12288, 1536),
        f"{LAYER}.60.self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
        f"{LAYER}.60.self_attn.kv_a_layernorm.weight": (512,),
        f"{LAYER}.60.self_attn.kv_b_proj.weight": (16384, 512),
        f"{LAYER}.60.self_attn.o_proj.weight": (7168, 8192),
        f"{LAYER}.0.mlp.gate_proj.weight": (18432, 7168),
        f"{LAYER}.0.mlp.up_proj.weight": (18432, 7168),
        f"{LAYER}.0.mlp.down_proj.weight": (7168, 18432),
        f"{LAYER}.1.mlp.gate.weight": (384, 7168),
        f"{LAYER}.1.mlp.experts.383.gate_proj.weight_scale": (2048, 224),
        f"{LAYER}.1.mlp.experts.383.up_proj.weight_scale": (2048, 224),
        f"{LAYER}.1.mlp.experts.383.down_proj.weight_scale": (7168, 64),
        f"{LAYER}.1.mlp.shared_experts.gate_proj.weight": (2048, 7168),
        f"{LAYER}.1.mlp.shared_experts.up_proj.weight": (2048, 7168),
        f"{LAYER}.1.mlp.shared_experts.down_proj.weight": (7168, 2048),
        "vision_tower.patch_embed.proj.weight": (1152, 3, 14, 14),
        "vision_tower.patch_embed.proj.bias": (1152,),
        "vision_tower.patch_embed.pos_emb.weight": (64, 64, 1152),
        "vision_tower.encoder.blocks.26.norm0.weight": (1152,),
        "vision_tower.encoder.blocks.26.norm1.bias": (1152,),
        "vision_tower.encoder.blocks.26.wqkv.weight": (3456, 1152),
        "vision_tower.encoder.blocks.26.wqkv.bias": (3456,),
        "vision_tower.encoder.blocks.26.wo.weight": (1152, 1152),
        "vision_tower.encoder.blocks.26.mlp.fc0.weight": (4304, 1152),
        "vision_tower.encoder.blocks.26.mlp.fc0.bias": (4304,),
        "vision_tower.encoder.blocks.26.mlp.fc1.weight": (1152, 4304),
        "vision_tower.encoder.final_layernorm.weight": (1152,),
        "mm_projector.pre_norm.weight": (1152,),
        "mm_projector.proj.0.weight": (4608, 4608),
        "mm_projector.proj.0.bias": (4608,),
        "mm_projector.proj.2.weight": (7168, 4608),
        "mm_projector.proj.2.bias": (7168,),
    },
    torch.int32: {
        f"{LAYER}.1.mlp.experts.0.gate_proj.weight_packed": (2048, 896),
        f"{LAYER}.1.mlp.experts.0.up_proj.weight_packed": (2048, 896),
        f"{LAYER}.1.mlp.experts.0.down_proj.weight_packed": (7168, 256),
        f"{LAYER}.1.mlp.experts.0.down_proj.weight_shape": (2,),
    },
    torch.float32: {f"{LAYER}.1.mlp.gate.e_score_correction_bias": (384,)},
}
COUNTS = {
    "routed_experts": 1_014_686_023_680,
    "attention": 6_168_569_856,
    "shared_experts": 2_642_411_520,
    "dense_layers": 396_361_728,
    "router": 165_173_760,
    "embed_tokens": 1_174_405_120,
    "lm_head": 1_174_405_120,
    "norms": 881_664,
    "language_model": 1_026_408_232_448,
    "vision_tower": 416_866_032,
    "projector": 54_277_888,
    "total": 1_026_879_376_368,
    "active": 32_861_500_928,
    "active_without_embedding": 31_687_095_808,
    "active_without_embedding_and_head": 30_512_690_688,
}


@pytest.fixture(scope="module")
def tiny() -> KimiK25Config:
    return small_config()


def test_released_inventory() -> None:
    expected = expected_tensors(KimiK25Config.full_size())
    assert len(expected) == 208_550
    assert sum(spec.nbytes for spec in expected.values()) == 595_148_192_736
    for dtype, shapes in RELEASED.items():
        for name, shape in shapes.items():
            assert expected[name] == (shape, dtype), name
    # 3 tensors for each of 3 linears of 384 experts in 60 layers; 329 and 6 are published.
    assert sum(".mlp.experts." in name for name in expected) == 3 * 3 * 384 * 60
    assert sum(name.startswith("vision_tower.") for name in expected) == 329
    assert sum(name.startswith("mm_projector.") for name in expected) == 6


def test_released_parameter_counts() -> None:
    assert parameter_counts(KimiK25Config.full_size()) == COUNTS


@pytest.mark.parametrize("quantized", [True, False])
def test_parts_cover_every_fused_parameter_once(quantized: bool) -> None:
    config = tiny_config(quantized=quantized, text={"n_shared_experts": 3})
    fused = fused_parameters(config)
    expected = expected_tensors(config)
    touched = {name: torch.zeros(spec.shape, dtype=torch.int8) for name, spec in fused.items()}
    placements = weight_map(config)
    for name, place in placements.items():
        part = touched[place.parameter][place.index]
        assert tuple(part.shape) == expected[name].shape, name
        assert part.is_contiguous(), name
        part += 1
        assert fused[place.parameter].dtype == expected[name].dtype
    assert all(bool((count == 1).all()) for count in touched.values())
    without_place = set(expected) - set(placements)
    assert all(name.endswith("weight_shape") for name in without_place)
    assert len(without_place) == (16 * 3 * 2 if quantized else 0)


def test_layers_select_decoder_layers_only(tiny: KimiK25Config) -> None:
    everything, part = expected_tensors(tiny), expected_tensors(tiny, range(1, 2))
    dropped = set(everything) - set(part)
    assert dropped == {n for n in everything if n.startswith((f"{LAYER}.0.", f"{LAYER}.2."))}
    assert list(part) == [name for name in everything if name in part]


def test_layers_are_parsed_and_checked(tiny: KimiK25Config) -> None:
    assert parse_layers("0-2", tiny) == range(0, 3)
    assert parse_layers("1", tiny) == range(1, 2)
    for text in ("", "-1", "0-3", "2-1", "a", "1-", "0-1-2", "\u0661", "9" * 30):
        with pytest.raises(ConfigError, match="layers must"):
            parse_layers(text, tiny)
    for layers in (range(0), range(0, 3, 2), range(-1, 2), range(2, 0, -1)):
        with pytest.raises(ConfigError, match="layers must"):
            expected_tensors(tiny, layers)
