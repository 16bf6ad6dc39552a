"""The value of packed int4 weights, in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

_GROUP = 32


def dequantize(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``[..., N, K/8]`` int32 and ``[..., N, K/32]`` to ``[..., N, K]`` in ``dtype``.

    Column c is nibble ``c % 8`` (lowest first) of word ``c // 8``, stored plus 8; its scale is
    that of group ``c // 32``. A nibble times a bfloat16 scale is exact in float32, so the one
    rounding is that to ``dtype``.
    """
    shift = torch.arange(0, 32, 4, device=packed.device, dtype=torch.int32)
    nibble = ((packed[..., None] >> shift) & 0xF) - 8
    grouped = nibble.view(*packed.shape[:-1], -1, _GROUP)
    wide = torch.promote_types(torch.promote_types(dtype, scale.dtype), torch.float32)
    return (grouped.to(wide) * scale.to(wide)[..., None]).flatten(-2).to(dtype)
