"""Launches `csrc/cpu/moe_select.cpp`."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops import _native
from kimi_ops.cpu._support import dense_rows

BATCH_INVARIANT = True  # a token is chosen for alone


def unsupported(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    scale: float,
    normalize: bool,
) -> str | None:
    if logits.dtype != torch.float32:
        return "moe_select on the CPU computes in float32; logits are float64"
    return None


def launch(
    outputs: tuple[Tensor, Tensor],
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    scale: float,
    normalize: bool,
) -> None:
    weights, ids = outputs
    if logits.shape[0] == 0:
        return
    logits, rows = dense_rows(logits)
    _native.call(
        "moe_select",
        weights=weights,
        ids=ids,
        logits=logits,
        rows_logits=rows,
        bias=bias.contiguous(),
        tokens=rows.total,
        experts=logits.shape[1],
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        scale=scale,
        normalize=int(normalize),
    )
