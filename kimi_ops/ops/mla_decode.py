"""Absorbed multi-head latent attention over the paged latent cache."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops._dispatch import define_op


def outputs(
    q_latent: Tensor,
    kv_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    kv_lora_rank: int,
) -> tuple[Tensor, Tensor]:
    batch, new, heads, _ = q_latent.shape
    device, exact = q_latent.device, q_latent.dtype == torch.float64
    out = torch.empty((batch, new, heads, kv_lora_rank), dtype=q_latent.dtype, device=device)
    lse_dtype = torch.float64 if exact else torch.float32
    return out, torch.empty((batch, new, heads), dtype=lse_dtype, device=device)


_op = define_op(
    "mla_decode(Tensor q_latent, Tensor kv_cache, Tensor page_table, Tensor seq_lens, float scale,"
    " int kv_lora_rank=512) -> (Tensor, Tensor)",
    checks={
        "q_latent": "[B, S, H, kv_lora_rank+R] float",
        "kv_cache": "[num_pages, P, kv_lora_rank+R] like q_latent"
        " or [num_pages, P, kv_lora_rank+16+2*R] uint8",
        "page_table": "[B, max_pages] int32",
        "seq_lens": "[B] int32",
        "P": "P > 0",
        "kv_lora_rank": "0 < kv_lora_rank <= q_latent.shape[-1]",
    },
    outputs=outputs,
)


def mla_decode(
    q_latent: Tensor,
    kv_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    *,
    kv_lora_rank: int = 512,
) -> tuple[Tensor, Tensor]:
    """Attention of S new tokens per sequence over that sequence's cached latents.

    Every head of a sequence reads the same keys (C+R wide) and values (their first C entries)::

        limit      = seq_lens[b] - (S - 1 - s)              causal among the new tokens
        score[t]   = scale * q_latent[b, s, h] . kv[t]      t < limit
        out        = sum_t softmax(score)[t] * kv[t, :C]
        lse        = log(sum_t exp(score[t]))               natural logarithm

    Args:
        q_latent: ``[B, S, H, C+R]`` bfloat16, float16, float32 or float64.
        kv_cache: ``[num_pages, P, C+R]``, dtype of ``q_latent``, or ``[num_pages, P, C+16+2R]``
            uint8, the fp8 format of `kimi_ops.quant.latent_fp8`; any page size P. A NaN or
            infinity in a new token's entry may reach the S results of its sequence, also those
            that the causal rule hides it from.
        page_table: ``[B, max_pages]`` int32; token t of sequence b is in page
            ``page_table[b, t // P]``. Entries past a sequence's last page are never followed; one
            in use that is no page of the cache makes all results of its sequence NaN.
        seq_lens: ``[B]`` int32, cached tokens including the S new ones; at most what the page
            table can hold counts, and a negative length is 0.
        scale: of the scores; Kimi K2.5's is ``192**-0.5`` times the square of the YaRN factor.
        kv_lora_rank: C, the width of the values.

    Returns:
        ``out [B, S, H, C]``, dtype of ``q_latent``, and ``lse [B, S, H]`` float32 (float64 for
        float64 input). A token without keys has out 0 and lse -inf.

    Raises:
        ValueError, TypeError: a shape, dtype, device or page size other than stated.

    Gradients: none; an argument that requires grad is an error.

    Source: DeepSeek-V2, arXiv 2405.04434 section 2.1 (absorbed form).
    """
    out, lse = _op(q_latent, kv_cache, page_table, seq_lens, scale, kv_lora_rank)
    return out, lse
