"""Reference of `patch_merge`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from kimi_ops.reference import runs_anything as unsupported
from kimi_ops.reference import widen
from kimi_ops.reference._grid import Place, locate

__all__ = ["launch", "patch_merge", "slots", "unsupported"]


def slots(
    grid_thws: Tensor, length: int, merged_length: int
) -> tuple[Tensor, Tensor, Place, Tensor]:
    """Where each of ``length`` patches goes: its slot among ``4 * merged_length``, whether it goes
    there at all, its place in its entry, and the number of tokens of all entries.
    """
    place = locate(grid_thws, length)
    # Entry (2i + a, 2j + b) of every frame goes to slot 2a + b of token (i, j).
    tokens = grid_thws.long()[:, 1:].prod(1) // 4
    ends = torch.cat((tokens.new_zeros(1), tokens.cumsum(0)))
    patches = grid_thws.long().prod(1).cumsum(0)
    entry = torch.searchsorted(patches, torch.arange(length, device=patches.device), right=True)
    token = ends[entry] + place.row // 2 * (place.w // 2) + place.column // 2
    slot = token * 4 + place.row % 2 * 2 + place.column % 2
    return slot, place.inside & (token < merged_length), place, ends[-1]


def patch_merge(
    x: Tensor,
    grid_thws: Tensor,
    merged_length: int,
    final_weight: Tensor,
    final_bias: Tensor,
    pre_weight: Tensor,
    pre_bias: Tensor,
    eps: float,
) -> Tensor:
    width = x.shape[1]
    normal = layer_norm(x, (width,), final_weight, final_bias, eps)
    slot, written, place, end = slots(grid_thws, len(x), merged_length)
    merged = torch.zeros((merged_length * 4, width), dtype=widen(x).dtype, device=x.device)
    share = widen(normal) / place.t[:, None]
    for frame in place.frame[written].unique().tolist():
        now = written & (place.frame == frame)  # within a frame no two patches share a slot
        merged[slot[now]] += share[now]
    merged = layer_norm(merged.to(x.dtype), (width,), pre_weight, pre_bias, eps)
    merged = merged.view(merged_length, 4 * width)
    past = torch.arange(merged_length, device=x.device) >= end
    return merged.masked_fill(past[:, None], 0)


def launch(y: Tensor, *args: Any) -> None:
    y.copy_(patch_merge(*args))
