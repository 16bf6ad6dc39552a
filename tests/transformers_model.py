"""The same weights in transformers' model: the independent oracle of the whole model.

Maps the fused parameters of `kimi_ops.model.weight_map` to `Kimi_K25ForConditionalGeneration`;
int4 experts are dequantised on the way.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from transformers import (
    DeepseekV3Config,
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
    Kimi_K25VisionConfig,
)

from kimi_ops.model.config import KimiK25Config
from kimi_ops.model.kimi import KimiK25
from kimi_ops.quant import int4

LATENT_NORM_EPS = 1e-6  # transformers' own, whatever the config says; `their_model` sets it


def their_model(model: KimiK25) -> Kimi_K25ForConditionalGeneration:
    """transformers' model with the weights of ours, in float32."""
    theirs = Kimi_K25ForConditionalGeneration(_config(model.config)).float().eval()
    state = _state(model)
    theirs.load_state_dict(state, strict=True)
    for layer in theirs.model.language_model.layers:
        for norm in (layer.self_attn.q_a_layernorm, layer.self_attn.kv_a_layernorm):
            assert norm.variance_epsilon == LATENT_NORM_EPS
            norm.variance_epsilon = model.config.text_config.latent_norm_eps
    return theirs


def _config(config: KimiK25Config) -> Kimi_K25Config:
    text, vision = config.text_config, config.vision_config
    rope = {"rope_type": "default", "rope_theta": text.rope_theta}
    if (scaling := text.rope_scaling) is not None:
        rope = {
            "rope_type": "yarn",
            "rope_theta": text.rope_theta,
            "factor": scaling.factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "mscale": scaling.mscale,
            "mscale_all_dim": scaling.mscale_all_dim,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    same = """
        vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers
        num_attention_heads num_key_value_heads n_shared_experts n_routed_experts
        num_experts_per_tok n_group topk_group first_k_dense_replace q_lora_rank kv_lora_rank
        qk_nope_head_dim qk_rope_head_dim v_head_dim routed_scaling_factor norm_topk_prob
        rms_norm_eps max_position_embeddings hidden_act attention_bias
    """
    their_text = DeepseekV3Config(
        rope_parameters=rope,
        tie_word_embeddings=False,
        attn_implementation="eager",
        **{name: getattr(text, name) for name in same.split()},
    )
    their_vision = Kimi_K25VisionConfig(
        patch_size=vision.patch_size,
        pos_emb_height=vision.init_pos_emb_height,
        pos_emb_width=vision.init_pos_emb_width,
        pos_emb_time=vision.init_pos_emb_time,
        num_attention_heads=vision.vt_num_attention_heads,
        num_hidden_layers=vision.vt_num_hidden_layers,
        hidden_size=vision.vt_hidden_size,
        intermediate_size=vision.vt_intermediate_size,
    )
    placeholder = config.media_placeholder_token_id
    return Kimi_K25Config(
        text_config=their_text,
        vision_config=their_vision,
        projection_hidden_size=vision.vt_hidden_size,
        projection_layer_norm_eps=vision.projector_ln_eps,
        image_token_id=placeholder,
        video_token_id=text.vocab_size - 1,  # unused: clips come in through mm_encoder_outputs
        tie_word_embeddings=False,
        attn_implementation="eager",
    )


def _state(model: KimiK25) -> dict[str, torch.Tensor]:
    text = model.config.text_config
    ours = {k: v.float() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    state = {
        "lm_head.weight": ours["language.lm_head"],
        "model.language_model.embed_tokens.weight": ours["language.embed_tokens"],
        "model.language_model.norm.weight": ours["language.norm"],
    }
    for layer in model.decoder_layers:
        mine, base = f"language.layers.{layer}", f"model.language_model.layers.{layer}"
        attn = f"{base}.self_attn"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{base}.{norm}.weight"] = ours[f"{mine}.{norm}"]
        q_a, kv_a = ours[f"{mine}.attn.qkv_a"].tensor_split([text.q_lora_rank])
        state[f"{attn}.q_a_proj.weight"], state[f"{attn}.kv_a_proj_with_mqa.weight"] = q_a, kv_a
        for norm in ("q_a_layernorm", "kv_a_layernorm"):
            state[f"{attn}.{norm}.weight"] = ours[f"{mine}.attn.{norm}"]
        for name in ("q_b", "kv_b", "o"):
            state[f"{attn}.{name}_proj.weight"] = ours[f"{mine}.attn.{name}"]
        if not text.is_moe_layer(layer):
            gate, up = ours[f"{mine}.mlp.gate_up"].chunk(2)
            down = ours[f"{mine}.mlp.down"]
            parts = (("gate", gate), ("up", up), ("down", down))
            state |= {f"{base}.mlp.{name}_proj.weight": w for name, w in parts}
            continue
        moe = f"{mine}.moe"
        state[f"{base}.mlp.gate.weight"] = ours[f"{moe}.gate"]
        state[f"{base}.mlp.gate.e_score_correction_bias"] = ours[f"{moe}.bias"]
        for name in ("gate_up", "down"):
            if f"{moe}.{name}_packed" in ours:
                packed, scale = ours[f"{moe}.{name}_packed"], ours[f"{moe}.{name}_scale"]
                weight = int4.dequantize(packed, scale, torch.float32)
            else:
                weight = ours[f"{moe}.{name}"]
            state[f"{base}.mlp.experts.{name}_proj"] = weight
        gate, up = ours[f"{moe}.shared_gate_up"].chunk(2)
        parts = (("gate", gate), ("up", up), ("down", ours[f"{moe}.shared_down"]))
        state |= {f"{base}.mlp.shared_experts.{name}_proj.weight": w for name, w in parts}
    return state | _vision_state(model, ours)


def _vision_state(model: KimiK25, ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    vision = model.config.vision_config
    heads, head_dim = vision.vt_num_attention_heads, vision.head_dim
    order = torch.cat((torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)))
    tower = "model.vision_tower"
    state = {
        f"{tower}.patch_embed.pos_emb.position_embeddings": ours["vision.pos_emb"],
        "model.mm_projector.pre_norm.weight": ours["projector.pre_norm_weight"],
        "model.mm_projector.pre_norm.bias": ours["projector.pre_norm_bias"],
    }
    for kind in ("weight", "bias"):
        state[f"{tower}.patch_embed.proj.{kind}"] = ours[f"vision.patch_embed_{kind}"]
        state[f"{tower}.final_layernorm.{kind}"] = ours[f"vision.final_layernorm_{kind}"]
        state[f"model.mm_projector.in_proj.{kind}"] = ours[f"projector.proj0_{kind}"]
        state[f"model.mm_projector.out_proj.{kind}"] = ours[f"projector.proj2_{kind}"]
        for block in range(vision.vt_num_hidden_layers):
            mine, base = f"vision.blocks.{block}", f"{tower}.layers.{block}"
            q, k, v = ours[f"{mine}.wqkv_{kind}"].chunk(3)
            # Their q and k hold all even dims of a head first; ours are the released pairs.
            q, k = (w.unflatten(0, (heads, head_dim))[:, order].flatten(0, 1) for w in (q, k))
            state |= {
                f"{base}.attn.{n}_proj.{kind}": w for n, w in zip("qkv", (q, k, v), strict=True)
            }
            state[f"{base}.attn.proj.{kind}"] = ours[f"{mine}.wo_{kind}"]
            for number in (0, 1):
                norm, linear = (
                    ours[f"{mine}.norm{number}_{kind}"],
                    ours[f"{mine}.fc{number}_{kind}"],
                )
                state[f"{base}.norm{number + 1}.{kind}"] = norm
                state[f"{base}.mlp.fc{number + 1}.{kind}"] = linear
    return state


def their_media(
    theirs: Kimi_K25ForConditionalGeneration, pixel_values: torch.Tensor, grid: torch.Tensor
) -> torch.Tensor:
    """Embeddings of media, one entry at a time: several lengths of clips at once fail there."""
    rows, start = [], 0
    for entry in grid:
        stop = start + int(entry.prod())
        tower = theirs.model.vision_tower(pixel_values[start:stop], entry[None])
        rows.append(theirs.model.mm_projector(tower.pooler_output).squeeze(1))
        start = stop
    return torch.cat(rows)


def as_encoder_output(media: torch.Tensor) -> dict[str, SimpleNamespace]:
    """Media embeddings in the form that transformers' forward takes."""
    return {"image": SimpleNamespace(pooler_output=(media,))}
