"""Gradient of `vision_rope`: q and k turn back by the angles they turned by, v passes.

The op writes its argument, so the gradient is that of torch's own in-place operations: the tensor
that went in is a result of the op from then on. A leaf that requires grad, or a value that another
operation has saved for its own gradient, is refused by torch with the message it has for `mul_`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kimi_ops.reference._rotate import rotate_pairs
from kimi_ops.reference.vision_rope import angles

GRADIENTS = ("qkv",)


def save(ctx: Any, inputs: tuple[Any, ...], outputs: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def backward(ctx: Any, dqkv: Tensor) -> dict[str, Tensor]:
    (grid_thws,) = ctx.saved_tensors
    turned = rotate_pairs(dqkv[:, :2], -angles(dqkv, grid_thws))
    return {"qkv": torch.cat((turned, dqkv[:, 2:]), dim=1)}
