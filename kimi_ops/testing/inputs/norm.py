"""Inputs of `rms_norm`, `add_rms_norm` and `silu_mul`."""

from __future__ import annotations

from typing import Any

import torch

from kimi_ops.testing.inputs import DTYPE_NAMES, add, normal, strided

_EPS = 1e-5


def _rows(
    generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, special: str
) -> torch.Tensor:
    x = normal(generator, *shape, dtype=dtype)
    if special == "strided":
        return strided(x)
    if special == "hostile":
        # Rows: NaN, infinity, zeros, tiny (the eps decides), large (squares near 1e30), and one
        # large value among small ones.
        x[0, 0] = torch.nan
        x[1, -1] = torch.inf
        x[2] = 0
        x[3] *= 1e-6
        x[4] *= 1e3 if dtype == torch.float16 else 1e15
        x[5, 3] = 1e4
    return x


def rms_norm(
    generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, special: str = ""
) -> tuple[Any, ...]:
    """Rows of ``shape`` with a weight of mixed signs."""
    x = _rows(generator, shape, dtype, special)
    return x, normal(generator, shape[-1], dtype=dtype), _EPS


def add_rms_norm(
    generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, special: str = ""
) -> tuple[Any, ...]:
    """As `rms_norm`, with a residual stream three times as large as what is added."""
    x = _rows(generator, shape, dtype, special)
    residual = normal(generator, *shape, dtype=dtype, std=3)
    return x, residual, normal(generator, shape[-1], dtype=dtype), _EPS


def silu_mul(
    generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, special: str = ""
) -> tuple[Any, ...]:
    """Gate and up rows; every seventh value saturates the sigmoid."""
    x = _rows(generator, (*shape[:-1], 2 * shape[-1]), dtype, special)
    x[..., ::7] *= 20
    return (x,)


_SHAPES = ((1, 1), (3, 127), (2, 3, 512), (5, 1025), (2, 7168))

for _build in (rms_norm, add_rms_norm, silu_mul):
    _op = _build.__name__
    for _dtype, _name in DTYPE_NAMES.items():
        for _shape in _SHAPES:
            add(_op, f"{_name}-{'x'.join(map(str, _shape))}", _build, shape=_shape, dtype=_dtype)
        for _special in ("strided", "hostile"):
            _label = f"{_name}-{_special}"
            add(_op, _label, _build, shape=(8, 1536), dtype=_dtype, special=_special)
    add(_op, "bf16-no-rows", _build, shape=(0, 512), dtype=torch.bfloat16)
    add(_op, "bf16-many-rows", _build, shape=(4099, 64), dtype=torch.bfloat16,
        work=1 << 21)  # fmt: skip
