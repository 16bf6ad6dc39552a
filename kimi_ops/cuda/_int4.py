"""What launchers of products with int4 weights share (`csrc/cuda/int4_product.cuh`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_ops._batch_invariant import is_batch_invariant
from kimi_ops._target import target
from kimi_ops.cuda._support import is_aligned, refusal

GROUP = 32
THREADS = 256  # of what rearranges x and of what sums up
ZEROS = 256  # elements that lanes without a column of their own read
SHIFT = 1 << 24  # its product's upper half is a shift by 8
_BLOCK_TILES = 4  # of rows of weights, in a block
_TILE_ROWS = 16  # of weights, in a tile
_MOST_ROWS = 65535 * _BLOCK_TILES * _TILE_ROWS  # a grid's second size
_SUMS_BYTES = _TILE_ROWS * 17 * 4  # of a warp
_MAX_SPLIT = 4
_WARPS_AN_SM = 8  # that a grid should have at least
_FEW = 2  # tokens that the separated form takes
_MOST = 8  # tokens of a block
_MANY = 64  # and of one of the form for many
_MANY_FROM = 4  # tokens of an expert: beyond that it is chosen
_MANY_THREADS = 128
_MANY_ROWS = 128  # of weights, that a block of it has
_MANY_SHARED_BYTES = 2832 + (8 << 10) + (48 << 10)  # what is known, scales, the ring
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
        if codes.shape[-2] > _MOST_ROWS:
            return f"{name} must have at most {_MOST_ROWS:,} rows"
    return None


@dataclass(frozen=True)
class Form:
    """How a product is computed.

    Attributes:
        block: tokens of a block of threads at most.
        few: up to how many of them the separated form has.
        many: whether it is the form of `int4_many.cuh`, else that of `int4_product.cuh`.
    """

    block: int
    few: int
    many: bool

    def threads(self, split: int) -> int:
        """Of a block whose tiles have so many warps each."""
        return _MANY_THREADS if self.many else 32 * _BLOCK_TILES * split

    def shared_bytes(self, split: int) -> int:
        """Dynamic shared memory of a block: the sums of its warps; or what it knows from the start,
        and the rings."""
        if not self.many:
            return _BLOCK_TILES * split * _SUMS_BYTES
        return _MANY_SHARED_BYTES


def form_of(x: Tensor, scale: Tensor, expected: float) -> Form:
    """The form for so many tokens that an expert can expect.

    Scales in another dtype than ``x`` are for the separated form alone, which multiplies in
    float32. In batch-invariant mode the form is always the same, and a token's sums do not depend
    on the size of its block.
    """
    if scale.dtype != x.dtype:
        return Form(_FEW, _FEW, many=False)
    if is_batch_invariant() or expected > _MANY_FROM:
        return Form(_MANY, 0, many=True)
    return Form(_MOST, _FEW, many=False)


def rearranged(groups: int) -> tuple[int, int]:
    """Elements of a rearranged row of x, and starts and factors of its groups: whole pairs."""
    pairs = -(-groups // 2)
    return 2 * GROUP * pairs, 4 * pairs


def whole_chunks(x: Tensor, scale: Tensor) -> int:
    """Chunks of K whose scales 16-byte loads can get."""
    if scale.dtype != x.dtype or not is_aligned(scale):
        return 0
    return scale.shape[-1] // _CHUNK


def scale_kind(scale: Tensor) -> int:
    """The dtype of scales, as `ScaleKind` in `int4_product.cuh` numbers it."""
    return _SCALES[scale.dtype]


def split_of(x: Tensor, groups: int, blocks: int) -> int:
    """Warps that share the columns of K: more of them where there are few blocks of threads, as
    long as each has a chunk; in batch-invariant mode always one."""
    if is_batch_invariant():
        return 1
    wanted = _WARPS_AN_SM * target(x.device).multiprocessors
    split = 1
    while (
        split < _MAX_SPLIT
        and _BLOCK_TILES * blocks * split < wanted
        and 2 * split * _CHUNK <= groups
    ):
        split *= 2
    return split


def rows_of_block(form: Form) -> int:
    """Rows of weights that a block multiplies."""
    return _MANY_ROWS if form.many else _BLOCK_TILES * _TILE_ROWS


def whole_pieces(scale: Tensor) -> bool:
    """Whether rows of scales are whole 16-byte pieces."""
    return is_aligned(scale) and scale.shape[-1] * scale.element_size() % 16 == 0
