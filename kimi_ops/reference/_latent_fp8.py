"""The value of a cached token in the fp8 format; `kimi_ops.quant.latent_fp8` draws its bytes."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 448.0  # of float8_e4m3fn
SMALLEST_SCALE = 2.0**-126  # float32's smallest normal number: no subnormal is ever divided by
SCALE_BYTES = 16  # the scale, four times
NAN_CODE = 0x7F


def pack(entry: Tensor, rank: int) -> Tensor:
    """``[..., C+R]`` float, C being ``rank``, to ``[..., C+16+2R]`` uint8.

    ``scale = max(max|latent| / 448, 2^-126)`` and ``code = e4m3(latent * (1 / scale))`` in float32,
    ties to even. A row with a value that is not finite has a NaN scale and NaN codes.
    """
    latent = entry[..., :rank].float()
    largest = latent.abs().amax(-1, keepdim=True)
    finite = largest.isfinite()
    scale = (largest / LARGEST).clamp(min=SMALLEST_SCALE).masked_fill(~finite, torch.nan)
    codes = (latent * (1 / scale)).to(torch.float8_e4m3fn).view(torch.uint8)
    codes = codes.masked_fill(~finite, NAN_CODE)
    scales = torch.cat([scale] * (SCALE_BYTES // 4), dim=-1).view(torch.uint8)
    rope = entry[..., rank:].bfloat16().contiguous().view(torch.uint8)
    return torch.cat((codes, scales, rope), dim=-1)


def unpack(cache: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """``[..., C+16+2R]`` uint8, C being ``rank``, to ``[..., C+R]`` in ``dtype``.

    ``code * scale`` is taken in float32 (float64 for that dtype) and rounded to ``dtype``. Of the
    four copies of the scale the first one counts.
    """

    def field(start: int, stop: int | None, kind: torch.dtype) -> Tensor:
        part = cache[..., start:stop].clone(memory_format=torch.contiguous_format)
        values = part.view(kind) if part.shape[-1] else part.to(kind)  # R may be 0
        return values.to(torch.promote_types(dtype, torch.float32))

    latent = field(0, rank, torch.float8_e4m3fn) * field(rank, rank + 4, torch.float32)
    rope = field(rank + SCALE_BYTES, None, torch.bfloat16)
    return torch.cat((latent, rope), dim=-1).to(dtype)
