"""The whole model against transformers 5.23, in float32: prefill, 32 cached steps, greedy tokens.

Both models get the same random weights, int4 experts dequantised for transformers. The configs
vary what shapes the computation: layers, heads, ranks, experts, groups, top-k, rope, vision depth.
"""

from __future__ import annotations

import pytest
import torch
from transformers_model import LATENT_NORM_EPS, as_encoder_output, their_media, their_model

from kimi_ops.model.kimi import KimiK25
from kimi_ops.model.make_checkpoint import make_checkpoint, tiny_config

TOLERANCE = 1e-4  # on logits of order one, in float32
STEPS = 32

CONFIGS = {
    "default": {},
    "deep, all layers routed": {"text": {"num_hidden_layers": 5, "first_k_dense_replace": 0}},
    "all layers dense": {"text": {"first_k_dense_replace": 3, "num_hidden_layers": 3}},
    "groups": {"text": {"n_routed_experts": 24, "n_group": 4, "topk_group": 2}},
    "two shared experts, weights not normalised": {
        "text": {"n_shared_experts": 2, "norm_topk_prob": False, "routed_scaling_factor": 1.5}
    },
    "other heads and ranks": {
        "text": {
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "q_lora_rank": 40,
            "kv_lora_rank": 56,
            "qk_nope_head_dim": 24,
            "qk_rope_head_dim": 12,
            "v_head_dim": 20,
        }
    },
    "one expert of eight": {"text": {"n_routed_experts": 8, "num_experts_per_tok": 1}},
    "plain rope": {"text": {"rope_scaling": None}},
    "unquantised experts": {"quantized": False},
    "deep vision, one head": {
        "vision": {
            "vt_num_hidden_layers": 4,
            "vt_num_attention_heads": 1,
            "vt_hidden_size": 48,
            "init_pos_emb_height": 6,
            "init_pos_emb_width": 6,
        }
    },
}
# Entries of (frames, rows, columns): a picture, several pictures, clips of 1 to 4 frames, a mix.
MEDIA = {
    "text": [],
    "a picture": [(1, 4, 6)],
    "pictures": [(1, 2, 2), (1, 8, 4), (1, 6, 10)],
    "clips": [(2, 4, 4), (3, 2, 6), (4, 4, 2), (1, 4, 4)],
    "a mix": [(1, 6, 2), (4, 2, 4), (1, 4, 4)],
}


@pytest.fixture(scope="module", params=CONFIGS)
def models(request, tmp_path_factory):
    options = CONFIGS[request.param]
    text = {"latent_norm_eps": LATENT_NORM_EPS} | options.get("text", {})
    config = tiny_config(**(options | {"text": text}))
    folder = tmp_path_factory.mktemp("parity") / "checkpoint"
    make_checkpoint(folder, config, dtype=torch.float32, seed=5)
    ours = KimiK25.from_pretrained(folder, dtype=torch.float32)
    return ours, their_model(ours)


def _prompt(config, media):
    """Token ids with as many placeholders as the media have tokens, and random pixels."""
    tokens = [h * w // 4 for _, h, w in media]
    vocabulary = config.text_config.vocab_size - 256
    pieces = [torch.randint(0, vocabulary, (9,))]
    for count in tokens:
        pieces.append(torch.full((count,), config.media_placeholder_token_id))
        pieces.append(torch.randint(0, vocabulary, (5,)))
    grid = torch.tensor(media, dtype=torch.int64).view(-1, 3)
    patch = config.vision_config.patch_size
    pixels = torch.rand(int(grid.prod(1).sum()), 3, patch, patch) * 2 - 1
    return torch.cat(pieces)[None], pixels, grid


@pytest.mark.parametrize("name", MEDIA)
@torch.no_grad()
def test_logits_steps_and_tokens_agree(models, name):
    ours, theirs = models
    ids, pixels, grid = _prompt(ours.config, MEDIA[name])
    media, encoded = None, None
    if len(grid):
        media = ours.encode_media(pixels, grid)
        their_rows = their_media(theirs, pixels, grid)
        torch.testing.assert_close(media, their_rows, rtol=TOLERANCE, atol=TOLERANCE)
        encoded = as_encoder_output(their_rows)

    whole = ours(ids, pixels, grid) if len(grid) else ours(ids)
    output = theirs(input_ids=ids, mm_encoder_outputs=encoded, use_cache=True)
    assert whole.std() > 0.1  # weights that make a difference
    torch.testing.assert_close(whole, output.logits, rtol=TOLERANCE, atol=TOLERANCE)

    cache = ours.new_cache(num_pages=32, page_size=7)
    sequence = cache.add_sequence()
    hidden = ours.hidden_states(
        ours.embed(ids[0], media), cache.extend([sequence], [ids.shape[1]]), cache
    )
    mine = ours.language.logits(hidden[-1:])
    their_cache, their_last, tokens = output.past_key_values, output.logits[:, -1], []
    for _ in range(STEPS):
        token = int(mine.argmax())
        assert token == int(their_last.argmax())
        tokens.append(token)
        x = ours.language.embed(torch.tensor([token]))
        mine = ours.language.logits(ours.hidden_states(x, cache.extend([sequence], [1]), cache))
        # As embeddings: given the id of a placeholder, which random weights do write, they would
        # look up id 0 instead.
        y = theirs.get_input_embeddings()(torch.tensor([[token]]))
        output = theirs(inputs_embeds=y, past_key_values=their_cache, use_cache=True)
        their_last = output.logits[:, -1]
        torch.testing.assert_close(mine, their_last, rtol=TOLERANCE, atol=TOLERANCE)

    generation = ours.generate(
        ids.tolist(),
        pixel_values=pixels if len(grid) else None,
        grid_thws=grid if len(grid) else None,
        max_new_tokens=STEPS,
        stop_ids=[],
    )
    assert generation.tokens == [tokens]
