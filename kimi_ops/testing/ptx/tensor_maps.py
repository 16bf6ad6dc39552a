"""Tensor maps: what a TMA descriptor says, and which bytes a box of it is.

The 128 bytes of a descriptor are opaque to programs; those here hold the fields in the order of
`_FIELDS`, zero where the field is. Kernels make them from `TensorMap` arguments, or by
``tensormap.replace`` in zeroed memory.

Source: PTX ISA, "Tensors", "tensormap.replace";
CUDA driver API, cuTensorMapEncodeTiled (alignment and ranges).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from kimi_ops.testing.ptx.errors import (
    LaunchError,
    Misaligned,
    MissingFence,
    PtxError,
    UnsupportedPtx,
)
from kimi_ops.testing.ptx.tiles import CHUNK, Box
from kimi_ops.testing.ptx.types import Array

if TYPE_CHECKING:
    from kimi_ops.testing.ptx.binding import Site
    from kimi_ops.testing.ptx.races import SharedRaces

MAP_BYTES = 128
# Field -> (offset, bytes of an element, elements).
_FIELDS = {
    "global_address": (0, 8, 1),
    "global_stride": (8, 8, 4),
    "global_dim": (40, 4, 5),
    "box_dim": (60, 4, 5),
    "element_stride": (80, 4, 5),
    "rank": (100, 1, 1),
    "elemtype": (101, 1, 1),
    "interleave_layout": (102, 1, 1),
    "swizzle_mode": (103, 1, 1),
    "fill_mode": (104, 1, 1),
    "swizzle_atomicity": (105, 1, 1),
}
# Numbers of tensormap.replace -> (type, bytes).
ELEMENT_TYPES = {
    0: ("u8", 1), 1: ("u16", 2), 2: ("u32", 4), 3: ("s32", 4), 4: ("u64", 8), 5: ("s64", 8),
    6: ("f16", 2), 7: ("f32", 4), 9: ("f64", 8), 10: ("bf16", 2), 11: ("tf32", 4),
}  # fmt: skip
_DTYPES = {
    torch.uint8: 0, torch.int8: 0, torch.float8_e4m3fn: 0, torch.float8_e5m2: 0, torch.uint16: 1,
    torch.int16: 1, torch.uint32: 2, torch.int32: 3, torch.uint64: 4, torch.int64: 5,
    torch.float16: 6, torch.float32: 7, torch.float64: 9, torch.bfloat16: 10,
}  # fmt: skip
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_SPANS = {number: span for span, number in SWIZZLES.items()}
# What an element outside the tensor reads as with ``nan_fill``, by size.
_NANS = {2: 0x7FFF, 4: 0x7FFFFFFF, 8: 0x7FFFFFFFFFFFFFFF}


def field_place(field: str, ordinal: int) -> tuple[int, int]:
    """(offset, bytes) of a field of a descriptor.

    Raises:
        UnsupportedPtx: no such field, or no such element of it.
    """
    offset, size, count = _FIELDS.get(field, (0, 0, 0))
    if not 0 <= ordinal < count:
        raise UnsupportedPtx(f"unsupported: element {ordinal} of the tensor map's .{field}")
    return offset + size * ordinal, size


@dataclass(frozen=True)
class TensorMap:
    """A TMA descriptor of a CPU tensor, to pass as a kernel's argument of 128 bytes.

    Attributes:
        tensor: row-major in its last dimension, 1 to 5 dimensions.
        box: [d] sizes of a tile, in the tensor's order of dimensions.
        swizzle: 0, or the span 32, 64 or 128 in bytes; then a row of the box must have as many.
        element_strides: [d] steps between loaded elements; default 1.
        nan_fill: elements outside the tensor read as NaN instead of 0.

    Raises:
        LaunchError: what cuTensorMapEncodeTiled refuses.
    """

    tensor: torch.Tensor
    box: tuple[int, ...]
    swizzle: int = 0
    element_strides: tuple[int, ...] = ()
    nan_fill: bool = False

    def __post_init__(self) -> None:
        if not self.element_strides:
            object.__setattr__(self, "element_strides", (1,) * len(self.box))
        t = self.tensor
        if t.dtype not in _DTYPES or not 1 <= t.dim() <= 5 or len(self.box) != t.dim():
            raise LaunchError(f"tensor map of {t.dtype} {tuple(t.shape)} with box {self.box}")
        if len(self.element_strides) != t.dim() or self.swizzle not in SWIZZLES:
            raise LaunchError(f"swizzle {self.swizzle}, element strides {self.element_strides}")
        if t.stride(-1) != 1:
            raise LaunchError("tensor map of a tensor whose last dimension is not contiguous")
        try:
            self.layout(0).check()
        except PtxError as error:
            raise LaunchError(error.message) from None

    def layout(self, address: int) -> Layout:
        """The descriptor's fields, with the tensor at a global address."""
        t = self.tensor
        strides = tuple(s * t.element_size() for s in reversed(t.stride()))[1:]
        return Layout(
            address,
            tuple(reversed(t.shape)),
            strides,
            tuple(reversed(self.box)),
            tuple(reversed(self.element_strides)),
            _DTYPES[t.dtype],
            SWIZZLES[self.swizzle],
            int(self.nan_fill),
        )


@dataclass(frozen=True)
class Layout:
    """The fields of a descriptor; dimension 0 is the innermost.

    Attributes:
        address: global, of the first element.
        dims, strides: elements of each dimension; bytes between elements of each but the first.
        box, steps: sizes of a tile, and steps between its elements.
        elemtype, swizzle, fill: numbers of tensormap.replace.
        interleave, atomicity: the same; only 0 is supported.
    """

    address: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    steps: tuple[int, ...]
    elemtype: int
    swizzle: int
    fill: int
    interleave: int = 0
    atomicity: int = 0

    @property
    def element_bytes(self) -> int:
        """Of the element type.

        Raises:
            UnsupportedPtx: flushing and sub-byte types.
        """
        if self.elemtype not in ELEMENT_TYPES:
            raise UnsupportedPtx(f"unsupported: tensor map with .elemtype {self.elemtype}")
        return ELEMENT_TYPES[self.elemtype][1]

    @property
    def counts(self) -> tuple[int, ...]:
        """Elements of a tile in each dimension; dimension 0 knows no steps."""
        return (
            self.box[0],
            *(-(-b // s) for b, s in zip(self.box[1:], self.steps[1:], strict=True)),
        )

    @property
    def row_bytes(self) -> int:
        """Of a row of a tile in shared memory."""
        return self.box[0] * self.element_bytes

    def check(self) -> None:
        """What the hardware demands of a descriptor.

        Raises:
            UnsupportedPtx, Misaligned, PtxError: what it breaks.
        """
        row_bytes = self.row_bytes
        for field, value in (("interleave", self.interleave), ("atomicity", self.atomicity)):
            if value:
                raise UnsupportedPtx(f"unsupported: tensor map with .{field} {value}")
        if self.swizzle not in _SPANS or self.fill not in (0, 1):
            raise UnsupportedPtx(
                f"unsupported: tensor map with .swizzle_mode {self.swizzle}, .fill_mode {self.fill}"
            )
        if self.address % CHUNK or any(s % CHUNK for s in self.strides):
            raise Misaligned(
                f"tensor map of address {self.address:#x} with strides {self.strides}: both must "
                "be multiples of 16 bytes"
            )
        fits = (
            all(1 <= n <= 1 << 32 for n in self.dims)
            and all(0 <= s < 1 << 40 for s in self.strides)
            and all(1 <= n <= 256 for n in self.box)
            and all(1 <= n <= 8 for n in self.steps)
        )
        if not fits:
            raise PtxError(
                f"tensor map with sizes {self.dims}, strides {self.strides}, box {self.box}, "
                f"element strides {self.steps}: one is out of its range"
            )
        if row_bytes % CHUNK:
            raise Misaligned(f"tensor map with a box row of {row_bytes} bytes, not 16 n")
        span = _SPANS[self.swizzle]
        if span and row_bytes > span:
            raise PtxError(f"tensor map: {row_bytes} bytes of a box row in a {span}B swizzle")
        if span and row_bytes < span:
            raise UnsupportedPtx(
                f"unsupported: tensor map with a box row of {row_bytes} bytes in a {span}B swizzle"
            )
        if self.fill and ELEMENT_TYPES[self.elemtype][0][0] not in "bft":
            raise PtxError("tensor map of integers that fills with NaN")

    def encode(self) -> bytes:
        """The 128 bytes."""
        data = np.zeros(MAP_BYTES, np.uint8)
        values = {
            "global_address": (self.address,), "global_stride": self.strides,
            "global_dim": tuple(n & 0xFFFFFFFF for n in self.dims), "box_dim": self.box,
            "element_stride": self.steps, "rank": (len(self.dims) - 1,),
            "elemtype": (self.elemtype,), "interleave_layout": (self.interleave,),
            "swizzle_mode": (self.swizzle,), "fill_mode": (self.fill,),
            "swizzle_atomicity": (self.atomicity,),
        }  # fmt: skip
        for field, numbers in values.items():
            for ordinal, number in enumerate(numbers):
                at, size = field_place(field, ordinal)
                data[at : at + size] = np.frombuffer(number.to_bytes(size, "little"), np.uint8)
        return data.tobytes()

    @staticmethod
    def decode(data: bytes) -> Layout:
        """The fields of 128 bytes, checked.

        Raises:
            UnsupportedPtx, Misaligned, PtxError: see `check`.
        """

        def numbers(field: str, count: int) -> tuple[int, ...]:
            places = [field_place(field, i) for i in range(count)]
            return tuple(int.from_bytes(data[at : at + size], "little") for at, size in places)

        rank = data[_FIELDS["rank"][0]] + 1
        if rank > 5:
            raise PtxError(f"tensor map with .rank {rank - 1}; the largest is 4")
        layout = Layout(
            numbers("global_address", 1)[0],
            # 2^32 elements are the one size that does not fit its field.
            tuple(n or 1 << 32 for n in numbers("global_dim", rank)),
            numbers("global_stride", rank - 1),
            numbers("box_dim", rank),
            numbers("element_stride", rank),
            *(numbers(f, 1)[0] for f in ("elemtype", "swizzle_mode", "fill_mode",
                                         "interleave_layout", "swizzle_atomicity")),
        )  # fmt: skip
        layout.check()
        return layout

    def box_at(self, coords: tuple[int, ...]) -> Box:
        """The tile whose first element is at coordinates [rank], which may lie outside."""
        size = self.element_bytes
        strides = (size, *self.strides)
        rows, inside = np.zeros(1, np.int64), np.ones(1, bool)
        for axis in reversed(range(1, len(self.dims))):
            at = coords[axis] + self.steps[axis] * np.arange(self.counts[axis])
            fits = (at >= 0) & (at < self.dims[axis])
            rows = (rows[:, None] + at * strides[axis]).reshape(-1)
            inside = (inside[:, None] & fits).reshape(-1)
        first = max(0, -coords[0])
        last = max(first, min(self.box[0], self.dims[0] - coords[0]))
        start = self.address + coords[0] * size
        pattern = 0 if not self.fill else _NANS[size]
        return Box(rows + start, inside, first * size, last * size, self.row_bytes, size, pattern)

    def swizzled(self, offsets: Array) -> Array:
        """Shared addresses of 16-byte chunks, from those that they would have without a swizzle.

        The pattern is one of address bits: bits 4 up to 6 are xored with bits 7 up to 9.
        """
        mask = {0: 0, 1: 1, 2: 3, 3: 7}[self.swizzle]
        return offsets ^ (((offsets >> 7) & mask) << 4)


class MapFences:
    """Descriptors in memory that a batch has changed, and the fences since, by global address."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets everything, for a new batch."""
        self._fences: dict[int, list[tuple[int, int, int]]] = {}

    def change(self, address: int) -> None:
        """A descriptor has been written."""
        self._fences[address] = []

    def acquire(self, address: int, cta: int, warp: int, races: SharedRaces) -> None:
        """A warp executes ``fence.proxy.tensormap::generic.acquire`` on a descriptor."""
        if address in self._fences:
            clock = races.release(cta, warp)
            self._fences[address].append((cta, warp, int(clock[warp])))
            races.restamp()

    def require(self, site: Site, lane: int, address: int, races: SharedRaces) -> None:
        """A copy by a lane uses a descriptor.

        Raises:
            MissingFence: it was changed, and no fence is ordered before the use.
        """
        fences = self._fences.get(address)
        if fences is None:
            return
        cta, warp = int(races.cta_of[lane]), int(races.warp_of[lane])
        seen = races.clock[cta, warp]
        if not any(at == cta and seen[who] >= time for at, who, time in fences):
            raise site.fail(
                MissingFence,
                f"tensor map at {address:#x} is used without a fence.proxy.tensormap::generic"
                ".acquire after its change",
                lane,
            )
