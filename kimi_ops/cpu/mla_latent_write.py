"""Launches `csrc/cpu/mla_latent_write.cpp`."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops import _native
from kimi_ops.cpu._support import dense_rows, refusal

BATCH_INVARIANT = True  # a token is summed alike in every batch


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
    if kv_cache.shape[2] > 1 and kv_cache.stride(2) != 1:
        return "mla_latent_write on the CPU writes entries of a cache whose values are side by side"
    return refusal("mla_latent_write", qkv_a)


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
    qkv_a = dense_rows(qkv_a)[0]
    _native.call(
        "mla_latent_write",
        dtype=qkv_a.dtype,
        fp8=int(kv_cache.dtype == torch.uint8),
        q_a=q_a,
        qkv_a=qkv_a,
        stride_qkv_a=qkv_a.stride(0),
        q_norm_weight=q_norm_weight.contiguous(),
        kv_norm_weight=kv_norm_weight.contiguous(),
        positions=positions.contiguous(),
        position_bytes=positions.element_size(),
        inv_freq=inv_freq.contiguous(),
        slot_mapping=slot_mapping.contiguous(),
        slot_bytes=slot_mapping.element_size(),
        kv_cache=kv_cache,
        stride_page=kv_cache.stride(0),
        stride_row=kv_cache.stride(1),
        tokens=tokens,
        q=len(q_norm_weight),
        c=len(kv_norm_weight),
        r=2 * len(inv_freq),
        pages=kv_cache.shape[0],
        page_size=kv_cache.shape[1],
        eps=eps,
    )
