"""Reference of `moe_select`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kimi_ops.reference import runs_anything as unsupported

__all__ = ["launch", "moe_select", "unsupported"]


def best(values: Tensor, count: int) -> Tensor:
    """Indices ``[..., count]`` of the largest values, best first, equal ones by lower index."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def moe_select(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    scale: float = 1.0,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    tokens, experts = logits.shape
    score = logits.sigmoid()
    choice = score + bias
    choice = choice.masked_fill(choice.isnan(), -torch.inf)
    if topk_group < n_group:
        group = choice.view(tokens, n_group, -1)
        group_score = group.sort(dim=-1, descending=True).values[..., :2].sum(-1)
        kept = torch.zeros_like(group_score, dtype=torch.bool)
        kept.scatter_(1, best(group_score, topk_group), True)
        choice = choice.masked_fill(~kept.repeat_interleave(experts // n_group, 1), -torch.inf)
    ids = best(choice, top_k)
    weights = score.gather(1, ids)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale, ids.int()


def launch(outputs: tuple[Tensor, Tensor], *args: Any) -> None:
    weights, ids = moe_select(*args)
    outputs[0].copy_(weights)
    outputs[1].copy_(ids)
