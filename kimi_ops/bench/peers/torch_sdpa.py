"""Torch's fused attention, ``scaled_dot_product_attention``, a sequence at a time.

Its fused kernels want queries, keys and values of one width: 128 values are padded to 192 in each
call, and decode attention takes the whole latent entry as its value. The heads of decode attention
share their keys, so they stand where queries do. It gives no lse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from kimi_ops.bench.case import Args
from kimi_ops.bench.peers import Prepare, Prepared
from kimi_ops.bench.peers._attention import (
    Span,
    hidden_keys,
    latent_attention,
    sizes,
    spans,
    with_value,
)

NAME = "torch SDPA"
WRITTEN_AGAINST = "torch 2.13.0"
DEVICES = ("cpu", "cuda")


def missing(device: str) -> str | None:
    """Torch is always there."""
    return None


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, **mask: Any) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, F.pad(v, (0, k.shape[2] - v.shape[2]))))
    return F.scaled_dot_product_attention(q, k, v, scale=scale, **mask)[0].transpose(0, 1)


def _packed(
    calls: Sequence[Args], segments: list[list[tuple[Span, Span]]], scale_at: int, causal: bool
) -> Prepared:
    masks: dict[Span, dict[str, Any]] = {size: {} for size in sizes(segments)}
    for n, m in masks if causal else ():
        # ``is_causal`` aligns the first query with the first key.
        seen = {"attn_mask": ~hidden_keys(n, m, calls[0][0].device)}
        masks[n, m] = {"is_causal": True} if n == m else seen

    def run(i: int) -> Tensor:
        q, k, v = calls[i][:3]
        out: Tensor = q.new_zeros((*q.shape[:2], v.shape[2]))
        for (q0, q1), (k0, k1) in segments[i]:
            mask = masks[q1 - q0, k1 - k0]
            part = _attend(q[q0:q1], k[k0:k1], v[k0:k1], calls[i][scale_at], **mask)
            out[q0:q1] = part[..., : v.shape[2]]
        return out

    return run


def _mla_prefill(calls: Sequence[Args]) -> Prepared:
    causal = all(call[8] for call in calls if len(call) > 8)
    return _packed(calls, [spans(call[3], call[4]) for call in calls], 7, causal)


def _vision_attention(calls: Sequence[Args]) -> Prepared:
    return _packed(calls, [spans(call[3], call[3]) for call in calls], 5, causal=False)


def _attend_latent(q: Tensor, kv: Tensor, scale: float, rank: int) -> Tensor:
    new, heads = q.shape[1:3]
    mask = None
    if new > 1:
        seen = ~hidden_keys(new, kv.shape[1], q.device)
        mask = seen.repeat_interleave(heads, dim=0)
    flat, kv = q.flatten(1, 2)[:, None], kv[:, None]
    out = F.scaled_dot_product_attention(flat, kv, kv, attn_mask=mask, scale=scale)
    return out[..., :rank].view(*q.shape[:3], rank)


def _mla_decode(calls: Sequence[Args]) -> Prepared:
    return latent_attention(calls, _attend_latent)


OPS: dict[str, Prepare] = {
    "mla_prefill": _mla_prefill,
    "mla_decode": _mla_decode,
    "mla_decode_value": with_value(_mla_decode),
    "vision_attention": _vision_attention,
}
