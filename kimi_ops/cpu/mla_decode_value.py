"""Launches `csrc/cpu/mla_decode_value.cpp`."""

from __future__ import annotations

from torch import Tensor

from kimi_ops import _native
from kimi_ops._batch_invariant import is_batch_invariant
from kimi_ops.cpu._latent_cache import decode_arguments, refusal_of_cache
from kimi_ops.cpu._support import dense_last

BATCH_INVARIANT = True  # then few tokens are projected as many are


def unsupported(
    q_latent: Tensor,
    kv_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    w_uv: Tensor,
    scale: float,
    kv_lora_rank: int,
) -> str | None:
    return refusal_of_cache("mla_decode_value", q_latent, kv_cache)


def launch(
    value: Tensor,
    q_latent: Tensor,
    kv_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    w_uv: Tensor,
    scale: float,
    kv_lora_rank: int,
) -> None:
    if value.numel() == 0:
        return
    w_uv = dense_last(w_uv)
    arguments = decode_arguments(q_latent, kv_cache, page_table, seq_lens, scale, kv_lora_rank)
    _native.call(
        "mla_decode_value",
        value=value,
        w_uv=w_uv,
        stride_w_h=w_uv.stride(0),
        stride_w_v=w_uv.stride(1),
        width=w_uv.shape[1],
        one_path=is_batch_invariant(),
        **arguments,
    )
