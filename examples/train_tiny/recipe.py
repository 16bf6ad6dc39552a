"""Sizes of the small model, its constants of training, and what it is taught."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from kimi_ops.model.config import KimiK25Config
from kimi_ops.model.make_checkpoint import tiny_config
from kimi_ops.tasks import make_sample

# Kimi K2.5's architecture with every part in small: 4 layers, the first dense, 4 of 32 experts
# and the shared one, latent attention with both low-rank projections, YaRN, MoonViT-3D.
TEXT = {
    "vocab_size": 768,
    "hidden_size": 128,
    "intermediate_size": 384,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
VISION = {
    "vt_num_hidden_layers": 3,
    "vt_hidden_size": 96,
    "vt_num_attention_heads": 2,
    "vt_intermediate_size": 192,
}

# Conversations of a batch by task, even numbers: text and vision together from the first step on,
# at a ratio that stays. Most clips are followed aloud, in thinking mode: which way a shape moves
# was not learned from the bare answer in 2,900 steps.
MIXTURE = {
    "digits": 8,
    "scenes": 14,
    "photographs": 2,
    "clips": 2,
    "clips, thinking": 8,
    "sums": 4,
    "sums, instant": 2,
    "tool calls": 2,
    "tool results": 2,
}
# Whose words the vocabulary is learned from.
VOCABULARY_TASKS = ("scenes", "clips", "sums", "sums, instant", "tool calls", "tool results")


@dataclass(frozen=True)
class Recipe:
    """Constants of a run.

    Attributes:
        seed: of the initial weights and of the samples.
        lr: of both optimizers, at its highest.
        weight_decay: decoupled.
        warmup, stable, decay: steps.
        final: factor of the learning rate at the end.
        quantize_from: step from which the experts are trained as int4 would round them.
        balance: weight of the sequence-wise auxiliary loss.
        bias_speed: of the selection bias, per step.
        threshold: of QK-Clip.
        save_every: steps between two states on disk.
    """

    seed: int = 0
    lr: float = 4e-3
    weight_decay: float = 0.1
    warmup: int = 100
    stable: int = 1700
    decay: int = 2600
    final: float = 0.02
    quantize_from: int = 2700
    balance: float = 1e-4
    bias_speed: float = 1e-3
    threshold: float = 100.0
    save_every: int = 100


def share_of_mixture(parts: int) -> dict[str, int]:
    """Samples by task of one of the equal parts of a batch."""
    return {task: count // parts for task, count in MIXTURE.items()}


def build_config() -> KimiK25Config:
    """The config of the model in training, whose experts are floats."""
    return tiny_config(text=TEXT, vision=VISION, quantized=False)


def vocabulary_text() -> str:
    """What the tokenizer's vocabulary is learned from: words of the tasks, but no number.

    Without a number in it every digit stays a token of its own.
    """
    texts = []
    for task in VOCABULARY_TASKS:
        for number in range(200):
            sample = make_sample(task, "train", number, several=True)
            texts.append(json.dumps(sample.tools))
            for message in sample.messages:
                content = message["content"]
                parts = [content] if isinstance(content, str) else [p.get("text") for p in content]
                texts += [str(part) for part in parts]
                texts.append(message.get("reasoning_content", ""))
                texts += [call["function"]["arguments"] for call in message.get("tool_calls", ())]
    texts += [f"Which digit is this? Which digits are these? {word}" for word in PHOTOGRAPHED * 20]
    return re.sub(r"\d+", " ", "\n".join(texts))


PHOTOGRAPHED = ["What does the photograph show?", "assistant", "user", "image", "video", "tool"]
