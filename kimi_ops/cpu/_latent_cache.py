"""What the launchers of the ops that read the latent cache share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kimi_ops.cpu._support import dense_last, refusal


def refusal_of_cache(op: str, q_latent: Tensor, kv_cache: Tensor) -> str | None:
    """Why the library does not run the op, or None."""
    if kv_cache.numel() and kv_cache.shape[-1] > 1 and kv_cache.stride(-1) != 1:
        return f"{op} on the CPU reads a cache whose rows are dense"
    return refusal(op, q_latent)


def decode_arguments(
    q_latent: Tensor,
    kv_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    kv_lora_rank: int,
) -> dict[str, Any]:
    """The arguments of an entry that are those of `mla_decode`, but for its outputs."""
    q_latent, page_table = dense_last(q_latent), dense_last(page_table)
    batch, new, heads, width = q_latent.shape
    return {
        "dtype": q_latent.dtype,
        "q": q_latent,
        "stride_q_b": q_latent.stride(0),
        "stride_q_s": q_latent.stride(1),
        "stride_q_h": q_latent.stride(2),
        "kv_cache": kv_cache,
        "fp8": kv_cache.dtype == torch.uint8,
        "num_pages": kv_cache.shape[0],
        "page_size": kv_cache.shape[1],
        "stride_cache_page": kv_cache.stride(0),
        "stride_cache_token": kv_cache.stride(1),
        "page_table": page_table,
        "stride_table_b": page_table.stride(0),
        "max_pages": page_table.shape[1],
        "seq_lens": seq_lens.contiguous(),
        "batch": batch,
        "new_tokens": new,
        "heads": heads,
        "rank": kv_lora_rank,
        "rope": width - kv_lora_rank,
        "scale": scale,
    }
