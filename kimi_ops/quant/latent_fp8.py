"""The fp8 format of the latent cache: e4m3 codes, one float32 scale a token, bfloat16 rope values.

One token is a row of C + 16 + 2 R bytes, 656 for Kimi K2.5's C = 512 and R = 64 (1,152 in bf16)::

    byte   0                      512        516   520   524   528                     656
           | c0 c1 c2 ...    c511 |  scale | scale scale scale | r0  r1  r2  ...   r63 |
           | float8_e4m3fn        | float32| the same, 3 times | bfloat16              |
             latent[i] = c[i] * scale        not read            the rotated key values

Everything is little endian. Where C is a multiple of 16 and R of 8 every part and every token
starts on 16 bytes, so that a page can be read with the widest loads.

The rope values are not quantised: they carry the position, and are an eighth of the token. They are
bfloat16 whatever the dtype of the activations is, so a cache can be read without knowing it. The
scale stands there four times so that kernels which keep one scale per 128 values in these 16 bytes
can read the same pages (docs/decisions/0005-fp8-cache-format.md).

A row with a latent that is not finite has NaN as its scale and 0x7F, NaN, as every code. Readers
may go by either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops.reference._latent_fp8 import LARGEST, SCALE_BYTES, SMALLEST_SCALE
from kimi_ops.reference._latent_fp8 import pack as _pack
from kimi_ops.reference._latent_fp8 import unpack as _unpack

__all__ = ["LARGEST", "SCALE_BYTES", "SMALLEST_SCALE", "entry_bytes", "pack", "unpack"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def entry_bytes(kv_lora_rank: int, rope: int) -> int:
    """Bytes of one token: C codes, 16 of scale, 2 R of rope values."""
    return kv_lora_rank + SCALE_BYTES + 2 * rope


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def pack(entry: Tensor, kv_lora_rank: int) -> Tensor:
    """Quantises cache entries: ``scale = max(max|latent| / 448, 2^-126)``, ties to even.

    Args:
        entry: ``[..., C+R]`` bfloat16, float16, float32 or float64, latent first.
        kv_lora_rank: C, at least 1.

    Returns:
        ``[..., C+16+2R]`` uint8.

    Raises:
        ValueError: no C values in a row.
        TypeError: ``entry`` is no float tensor.
    """
    if entry.dtype not in _FLOATS:
        raise TypeError(f"latent_fp8: entry must be a float tensor, got {_name(entry.dtype)}")
    if entry.dim() < 1 or not 0 < kv_lora_rank <= entry.shape[-1]:
        raise ValueError(
            f"latent_fp8: entry must be [..., C+R] with C = {kv_lora_rank} of at least 1, "
            f"got {list(entry.shape)}"
        )
    return _pack(entry, kv_lora_rank)


def unpack(cache: Tensor, kv_lora_rank: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The entries ``[..., C+R]`` in ``dtype``, each product rounded once from float32.

    Args:
        cache: ``[..., C+16+2R]`` uint8.
        kv_lora_rank: C, at least 1.
        dtype: bfloat16, float16, float32 or float64, in which nothing is rounded.

    Raises:
        ValueError: rows that hold no C codes, a scale and whole rope values.
        TypeError: another dtype than stated.
    """
    if cache.dtype != torch.uint8 or dtype not in _FLOATS:
        raise TypeError(
            f"latent_fp8: cache must be uint8 and dtype a float one, got {_name(cache.dtype)} "
            f"and {_name(dtype)}"
        )
    rope = cache.shape[-1] - kv_lora_rank - SCALE_BYTES if cache.dim() else -1
    if kv_lora_rank < 1 or rope < 0 or rope % 2:
        raise ValueError(
            f"latent_fp8: cache must be [..., C+16+2*R] with C = {kv_lora_rank} of at least 1, "
            f"got {list(cache.shape)}"
        )
    return _unpack(cache, kv_lora_rank, dtype)
