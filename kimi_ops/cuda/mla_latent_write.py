"""Launches `csrc/cuda/mla_latent_write.cu`."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops.cuda._launcher import launch_kernel
from kimi_ops.cuda._support import ELEMENTS, aligned, is_aligned, refusal

BATCH_INVARIANT = True  # how a token is summed follows from the widths and the cache alone
_WARPS = 4


def unsupported(
    qkv_a: Tensor,
    q_norm_weight: Tensor,
    kv_norm_weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    eps: float,
) -> str | None:
    return refusal("mla_latent_write", qkv_a, tuple(ELEMENTS))


def launch(
    q_a: Tensor,
    qkv_a: Tensor,
    q_norm_weight: Tensor,
    kv_norm_weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    eps: float,
) -> None:
    tokens = qkv_a.shape[0]
    if tokens == 0:
        return
    q, c, r = len(q_norm_weight), len(kv_norm_weight), 2 * len(inv_freq)
    wide = 16 // qkv_a.element_size()
    vectors = q % wide == 0 and c % wide == 0 and r % wide == 0 and is_aligned(kv_cache)
    if vectors:
        qkv_a = aligned(qkv_a)
        q_norm_weight, kv_norm_weight = aligned(q_norm_weight), aligned(kv_norm_weight)
    launch_kernel(
        "mla_latent_write",
        f"mla_latent_write_kernel_{ELEMENTS[qkv_a.dtype]}_{'vec' if vectors else 'each'}",
        grid=(tokens,),
        block=(32 * _WARPS,),
        args=[
            qkv_a,
            q_norm_weight,
            kv_norm_weight,
            positions,
            positions.element_size(),
            inv_freq,
            slot_mapping,
            slot_mapping.element_size(),
            kv_cache,
            q_a,
            int(kv_cache.dtype == torch.uint8),
            kv_cache.shape[0] * kv_cache.shape[1],
            kv_cache.shape[1],
            q,
            c,
            r,
            *qkv_a.stride(),
            q_norm_weight.stride(0),
            kv_norm_weight.stride(0),
            positions.stride(0),
            inv_freq.stride(0),
            slot_mapping.stride(0),
            *kv_cache.stride(),
            eps,
        ],
    )
