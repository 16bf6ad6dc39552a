"""The value of packed int4 weights, in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

_GROUP = 32


def dequantize(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``[..., N, K/8]`` int32 and ``[..., N, K/32]`` to ``[..., N, K]`` in ``dtype``.

    Column c is nibble ``c % 8`` (lowest first) of word ``c // 8``, stored plus 8; in bytes, the low
    half of byte ``c // 2`` for even c and its high half for odd c. Its scale is that of group
    ``c // 32``. The product is taken in the wider of the two dtypes and rounded once.
    """
    octets = packed.contiguous().view(torch.uint8)
    nibbles = torch.stack((octets & 0xF, octets >> 4), dim=-1).flatten(-2)
    wide = torch.promote_types(dtype, scale.dtype)
    q = nibbles.to(wide).sub_(8).view(*scale.shape, _GROUP)
    return q.mul_(scale.to(wide)[..., None]).flatten(-2).to(dtype)
