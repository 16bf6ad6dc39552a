"""Launches `csrc/cpu/mla_decode.cpp`."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops import _native
from kimi_ops.cpu._support import refusal

BATCH_INVARIANT = True  # the splits of a sequence follow from its own length


def unsupported(
    q_latent: Tensor,
    kv_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    kv_lora_rank: int,
) -> str | None:
    if kv_cache.stride(-1) != 1 and kv_cache.shape[-1] > 1 and kv_cache.numel():
        return "mla_decode on the CPU reads a cache whose rows are dense"
    return refusal("mla_decode", q_latent)


def launch(
    outputs: tuple[Tensor, Tensor],
    q_latent: Tensor,
    kv_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    kv_lora_rank: int,
) -> None:
    out, lse = outputs
    if lse.numel() == 0:
        return
    if q_latent.stride(-1) != 1:
        q_latent = q_latent.contiguous()
    if page_table.stride(-1) != 1:
        page_table = page_table.contiguous()
    batch, new, heads, width = q_latent.shape
    _native.call(
        "mla_decode",
        dtype=q_latent.dtype,
        out=out,
        lse=lse,
        q=q_latent,
        stride_q_b=q_latent.stride(0),
        stride_q_s=q_latent.stride(1),
        stride_q_h=q_latent.stride(2),
        kv_cache=kv_cache,
        fp8=kv_cache.dtype == torch.uint8,
        num_pages=kv_cache.shape[0],
        page_size=kv_cache.shape[1],
        stride_cache_page=kv_cache.stride(0),
        stride_cache_token=kv_cache.stride(1),
        page_table=page_table,
        stride_table_b=page_table.stride(0),
        max_pages=page_table.shape[1],
        seq_lens=seq_lens.contiguous(),
        batch=batch,
        new_tokens=new,
        heads=heads,
        rank=kv_lora_rank,
        rope=width - kv_lora_rank,
        scale=scale,
    )
