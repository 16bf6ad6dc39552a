"""Inputs of `int4_linear`, and the int4 weights of the experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kimi_ops.testing.inputs import DTYPE_NAMES, add, normal


def weights(
    generator: torch.Generator, *shape: int, scale_dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """``packed [..., K/8]`` with every nibble value, and ``scale [..., K/32]``.

    The first rows hold the format's extremes: all -8, all 7, a scale of zero and a subnormal one.
    """
    *rows, k = shape
    info = torch.iinfo(torch.int32)
    packed = torch.randint(info.min, info.max + 1, (*rows, k // 8), generator=generator)
    packed = packed.to(torch.int32)
    scale = torch.rand((*rows, k // 32), generator=generator) + 0.5
    scale = (scale * (0.25 * max(k, 1) ** -0.5)).to(scale_dtype)
    flat_packed, flat_scale = packed.flatten(0, -2), scale.flatten(0, -2)
    for row, word in ((0, 0), (1, -1)):  # nibbles 0 (q = -8) and 15 (q = 7)
        flat_packed[row : row + 1] = word
    flat_scale[2:3] = 0
    flat_scale[3:4] = torch.finfo(scale_dtype).smallest_normal / 4
    return packed, scale


def int4_linear(
    generator: torch.Generator,
    shape: tuple[int, ...],
    n: int,
    dtype: torch.dtype = torch.bfloat16,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> tuple[Any, ...]:
    """``x`` of ``shape`` (its last dimension is K) and weights of N rows."""
    x = normal(generator, *shape, dtype=dtype)
    return x, *weights(generator, n, shape[-1], scale_dtype=scale_dtype)


for _dtype, _name in DTYPE_NAMES.items():
    add("int4_linear", f"{_name}-3x256x96", int4_linear, shape=(3, 256), n=96, dtype=_dtype)
for _scale in (torch.float16, torch.float32):
    _label = f"bf16-scale-{DTYPE_NAMES[_scale]}"
    add("int4_linear", _label, int4_linear, shape=(5, 128), n=65, scale_dtype=_scale)
add("int4_linear", "bf16-no-outputs", int4_linear, shape=(3, 64), n=0)
add("int4_linear", "bf16-300x64x130", int4_linear, shape=(300, 64), n=130)
add("int4_linear", "bf16-129x256x257", int4_linear, shape=(129, 256), n=257)
add("int4_linear", "bf16-no-rows", int4_linear, shape=(0, 64), n=8)
add("int4_linear", "bf16-one-group", int4_linear, shape=(1, 32), n=1)
add("int4_linear", "bf16-3d", int4_linear, shape=(2, 9, 160), n=33)
add("int4_linear", "bf16-1x7168x4096", int4_linear, shape=(1, 7168), n=4096)
add("int4_linear", "bf16-17x2048x7168", int4_linear, shape=(17, 2048), n=7168, full=True)
add("int4_linear", "bf16-129x7168x4096", int4_linear, shape=(129, 7168), n=4096, full=True)
