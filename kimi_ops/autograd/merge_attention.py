"""Gradient of `merge_attention`.

With the shares ``s_a = exp(lse_a - lse)`` and ``s_b`` alike, ``out = s_a out_a + s_b out_b``::

    dout_a = s_a dout
    dlse_a = s_a (dlse + dout . (out_a - out))

and the same for b. A side whose lse is -inf gets 0, whatever its ``out`` holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kimi_ops.reference import widen

GRADIENTS = ("out_a", "lse_a", "out_b", "lse_b")


def save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> dict[str, Tensor]:
    out_a, lse_a, out_b, lse_b = ctx.saved_tensors
    dout, lse = widen(dout), torch.logaddexp(lse_a, lse_b)

    def share(side: Tensor) -> Tensor:
        return (side - lse).exp().masked_fill(side == -torch.inf, 0)[..., None]

    def values(out: Tensor, side: Tensor) -> Tensor:
        return widen(out).masked_fill((side == -torch.inf)[..., None], 0)

    wide_a, wide_b = values(out_a, lse_a), values(out_b, lse_b)
    out = share(lse_a) * wide_a + share(lse_b) * wide_b
    found = {}
    for name, wide, side in (("a", wide_a, lse_a), ("b", wide_b, lse_b)):
        s = share(side)
        dside = s[..., 0] * (dlse + (dout * (wide - out)).sum(-1))
        found[f"out_{name}"] = (s * dout).to(out_a.dtype)
        found[f"lse_{name}"] = dside.to(side.dtype)
    return found
