"""Launches `csrc/cpu/mla_decode.cpp`."""

from __future__ import annotations

from torch import Tensor

from kimi_ops import _native
from kimi_ops.cpu._latent_cache import decode_arguments, refusal_of_cache

BATCH_INVARIANT = True  # the splits of a sequence follow from its own length


def unsupported(
    q_latent: Tensor,
    kv_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    kv_lora_rank: int,
) -> str | None:
    return refusal_of_cache("mla_decode", q_latent, kv_cache)


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
    arguments = decode_arguments(q_latent, kv_cache, page_table, seq_lens, scale, kv_lora_rank)
    _native.call("mla_decode", out=out, lse=lse, **arguments)
