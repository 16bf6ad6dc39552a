"""Reference of `int4_linear`."""

from __future__ import annotations

from torch import Tensor

from kimi_ops.reference import runs_anything as unsupported
from kimi_ops.reference._int4 import dequantize

__all__ = ["int4_linear", "launch", "unsupported"]


def int4_linear(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    return x @ dequantize(packed, scale, x.dtype).T


def launch(y: Tensor, x: Tensor, packed: Tensor, scale: Tensor) -> None:
    y.copy_(int4_linear(x, packed, scale))
