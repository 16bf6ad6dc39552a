"""Gradient of `silu_mul`.

With ``s = sigmoid(gate)`` and ``silu(gate) = gate s``::

    dgate = dy * up * s * (1 + gate * (1 - s))
    dup   = dy * gate * s
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kimi_ops.reference import widen

GRADIENTS = ("gate_up",)


def through_silu_mul(dy: Tensor, gate_up: Tensor) -> Tensor:
    """``dgate_up [..., 2F]`` in the dtype of ``gate_up``."""
    gate, up = widen(gate_up).chunk(2, dim=-1)
    dy, s = widen(dy), gate.sigmoid()
    dgate = dy * up * s * (1 + gate * (1 - s))
    return torch.cat((dgate, dy * gate * s), dim=-1).to(gate_up.dtype)


def save(ctx: Any, inputs: tuple[Any, ...], outputs: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def backward(ctx: Any, dy: Tensor) -> dict[str, Tensor]:
    (gate_up,) = ctx.saved_tensors
    return {"gate_up": through_silu_mul(dy, gate_up)}
