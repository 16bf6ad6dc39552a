"""Reference of `moe_select`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kimi_ops.reference import runs_anything as unsupported

__all__ = ["launch", "moe_select", "unsupported"]


def best(values: Tensor, tier: Tensor) -> Tensor:
    """Indices of all values, best first: by tier, then by value, then by lower index."""
    order = values.sort(dim=-1, descending=True, stable=True).indices
    regroup = tier.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices
    return order.gather(-1, regroup)


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
    choice = score + bias.to(score.dtype)
    number = ~choice.isnan()  # what is not a number ranks below -inf
    choice = choice.masked_fill(~number, -torch.inf)
    tier = number.int()
    if topk_group < n_group:
        group = choice.view(tokens, n_group, -1)
        pair = group.sort(dim=-1, descending=True).values[..., :2].sum(-1)
        # +inf and -inf biases in one group: no number, last.
        ranked = best(pair.masked_fill(pair.isnan(), -torch.inf), (~pair.isnan()).int())
        kept = torch.zeros_like(pair, dtype=torch.bool).scatter_(1, ranked[:, :topk_group], True)
        # Experts outside the kept groups come after everything within them.
        tier += 2 * kept.repeat_interleave(experts // n_group, dim=1)
    ids = best(choice, tier)[:, :top_k]
    weights = score.gather(1, ids)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale, ids.int()


def launch(outputs: tuple[Tensor, Tensor], *args: Any) -> None:
    weights, ids = moe_select(*args)
    outputs[0].copy_(weights)
    outputs[1].copy_(ids)
