"""Gradient of `patch_merge`: back through the projector's LayerNorm, the mean over frames and the
final LayerNorm; the values between them are computed again.

A LayerNorm ``y = weight n + bias`` with ``n = (x - mean(x)) r``, ``r = 1 / sqrt(var(x) + eps)``
and ``g = weight * dy`` has::

    dx = r * (g - mean(g) - n * mean(g * n)),   dweight = sum of dy * n,   dbias = sum of dy
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kimi_ops.autograd._rows import add_rows
from kimi_ops.reference import widen
from kimi_ops.reference.patch_merge import slots

GRADIENTS = ("x", "final_weight", "final_bias", "pre_weight", "pre_bias")


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``n [..., D]`` and ``r [..., 1]`` of the formula."""
    centred = x - x.mean(-1, keepdim=True)
    r = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * r, r


def _through_norm(dy: Tensor, n: Tensor, r: Tensor, weight: Tensor) -> Tensor:
    g = dy * weight
    return r * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))


def save(ctx: Any, inputs: tuple[Any, ...], outputs: Tensor) -> None:
    x, grid_thws, ctx.merged_length, final_weight, final_bias, pre_weight, _, ctx.eps = inputs
    ctx.save_for_backward(x, grid_thws, final_weight, final_bias, pre_weight)


def backward(ctx: Any, dy: Tensor) -> dict[str, Tensor]:
    x, grid_thws, final_weight, final_bias, pre_weight = ctx.saved_tensors
    length, width = ctx.merged_length, x.shape[1]
    slot, written, place, end = slots(grid_thws, len(x), length)
    slot = slot.where(written, 4 * length)  # one slot more, for patches that go nowhere
    share = (written.to(widen(x).dtype) / place.t)[:, None]  # of a patch in its slot's mean

    # What no entry covers may be NaN: its n and r are 0.
    n, r = (v.masked_fill(~written[:, None], 0) for v in _normalize(widen(x), ctx.eps))
    merged = torch.zeros((4 * length + 1, width), dtype=n.dtype, device=x.device)
    add_rows(merged, slot, share * (n * final_weight + final_bias))
    merged_n, merged_r = _normalize(merged[:-1], ctx.eps)

    past = torch.arange(length, device=x.device) >= end
    dmerged = widen(dy).masked_fill(past[:, None], 0).reshape(4 * length, width)
    dpre_weight, dpre_bias = (dmerged * merged_n).sum(0), dmerged.sum(0)
    dmerged = _through_norm(dmerged, merged_n, merged_r, pre_weight)
    dnormal = share * torch.cat((dmerged, dmerged.new_zeros(1, width)))[slot]
    found = {
        "x": _through_norm(dnormal, n, r, final_weight),
        "final_weight": (dnormal * n).sum(0),
        "final_bias": dnormal.sum(0),
        "pre_weight": dpre_weight,
        "pre_bias": dpre_bias,
    }
    return {name: gradient.to(x.dtype) for name, gradient in found.items()}
