"""Reference of `merge_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops.reference import runs_anything as unsupported
from kimi_ops.reference import widen

__all__ = ["launch", "merge_attention", "unsupported"]


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)  # -inf where both are
    merged = torch.zeros_like(widen(out_a))
    for out, side in ((out_a, lse_a), (out_b, lse_b)):
        # A side without keys may hold anything: it is left out and not multiplied by 0.
        absent = (side == -torch.inf)[..., None]
        share = (side - lse).exp()[..., None].to(merged.dtype)
        merged += (share * out).masked_fill(absent, 0)
    return merged.to(out_a.dtype), lse


def launch(
    outputs: tuple[Tensor, Tensor], out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> None:
    out, lse = merge_attention(out_a, lse_a, out_b, lse_b)
    outputs[0].copy_(out)
    outputs[1].copy_(lse)
