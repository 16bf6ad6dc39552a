"""Reference of `mla_latent_write`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kimi_ops.reference import runs_anything as unsupported
from kimi_ops.reference._latent_fp8 import pack
from kimi_ops.reference._rotate import rope
from kimi_ops.reference.rms_norm import rms_norm

__all__ = ["launch", "mla_latent_write", "unsupported"]


def mla_latent_write(
    qkv_a: Tensor,
    q_norm_weight: Tensor,
    kv_norm_weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    eps: float,
) -> Tensor:
    widths = [len(q_norm_weight), len(kv_norm_weight), 2 * len(inv_freq)]
    q, latent, key = qkv_a.split(widths, dim=1)
    entry = torch.cat(
        (rms_norm(latent, kv_norm_weight, eps), rope(key, positions, inv_freq)), dim=1
    )
    if kv_cache.dtype == torch.uint8:
        entry = pack(entry, len(kv_norm_weight))
    slots = slot_mapping.long()
    inside = (slots >= 0) & (slots < kv_cache.shape[0] * kv_cache.shape[1])
    page_size = kv_cache.shape[1]
    kv_cache[slots[inside] // page_size, slots[inside] % page_size] = entry[inside]
    lost = ~inside & (slots != -1)
    return rms_norm(q, q_norm_weight, eps).masked_fill(lost[:, None], torch.nan)


def launch(q_a: Tensor, *args: Any) -> None:
    q_a.copy_(mla_latent_write(*args))
