"""Reference of `mla_decode`."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops.reference import runs_anything as unsupported
from kimi_ops.reference import widen
from kimi_ops.reference._latent_fp8 import unpack

__all__ = ["launch", "mla_decode", "unsupported"]


def mla_decode(
    q_latent: Tensor,
    kv_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    kv_lora_rank: int,
) -> tuple[Tensor, Tensor]:
    num_pages, page_size, _ = kv_cache.shape
    batch, new, _, width = q_latent.shape
    device = q_latent.device
    length = seq_lens.long().clamp(0, page_table.shape[1] * page_size)
    capacity = max(length.tolist(), default=0)

    # The keys of each sequence side by side, [B, capacity, C+R]. What a sequence does not use may
    # hold anything, NaN and absurd page ids included, so it is left out and not multiplied by 0.
    token = torch.arange(capacity, device=device)
    page = page_table.long()[:, token // page_size]
    used = token < length[:, None]
    present = used & (page >= 0) & (page < num_pages)
    kv = q_latent.new_zeros((batch, capacity, width))
    entry = kv_cache[page[present], (token % page_size).expand_as(page)[present]]
    fp8 = kv_cache.dtype == torch.uint8
    kv[present] = unpack(entry, kv_lora_rank, kv.dtype) if fp8 else entry

    limit = length[:, None] - torch.arange(new - 1, -1, -1, device=device)
    hidden = token >= limit[..., None]
    score = torch.einsum("bshw,btw->bhst", widen(q_latent), widen(kv)) * scale
    score = score.masked_fill(hidden[:, None], -torch.inf)
    lse = score.logsumexp(-1)
    weight = (score - lse[..., None]).exp().masked_fill((lse == -torch.inf)[..., None], 0)
    out = torch.einsum("bhst,btc->bshc", weight.to(kv.dtype), kv[..., :kv_lora_rank])

    lost = (used & ~present).any(1)[:, None, None]
    out = out.masked_fill(lost[..., None], torch.nan)
    return out, lse.transpose(1, 2).masked_fill(lost, torch.nan)


def launch(
    outputs: tuple[Tensor, Tensor],
    q_latent: Tensor,
    kv_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    kv_lora_rank: int,
) -> None:
    out, lse = mla_decode(q_latent, kv_cache, page_table, seq_lens, scale, kv_lora_rank)
    outputs[0].copy_(out)
    outputs[1].copy_(lse)
