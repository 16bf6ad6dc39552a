"""How many parameters a config has, by group, from its tensor shapes."""

from __future__ import annotations

import math

from kimi_ops.model.config import KimiK25Config
from kimi_ops.model.weight_map import NIBBLES_PER_WORD, FusedParameter, Kind, iter_fused

GROUPS = (
    "routed_experts",
    "attention",
    "shared_experts",
    "dense_layers",
    "router",
    "embed_tokens",
    "lm_head",
    "norms",
    "vision_tower",
    "projector",
)


def group_of(name: str) -> str:
    """The group of `GROUPS` to which the fused parameter `name` belongs."""
    section, *path = name.split(".")
    if section != "language":
        return {"vision": "vision_tower", "projector": "projector"}[section]
    if path[0] != "layers":
        return "norms" if path[0] == "norm" else path[0]
    module, leaf = path[2], path[-1]
    if module == "attn":
        return "attention"
    if module == "mlp":
        return "dense_layers"
    if module != "moe":
        return "norms"
    if leaf in ("gate", "bias"):
        return "router"
    return "shared_experts" if leaf.startswith("shared_") else "routed_experts"


def logical_elements(fused: FusedParameter) -> int:
    """Weights that `fused` holds: packed words count as eight, scales of int4 groups as none."""
    if fused.kind is Kind.SCALE:
        return 0
    return math.prod(fused.shape) * (NIBBLES_PER_WORD if fused.kind is Kind.PACKED else 1)


def parameter_counts(config: KimiK25Config) -> dict[str, int]:
    """Parameters by group of `GROUPS`, then `language_model`, `total`, and three `active_*` counts.

    `active_*` are the parameters that one text token uses: with embedding and head, without the
    embedding, without both. int4 weights count as weights, their scales not.
    """
    counts = dict.fromkeys(GROUPS, 0)
    for fused in iter_fused(config):
        counts[group_of(fused.name)] += logical_elements(fused)
    text = config.text_config
    language = sum(counts.values()) - counts["vision_tower"] - counts["projector"]
    routed = counts["routed_experts"]
    active = language - routed + routed // text.n_routed_experts * text.num_experts_per_tok
    return counts | {
        "language_model": language,
        "total": sum(counts.values()),
        "active": active,
        "active_without_embedding": active - counts["embed_tokens"],
        "active_without_embedding_and_head": active - counts["embed_tokens"] - counts["lm_head"],
    }
