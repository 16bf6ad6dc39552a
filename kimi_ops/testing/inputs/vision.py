"""Inputs of the vision ops: pictures and clips of mixed sizes in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kimi_ops.testing.inputs import DTYPE_NAMES, add, normal, strided

BF16 = torch.bfloat16
Grids = tuple[tuple[int, int, int], ...]


def _grid(grids: Grids) -> Tensor:
    """In int64 as the model has it, and in int32 for an even number of entries."""
    dtype = torch.int64 if len(grids) % 2 else torch.int32
    return torch.tensor(grids, dtype=dtype).view(-1, 3)


def _patches(grids: Grids) -> int:
    return int(_grid(grids).prod(1).sum())


def vision_pos_embed(
    generator: torch.Generator,
    grids: Grids,
    d: int = 1152,
    table: tuple[int, int] = (64, 64),
    dtype: torch.dtype = BF16,
    padding: int = 0,
) -> tuple[Any, ...]:
    """Patches, with ``padding`` rows that belong to no entry behind them."""
    x = normal(generator, _patches(grids) + padding, d, dtype=dtype)
    return x, normal(generator, *table, d, dtype=dtype), _grid(grids)


def vision_rope(
    generator: torch.Generator,
    grids: Grids,
    heads: int = 16,
    head_dim: int = 72,
    dtype: torch.dtype = BF16,
    padding: int = 0,
) -> tuple[Any, ...]:
    """Packed q, k, v, with ``padding`` rows that belong to no entry behind them."""
    return normal(generator, _patches(grids) + padding, 3, heads, head_dim, dtype=dtype), _grid(
        grids
    )


def vision_attention(
    generator: torch.Generator,
    lengths: tuple[int, ...],
    heads: int = 4,
    head_dim: int = 72,
    dtype: torch.dtype = BF16,
    padding: int = 0,
    large: bool = False,
    slack: int = 0,
) -> tuple[Any, ...]:
    """q, k and v as slices of one packed tensor; ``padding`` rows of NaN behind them."""
    total = sum(lengths)
    qkv = normal(generator, total + padding, 3, heads, head_dim, dtype=dtype)
    if large:
        qkv[:, :2] *= 12  # scores of several hundred
    qkv[total:] = torch.nan
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).int()
    q, k, v = qkv.unbind(1)
    return q, k, v, cu_seqlens, max(lengths) + slack, head_dim**-0.5


def patch_merge(
    generator: torch.Generator,
    grids: Grids,
    d: int = 1152,
    dtype: torch.dtype = BF16,
    padding: int = 0,
    extra: int = 0,
    wide: bool = False,
) -> tuple[Any, ...]:
    """Encoder output with ``padding`` rows of NaN behind it; ``extra`` output rows to be zero."""
    x = normal(generator, _patches(grids) + padding, d, dtype=dtype, std=3)
    x[_patches(grids) :] = torch.nan
    merged = sum(h * w // 4 for _, h, w in grids) + extra
    norms = [normal(generator, d, dtype=dtype) for _ in range(4)]
    return strided(x) if wide else x, _grid(grids), merged, *norms, 1e-5


_MIXED: Grids = ((1, 2, 4), (3, 4, 2), (1, 6, 10), (4, 2, 2), (2, 8, 4))
for _dtype, _name in DTYPE_NAMES.items():
    add("vision_pos_embed", f"{_name}-mixed", vision_pos_embed, grids=_MIXED, dtype=_dtype,
        work=1 << 20)  # fmt: skip
    # The work is in sixteen taps a patch, not in the elements of the table.
    add("vision_pos_embed", f"{_name}-narrow", vision_pos_embed, grids=_MIXED, d=136, dtype=_dtype,
        work=1 << 18)  # fmt: skip
    add("vision_rope", f"{_name}-mixed", vision_rope, grids=_MIXED, dtype=_dtype)
    add("vision_rope", f"{_name}-heads-5", vision_rope, grids=_MIXED, heads=5, dtype=_dtype)
    add("vision_attention", f"{_name}-mixed", vision_attention, lengths=(8, 24, 65, 0, 16),
        dtype=_dtype)  # fmt: skip
    add("patch_merge", f"{_name}-mixed", patch_merge, grids=_MIXED, dtype=_dtype)

for _op, _build in (("vision_pos_embed", vision_pos_embed), ("vision_rope", vision_rope),
                    ("patch_merge", patch_merge)):  # fmt: skip
    add(_op, "bf16-none", _build, grids=(), work=0)
    add(_op, "bf16-smallest", _build, grids=((1, 2, 2),), work=1 << 14)
    add(_op, "bf16-padding", _build, grids=((2, 2, 6), (1, 4, 4)), padding=9, work=1 << 18)
    add(_op, "bf16-46x36", _build, grids=((1, 46, 36),), work=1 << 21)
    add(_op, "bf16-6x512", _build, grids=((1, 6, 512),), full=True)
# Narrow, but every patch has sixteen taps to find: minutes in the interpreter.
add("vision_pos_embed", "bf16-own-size", vision_pos_embed, grids=((1, 64, 64),), d=72, work=1 << 22)
add("vision_pos_embed", "bf16-larger", vision_pos_embed, grids=((2, 80, 70),), d=36, work=1 << 22)
add("vision_pos_embed", "bf16-small-table", vision_pos_embed, grids=((1, 4, 6), (3, 2, 8)),
    d=96, table=(5, 8))  # fmt: skip
add("vision_rope", "bf16-head-4", vision_rope, grids=((1, 4, 6),), heads=3, head_dim=4)
add("vision_attention", "bf16-one", vision_attention, lengths=(1,))
add("vision_attention", "bf16-empty", vision_attention, lengths=(0,))
add("vision_attention", "bf16-padding", vision_attention, lengths=(33, 100), padding=31)
add("vision_attention", "bf16-large-scores", vision_attention, lengths=(130,), large=True)
add("vision_attention", "bf16-head-64", vision_attention, lengths=(127, 129), head_dim=64)
add("vision_attention", "bf16-1656", vision_attention, lengths=(1656,), heads=16, full=True)
add("vision_attention", "bf16-300", vision_attention, lengths=(257, 300), heads=1, slack=40)
add("patch_merge", "fp32-long-clip", patch_merge, grids=((8, 24, 24),), d=128, dtype=torch.float32,
    work=1 << 20)  # fmt: skip
add("patch_merge", "fp32-clip", patch_merge, grids=((8, 12, 12),), d=128, dtype=torch.float32)
add("patch_merge", "bf16-extra", patch_merge, grids=((1, 4, 4),), extra=5)
add("patch_merge", "bf16-strided", patch_merge, grids=((2, 4, 4), (1, 2, 2)), wide=True)
add("patch_merge", "bf16-small", patch_merge, grids=((3, 4, 6), (1, 2, 2)), d=40)
add("patch_merge", "bf16-width-2040", patch_merge, grids=((2, 2, 4),), d=2040)
add("patch_merge", "fp16-width-1301", patch_merge, grids=((2, 2, 4),), d=1301, dtype=torch.float16)
