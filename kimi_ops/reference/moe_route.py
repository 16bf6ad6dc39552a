"""Reference of `moe_route`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kimi_ops.reference import runs_anything as unsupported
from kimi_ops.reference import widen
from kimi_ops.reference.moe_select import moe_select

__all__ = ["launch", "moe_route", "unsupported"]


def moe_route(
    x: Tensor,
    gate_weight: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    scale: float = 1.0,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    wide = widen(x)
    logits = wide @ gate_weight.to(wide.dtype).T
    return moe_select(logits, bias, top_k, n_group, topk_group, scale, normalize)


def launch(outputs: tuple[Tensor, Tensor], *args: Any) -> None:
    weights, ids = moe_route(*args)
    outputs[0].copy_(weights)
    outputs[1].copy_(ids)
