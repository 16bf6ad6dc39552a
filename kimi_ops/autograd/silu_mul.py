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
    wide, dy = widen(gate_up), widen(dy)
    gate, up = wide.chunk(2, dim=-1)
    # Written in place of a concatenation, which would cost as much as the arithmetic.
    dgate_up = torch.empty_like(wide)
    dgate, dup = dgate_up.chunk(2, dim=-1)
    torch.mul(dy, torch.nn.functional.silu(gate), out=dup)
    torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
    return dgate_up.to(gate_up.dtype)


def save(ctx: Any, inputs: tuple[Any, ...], outputs: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def backward(ctx: Any, dy: Tensor) -> dict[str, Tensor]:
    (gate_up,) = ctx.saved_tensors
    return {"gate_up": through_silu_mul(dy, gate_up)}
