"""Launches `csrc/cpu/moe_route.cpp`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kimi_ops import _native
from kimi_ops._batch_invariant import is_batch_invariant
from kimi_ops.cpu._support import dense_rows, refusal

BATCH_INVARIANT = True  # then one token takes the same products as many


class Tables(NamedTuple):
    """`moe_sort`'s outputs, and the local experts."""

    order: Tensor | None = None
    offsets: Tensor | None = None
    first: int = 0
    local: int = 0


def unsupported(
    x: Tensor,
    gate_weight: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    scale: float,
    normalize: bool,
) -> str | None:
    if torch.float64 in (x.dtype, gate_weight.dtype):
        return "moe_route on the CPU computes in float32; x or gate_weight is float64"
    return refusal("moe_route", x)


def route(
    weights: Tensor,
    ids: Tensor,
    x: Tensor,
    gate_weight: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    scale: float,
    normalize: bool,
    tables: Tables,
) -> None:
    """Routes, and fills the tables if they are given."""
    x, gate_weight = dense_rows(x)[0], dense_rows(gate_weight)[0]
    _native.call(
        "moe_route",
        dtype_x=x.dtype,
        dtype_weight=gate_weight.dtype,
        weights=weights,
        ids=ids,
        order=tables.order,
        offsets=tables.offsets,
        first=tables.first,
        local=tables.local,
        x=x,
        stride_x=x.stride(0),
        gate_weight=gate_weight,
        stride_weight=gate_weight.stride(0),
        bias=bias.float().contiguous(),
        tokens=x.shape[0],
        depth=x.shape[1],
        experts=gate_weight.shape[0],
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        scale=scale,
        normalize=int(normalize),
        batch_invariant=int(is_batch_invariant()),
    )


def launch(
    outputs: tuple[Tensor, Tensor],
    x: Tensor,
    gate_weight: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    scale: float,
    normalize: bool,
) -> None:
    weights, ids = outputs
    if x.shape[0] == 0:
        return
    route(
        weights,
        ids,
        x,
        gate_weight,
        bias,
        top_k,
        n_group,
        topk_group,
        scale,
        normalize,
        Tables(),
    )
