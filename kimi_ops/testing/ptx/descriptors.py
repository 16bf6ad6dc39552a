"""Matrices of `wgmma` in shared memory: the 64-bit descriptor, and where it says elements are.

Everything is laid out in chunks of 16 bytes, each of consecutive elements along the major
dimension: K for K-major matrices, M or N for MN-major ones (transposed, 16-bit types only). With W
the span of the swizzle in bytes (16 for none), "leading" and "stride" the two offsets of the
descriptor, and i along M or N, the chunk of

- K-major: row i and K bytes 16 c ... is at (i // 8) stride + (i % 8) W, plus 16 c (without a
  swizzle plus c leading);
- MN-major, swizzled: elements i = 8 m ... and k is at (m // (W/16)) leading + (m % (W/16)) 16
  + (k // 8) stride + (k % 8) W;
- MN-major, no swizzle: at m stride + (k // 8) leading + (k % 8) 16.

A swizzle then exchanges chunks: it XORs bits 4.. of the address with bits 7.., one bit for 32
bytes, two for 64, three for 128. As the address in shared memory counts, a start inside the pattern
(a step along K) stays right; a pattern that itself starts off its boundary of 8 W bytes says so in
the base offset.

Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Operation using
wgmma.mma_async": "Shared Memory Matrix Layout", "Strides", "Matrix Descriptor Format".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from kimi_ops.testing.ptx.types import Array

CHUNK = 16
# Bits that belong to no field.
_RESERVED = (0b11 << 14) | (0b11 << 30) | (0b111 << 46) | (0x3FF << 52)
_SPANS = (16, 128, 64, 32)


@dataclass(frozen=True)
class Descriptor:
    """A matrix in shared memory.

    Attributes:
        start: address of its first chunk, bytes.
        leading, stride: offsets, bytes.
        base: base offset, 0 to 7, in units of 128 bytes.
        span: of the swizzle, bytes: 32, 64, 128, or 16 for none.
    """

    start: int
    leading: int
    stride: int
    base: int
    span: int


def decode(bits: int) -> Descriptor:
    """A descriptor from its 64 bits.

    Raises:
        ValueError: bits set that belong to no field.
    """
    if bits & _RESERVED:
        raise ValueError(f"bits {bits & _RESERVED:#x} belong to no field")

    def field(low: int) -> int:
        return (bits >> low & 0x3FFF) << 4

    return Descriptor(field(0), field(16), field(32), bits >> 49 & 7, _SPANS[bits >> 62 & 3])


@lru_cache(maxsize=4096)
def chunk_addresses(bits: int, rows: int, columns: int, size: int, transposed: bool) -> Array:
    """Addresses in shared memory, int64, of the chunks of a matrix; not to be changed.

    Args:
        bits: the descriptor.
        rows, columns: along M or N, and along K, in elements.
        size: bytes per element.
        transposed: MN-major.

    Returns:
        [rows, columns size / 16] for K-major, [columns, rows size / 16] for MN-major.

    Raises:
        ValueError: as `decode`.
    """
    d = decode(bits)
    if transposed:
        k, m = np.arange(columns)[:, None], np.arange(rows * size // CHUNK)[None]
        if d.span == CHUNK:
            offset = m * d.stride + k // 8 * d.leading + k % 8 * CHUNK
        else:
            wide = d.span // CHUNK
            offset = m // wide * d.leading + m % wide * CHUNK + k // 8 * d.stride + k % 8 * d.span
    else:
        i, c = np.arange(rows)[:, None], np.arange(columns * size // CHUNK)[None]
        across = d.leading if d.span == CHUNK else CHUNK
        offset = i // 8 * d.stride + i % 8 * d.span + c * across
    address = d.start + offset
    exchanged = ((address >> 7) - d.base) & (d.span // CHUNK - 1)
    address ^= exchanged << 4
    address.flags.writeable = False
    return address


def matrix(chunks: Array, rows: int, columns: int, *, transposed: bool) -> Array:
    """Element bits [..., rows, columns] of chunks [..., as `chunk_addresses`, elements]."""
    if transposed:
        flat: Array = chunks.reshape(*chunks.shape[:-3], columns, rows)
        flat = flat.swapaxes(-1, -2)
    else:
        flat = chunks.reshape(*chunks.shape[:-3], rows, columns)
    return flat
