"""When `_int4_few_direct` multiplies, and what a launch with it takes.

A table of its own, as not every Triton can import that module.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_ops import _target
from kimi_ops.kernels import _gluon, _int4
from kimi_ops.kernels._int4_product import Tile

# GPUs with mma.sync of which it is published that it takes subnormal operands as what they are.
_CAPABILITIES = range(80, 91)
ARCHES = ("sm_80", "sm_86", "sm_89", "sm_90a")
# Registers for 4 programs per SM. How many loads ptxas moves up follows from the number, and with
# one that is right for other GPUs a word or two spill: 244 on sm_80 and sm_90, 240 on sm_86.
_REGISTERS = {86: 244, 89: 244}
ZEROS = 256  # like x, that the kernels read
_SHIFT = 1 << 24  # `_int4_few_direct`: what makes the upper half of a product a shift by 8


def fits(tile: Tile, device: torch.device) -> bool:
    """Whether a launch with a tile goes to `_int4_few_direct`."""
    if tile.tokens > 2 or tile.gluon or not _gluon.compiles():
        return False
    return _int4.takes_assembly(device) and _target.target(device).capability in _CAPABILITIES


def options(device: torch.device) -> dict[str, int]:
    """Those of a launch."""
    return {"num_warps": 2, "maxnreg": _REGISTERS.get(_target.target(device).capability, 240)}


def arguments(tokens: int, packed: Tensor, scale: Tensor) -> dict[str, Any]:
    """Those of `_int4_few_direct.direct` that depend on weights ``[E, N, K/8]``."""
    groups, per_tile = scale.shape[-1], 8 // tokens
    tiles = next((n for n in (4, 2, 1) if groups % (per_tile * n) == 0), 1)
    halves = None
    at = scale.storage_offset()
    if scale.element_size() == 2 and not any(n % 2 for n in (groups, at, *scale.stride()[:-1])):
        halves = getattr(tl, str(scale.dtype).removeprefix("torch."))
        scale = scale.view(torch.int32)
    align = math.gcd(8, *scale.stride()[:-1])
    return {
        "words_ptr": packed,
        "scale_ptr": scale,
        "shift": _SHIFT,
        "steps": triton.cdiv(groups, per_tile * tiles),
        "HALVES": halves,
        "TILES": tiles,
        "SCALE_ALIGN": align,
        "EVEN": groups % (per_tile * tiles) == 0,
        "stride_scale_e": scale.stride(0) // align,
        "stride_scale_n": scale.stride(1) // align,
    }
