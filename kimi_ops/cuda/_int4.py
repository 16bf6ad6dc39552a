"""What launchers of products with int4 weights share (`csrc/cuda/int4_product.cuh`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kimi_ops._batch_invariant import is_batch_invariant
from kimi_ops.cuda._support import is_aligned, refusal

GROUP = 32
THREADS = 256  # eight warps
ZEROS = 256  # elements that lanes without a column of their own read
SHIFT = 1 << 28  # its product's upper half is a shift by 4
_WARPS = 8
_TILE_ROWS = 16  # of weights, a warp's
_FEW = 2  # tokens that the separated form takes
_MOST = 16  # tokens of a block
_CHUNK = 16  # groups whose scales are loaded at once
_SCALES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def weights_refusal(op: str, x: Tensor, packed: Mapping[str, tuple[Tensor, Tensor]]) -> str | None:
    """Why the kernels cannot take a call: its GPU, its dtype, or how its weights lie; or None.

    Args:
        op: name, for the sentence.
        x: activations.
        packed: codes and scales by name.
    """
    reason = refusal(op, x, (torch.bfloat16, torch.float16))
    if reason is not None:
        return reason
    for name, (codes, scale) in packed.items():
        if codes.numel() and not is_aligned(codes):
            return f"{name} must start, and each of its rows must start, at a multiple of 16 bytes"
        if scale.numel() and scale.shape[-1] > 1 and scale.stride(-1) != 1:
            return f"the scales of {name} must have neighbouring columns side by side in memory"
    return None


def tokens_of_block(x: Tensor, scale: Tensor) -> tuple[int, int]:
    """Tokens of a block at most, and up to how many of them the separated form has.

    Scales in another dtype than ``x`` are for that form alone, which multiplies in float32.
    """
    if scale.dtype != x.dtype:
        return _FEW, _FEW
    return _MOST, 0 if is_batch_invariant() else _FEW


def rearranged(groups: int) -> tuple[int, int]:
    """Elements of a rearranged row of x, and sums of its groups: whole pairs of groups."""
    pairs = -(-groups // 2)
    return 2 * GROUP * pairs, 2 * pairs


def whole_chunks(x: Tensor, scale: Tensor) -> int:
    """Chunks of K whose scales 16-byte loads can get."""
    if scale.dtype != x.dtype or not is_aligned(scale):
        return 0
    return scale.shape[-1] // _CHUNK


def scale_kind(scale: Tensor) -> int:
    """The dtype of scales, as `ScaleKind` in `int4_product.cuh` numbers it."""
    return _SCALES[scale.dtype]


def split_of(groups: int) -> int:
    """Warps of a block that share the columns of K: by its width alone."""
    return 2 if groups >= 2 * _CHUNK else 1


def rows_of_block(split: int) -> int:
    """Rows of weights that a block multiplies."""
    return _WARPS // split * _TILE_ROWS
