"""int4 weights in groups of 32, in the layout of the Kimi K2.5 checkpoint.

The format is ``pack-quantized`` of compressed-tensors: symmetric, one scale per output row and
group of 32 neighbouring input columns, no zero point. A weight is ``q * scale`` with q in -8 .. 7.

One row of ``packed`` (int32 words), for K = 64 columns; a nibble holds q + 8, lowest first::

    word            0                                1              ...   7
    bits   31 28 27 24 23 20 19 16 15 12 11 8 7 4 3 0
    column     7     6     5     4     3    2   1   0    15 14 .. 9 8  ...   63 .. 57 56
    byte    |    3    |    2    |    1    |    0    |      (little endian: byte k of the row holds
                                                           column 2k low and 2k + 1 high)
    scale   |<-------------- words 0-3: group 0 ------------->|<---- words 4-7: group 1 ---->|

so four words share one scale: ``scale[n, g]`` covers columns 32 g .. 32 g + 31 of row n.

All functions accept any leading dimensions (``[E, N, K]`` for stacked experts).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kimi_ops.reference._int4 import dequantize as _dequantize

GROUP_SIZE = 32
_NIBBLES = 8  # per int32 word


def _last_dim(name: str, x: Tensor, factor: int = 1) -> int:
    """Checks that the last dimension holds whole groups; returns the number of columns."""
    columns = x.shape[-1] * factor if x.dim() else 0
    if x.dim() < 1 or columns % GROUP_SIZE:
        raise ValueError(
            f"int4: {name} must hold whole groups of {GROUP_SIZE} columns "
            f"(last dimension a multiple of {GROUP_SIZE // factor}), got {list(x.shape)}"
        )
    return columns


def _dtype(name: str, x: Tensor, *allowed: torch.dtype) -> None:
    if x.dtype not in allowed:
        names = "|".join(str(d).removeprefix("torch.") for d in allowed)
        got = str(x.dtype).removeprefix("torch.")
        raise TypeError(f"int4: {name} must be {names}, got {list(x.shape)} {got}")


def pack(q: Tensor) -> Tensor:
    """Packs ``q [..., K]`` int8, values -8 .. 7, into ``[..., K/8]`` int32.

    Raises:
        ValueError: K is not a multiple of 32, or a value is outside -8 .. 7.
        TypeError: ``q`` is not int8.
    """
    _dtype("q", q, torch.int8)
    _last_dim("q", q)
    if q.numel() and (int(q.min()) < -8 or int(q.max()) > 7):
        raise ValueError(f"int4: q must be in -8 .. 7, got {int(q.min())} .. {int(q.max())}")
    nibbles = (q.to(torch.int32) + 8).unflatten(-1, (-1, _NIBBLES))
    # Nibbles do not overlap, so their sum is their union; the top one wraps into the sign bit.
    shift = torch.arange(0, 4 * _NIBBLES, 4, device=q.device, dtype=torch.int32)
    packed: Tensor = (nibbles << shift).sum(-1, dtype=torch.int32)
    return packed


def unpack(packed: Tensor) -> Tensor:
    """Unpacks ``[..., K/8]`` int32 into ``q [..., K]`` int8, values -8 .. 7.

    Raises:
        ValueError: K is not a multiple of 32.
        TypeError: ``packed`` is not int32.
    """
    _dtype("packed", packed, torch.int32)
    _last_dim("packed", packed, _NIBBLES)
    shift = torch.arange(0, 4 * _NIBBLES, 4, device=packed.device, dtype=torch.int32)
    return (((packed[..., None] >> shift) & 0xF) - 8).to(torch.int8).flatten(-2)


def dequantize(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The weights ``[..., N, K]`` in ``dtype``, each product rounded once.

    Args:
        packed: ``[..., N, K/8]`` int32.
        scale: ``[..., N, K/32]`` bfloat16, float16 or float32.
        dtype: of the result.

    Raises:
        ValueError: K is not a multiple of 32, or the shapes do not belong together.
        TypeError: another dtype than stated.
    """
    _dtype("packed", packed, torch.int32)
    _dtype("scale", scale, torch.bfloat16, torch.float16, torch.float32)
    columns = _last_dim("packed", packed, _NIBBLES)
    expected = (*packed.shape[:-1], columns // GROUP_SIZE)
    if scale.shape != expected:
        raise ValueError(
            f"int4: scale must be {list(expected)} for packed {list(packed.shape)}, "
            f"got {list(scale.shape)}"
        )
    return _dequantize(packed, scale, dtype)


def _round(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``q [..., K/32, 32]``, whole numbers in the dtype of ``weight``, ``scale [..., K/32]``."""
    groups = weight.unflatten(-1, (-1, GROUP_SIZE))
    scale = groups.abs().amax(-1) / 7.5
    scale = torch.where(scale == 0, torch.finfo(weight.dtype).eps, scale)
    return (groups / scale[..., None]).clamp(-8, 7).round(), scale


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds weights to the format; equal, bit for bit, to compressed-tensors' minmax observer.

    ``scale = max|w| / 7.5`` per group (half the range of 15 steps) in the dtype of the weight; a
    group of zeros takes that dtype's epsilon. ``q = round_half_even(clamp(w / scale, -8, 7))``.

    Args:
        weight: ``[..., N, K]`` bfloat16, float16 or float32.

    Returns:
        ``packed [..., N, K/8]`` int32 and ``scale [..., N, K/32]`` in the dtype of ``weight``.

    Raises:
        ValueError: K is not a multiple of 32, or a weight is not finite.
        TypeError: another dtype than stated.
    """
    _dtype("weight", weight, torch.bfloat16, torch.float16, torch.float32)
    _last_dim("weight", weight)
    if not bool(weight.isfinite().all()):
        raise ValueError("int4: weight holds values that are not finite")
    q, scale = _round(weight)
    return pack(q.to(torch.int8).flatten(-2)), scale


class _StraightThrough(torch.autograd.Function):
    """Rounded forward; backward as if nothing had been done."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        q, scale = _round(weight)
        return (q * scale[..., None]).flatten(-2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def fake_quantize(weight: Tensor) -> Tensor:
    """The weights as the format would give them back, for quantisation-aware training.

    Equal, bit for bit, to ``dequantize(*quantize(weight), weight.dtype)``. The gradient goes
    straight through: that of the result is that of ``weight``, as if nothing had been rounded.
    The scales have the dtype of ``weight``; a checkpoint in the released format has bfloat16 ones,
    so master weights in float32 are trained as ``fake_quantize(weight.bfloat16())``.

    Args:
        weight: ``[..., N, K]`` bfloat16, float16 or float32. Nothing waits for a device, so a
            value that is not finite is no error here: its group of 32 becomes NaN.

    Returns:
        ``[..., N, K]`` contiguous, dtype of ``weight``.

    Raises:
        ValueError: K is not a multiple of 32.
        TypeError: another dtype than stated.

    Source: Bengio et al., arXiv 1308.3432 (the straight-through estimator); Kimi K2.5's experts.
    """
    _dtype("weight", weight, torch.bfloat16, torch.float16, torch.float32)
    _last_dim("weight", weight)
    straight_through: Any = _StraightThrough.apply
    rounded: Tensor = straight_through(weight)
    return rounded
