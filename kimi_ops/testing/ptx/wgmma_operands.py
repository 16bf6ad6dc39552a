"""Operands of `wgmma.mma_async`, read for several warpgroups at once.

With g = lane // 4 and t = lane % 4, and p = 4 / element bytes elements in a register, register r of
an A in registers holds row g + 8 (r % 2), columns p t ... plus 4 p (r // 2), of the 16 rows of its
warp. In shared memory `descriptors` says where elements are.

Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions": "Register
Fragments", "Shared Memory Matrix Layout".
"""

from __future__ import annotations

from functools import cache

import numpy as np

from kimi_ops.testing.ptx import rounding
from kimi_ops.testing.ptx.binding import Binder
from kimi_ops.testing.ptx.descriptors import CHUNK, chunk_addresses, matrix
from kimi_ops.testing.ptx.errors import Divergence, OutOfBounds, PtxError
from kimi_ops.testing.ptx.memory import rows_of
from kimi_ops.testing.ptx.types import BITS, TYPES, WARP, Array, ScalarType
from kimi_ops.testing.ptx.uses import names
from kimi_ops.testing.ptx.wgmma import GROUP

LANES = GROUP * WARP
ROWS = 64
# Along K, whatever the type.
K_BYTES = 32


@cache
def _order_a(size: int) -> Array:
    """Where, in [128, 4 registers, p] elements, element (row, column) of A is, [64 * K]."""
    p = 4 // size
    lane, r, j = np.arange(LANES)[:, None, None], np.arange(4)[:, None], np.arange(p)
    row = lane // WARP * 16 + lane % WARP // 4 + 8 * (r % 2)
    column = lane % 4 * p + j + 4 * p * (r // 2)
    order = np.zeros((ROWS, K_BYTES // size), np.int64)
    order[row, column] = (lane * 4 + r) * p + j
    return order.reshape(-1)


def _values(bits: Array, scalar: ScalarType) -> Array:
    if scalar.kind in "us":
        return bits.view(scalar.dtype).astype(np.float32)
    return rounding.decode(bits.view(scalar.dtype), scalar)


class SharedOperand:
    """A matrix in shared memory: reads it for several warpgroups at once.

    Args:
        operand: of the descriptor.
        rows: along M or N.
    """

    def __init__(self, b: Binder, operand: int, rows: int, scalar: ScalarType, mn: bool) -> None:
        self.b, self.rows, self.scalar, self.mn = b, rows, scalar, mn
        self.name = "AB"[operand - 1]
        self.columns = K_BYTES // scalar.size
        held = b.src(operand, TYPES["b64"])
        self.descriptor = np.broadcast_to(held, (b.machine.lanes,))
        self.size = rows * K_BYTES

    def read(self, lanes: Array) -> tuple[Array, Array]:
        """Of warpgroups [k] all of whose lanes are given: values [k, rows, K], places [k, n].

        Raises:
            Divergence: a descriptor that differs within a warpgroup.
            OutOfBounds: past the end of shared memory.
        """
        shared = self.b.machine.shared
        own = uniform(self.b, f"descriptor of {self.name}", self.descriptor[lanes])
        first = lanes[::LANES]
        address = np.stack(
            [self._chunks(int(bits), int(at)) for bits, at in zip(own, first, strict=True)]
        )
        place = shared.base[first][:, None] + address.reshape(len(own), -1)
        chunks = rows_of(shared.data, 8, 2)[place // CHUNK]
        bits = chunks.view(BITS[self.scalar.size]).reshape(*address.shape, -1)
        values = _values(bits, self.scalar)
        return matrix(values, self.rows, self.columns, transposed=self.mn), place

    def _chunks(self, bits: int, lane: int) -> Array:
        shared = self.b.machine.shared
        try:
            address = chunk_addresses(bits, self.rows, self.columns, self.scalar.size, self.mn)
        except ValueError as wrong:
            raise self.b.site.fail(
                PtxError, f"descriptor {bits:#x} of {self.name}: {wrong}", lane
            ) from None
        end = int(address.max()) + CHUNK
        if end > shared.size:
            raise self.b.site.fail(
                OutOfBounds,
                f"matrix {self.name} ends at shared memory + {end} of {shared.size} bytes",
                lane,
            )
        return address


def uniform(b: Binder, what: str, values: Array) -> Array:
    """Of values [k * 128], the one of each warpgroup.

    Raises:
        Divergence: they differ within one.
    """
    rows = values.reshape(-1, LANES)
    differs = (rows != rows[:, :1]).any(axis=1)
    if differs.any():
        raise b.site.fail(Divergence, f"{what} differs within a warpgroup", int(differs.argmax()))
    own: Array = rows[:, 0]
    return own


class RegisterOperand:
    """A matrix A in registers."""

    def __init__(self, b: Binder, scalar: ScalarType) -> None:
        self.b, self.scalar = b, scalar
        held = b.sources(1, TYPES["b32"])
        if len(held) != 4:
            raise b.unsupported(f"{len(held)} registers of A")
        self.held = [np.broadcast_to(r, (b.machine.lanes,)) for r in held]

    def read(self, lanes: Array) -> tuple[Array, Array | None]:
        """Values [k, 64, K] of warpgroups [k] all of whose lanes are given; no places."""
        bits = np.stack([r[lanes] for r in self.held], axis=1).view(BITS[self.scalar.size])
        values = _values(bits, self.scalar).reshape(len(lanes) // LANES, -1)
        return values[:, _order_a(self.scalar.size)].reshape(len(values), ROWS, -1), None


class KnownRegisters:
    """Which registers of an operation may never have been written, and what is known after it."""

    def __init__(self, b: Binder) -> None:
        self.b = b
        flags = b.machine.flags
        self.d = [(n, flags[n]) for n in names(b.ins.operands[0]) if n in flags]
        self.rest = [
            (n, flags[n]) for operand in b.ins.operands[1:] for n in names(operand) if n in flags
        ]

    def require(self, lanes: Array, add: Array) -> None:
        """A, the descriptors and the predicate must be known, and D where it is added to."""
        machine, index = self.b.machine, self.b.site.index
        for flags, at in ((self.rest, lanes), (self.d, lanes[add])):
            for name, flag in flags:
                mask = np.zeros(machine.lanes, bool)
                mask[at] = True
                machine.require(flag, mask, name, index)
        for _, flag in self.d:
            flag[lanes] = True
