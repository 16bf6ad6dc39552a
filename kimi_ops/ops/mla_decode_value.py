"""`mla_decode` and the value up-projection of its result in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops._dispatch import define_op


def outputs(
    q_latent: Tensor,
    kv_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    w_uv: Tensor,
    scale: float,
    kv_lora_rank: int,
) -> Tensor:
    shape = (*q_latent.shape[:3], w_uv.shape[1])
    return torch.empty(shape, dtype=q_latent.dtype, device=q_latent.device)


_op = define_op(
    "mla_decode_value(Tensor q_latent, Tensor kv_cache, Tensor page_table, Tensor seq_lens,"
    " Tensor w_uv, float scale, int kv_lora_rank=512) -> Tensor",
    checks={
        "q_latent": "[B, S, H, kv_lora_rank+R] float",
        "kv_cache": "[num_pages, P, kv_lora_rank+R] like q_latent"
        " or [num_pages, P, kv_lora_rank+16+2*R] uint8",
        "page_table": "[B, max_pages] int32",
        "seq_lens": "[B] int32",
        "w_uv": "[H, V, kv_lora_rank] like q_latent",
        "P": "P > 0",
        "kv_lora_rank": "0 < kv_lora_rank <= q_latent.shape[-1]",
    },
    outputs=outputs,
)


def mla_decode_value(
    q_latent: Tensor,
    kv_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    w_uv: Tensor,
    scale: float,
    *,
    kv_lora_rank: int = 512,
) -> Tensor:
    """Decode attention in latent space, and each head's value of its result.

    What `mla_decode` and `mla_project_value` give one after the other, lse left out::

        out   = mla_decode(q_latent, kv_cache, page_table, seq_lens, scale)     [B, S, H, C]
        value = w_uv[h] @ out[b, s, h]

    A backend that splits the cached tokens joins the splits and projects in one kernel.

    Args:
        q_latent: ``[B, S, H, C+R]`` bfloat16, float16, float32 or float64.
        kv_cache: ``[num_pages, P, C+R]``, dtype of ``q_latent``, or ``[num_pages, P, C+16+2R]``
            uint8, the fp8 format of `kimi_ops.quant.latent_fp8`; as in `mla_decode`.
        page_table: ``[B, max_pages]`` int32, as in `mla_decode`; a page id in use that is no page
            makes all results of its sequence NaN.
        seq_lens: ``[B]`` int32, cached tokens including the S new ones.
        w_uv: ``[H, V, C]``, dtype of ``q_latent``; the value rows of ``kv_b_proj``, any strides.
        scale: of the scores.
        kv_lora_rank: C, the width of the latent.

    Returns:
        ``[B, S, H, V]`` contiguous, dtype of ``q_latent``; 0 for a token without keys.

    Raises:
        ValueError, TypeError: a shape, dtype, device or page size other than stated.

    Gradients: none; an argument that requires grad is an error.

    Source: DeepSeek-V2, arXiv 2405.04434 section 2.1 (absorbed form).
    """
    value: Tensor = _op(q_latent, kv_cache, page_table, seq_lens, w_uv, scale, kv_lora_rank)
    return value
