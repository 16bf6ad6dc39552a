"""Global memory as a kernel sees it: tensors far apart, each address known by where it came from.

No pointer of a kernel is a real one. Each tensor argument lies alone in the middle of 16 TiB of
addresses, so whatever offset a kernel computes, in 64 bits or wrapped in 32, the address still says
which tensor it was meant for, and cannot land in another one by accident. Real addresses (a table
of ``data_ptr()``) are looked up among the tensors that are alive.
"""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from kimi_ops.testing.triton_interpreter.races import Shadow

Array = np.ndarray[Any, Any]

_VIRTUAL = 1 << 62
_REGION_BITS = 44
_PAGE = 4096

# Quiet NaNs with a payload that torch itself never writes, so that poison is told from data; other
# types get the byte 0x5A repeated. A bool must stay a bool, and fp8 has a single NaN.
_POISON = {
    torch.float64: (0x7FF8_5A5A_5A5A_5A5A).to_bytes(8, "little"),
    torch.float32: (0x7FDA_5A5A).to_bytes(4, "little"),
    torch.bfloat16: (0x7FDA).to_bytes(2, "little"),
    torch.float16: (0x7F5A).to_bytes(2, "little"),
    torch.float8_e4m3fn: b"\x7f",
    torch.float8_e5m2: b"\x7e",
    torch.bool: b"\x01",
}


def describe(tensor: Tensor) -> str:
    """Shape and dtype for a message, as in ``[4, 64] bfloat16``."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has a storage on the CPU."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
    )


def _bytes_at(address: int, nbytes: int) -> Array:
    """Memory as a writable uint8 array that does not keep its storage alive."""
    if nbytes == 0:
        return np.zeros(0, np.uint8)
    memory = (ctypes.c_uint8 * nbytes).from_address(address)
    return np.frombuffer(memoryview(memory), np.uint8)


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    span = sum(st * (n - 1) for st, n in zip(tensor.stride(), tensor.shape, strict=True)) + 1
    return span * tensor.element_size()


class Buffer:
    """One storage: its bytes, who used them, and which of them nobody has written yet.

    Attributes:
        raw: the bytes.
        shadow: the last uses.
        initialised: per byte, or None where all of them count as written.
    """

    def __init__(self, storage: torch.UntypedStorage, granule: int) -> None:
        self._alive = StorageWeakRef(storage)
        self.address = storage.data_ptr()
        self.raw = _bytes_at(storage.data_ptr(), storage.nbytes())
        self.shadow = Shadow(self.raw.size, granule)
        self.initialised: Array | None = None
        self._declared: list[tuple[int, int, Array]] = []

    def expired(self) -> bool:
        """Whether torch has given this memory back, resized it or moved it."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self._alive.cdata)
        return storage is None or (storage.data_ptr(), storage.nbytes()) != (
            self.address,
            self.raw.size,
        )

    def declare_uninitialised(self, tensor: Tensor) -> None:
        """Counts the bytes of a tensor as never written, and fills them with poison."""
        start = int(tensor.storage_offset()) * tensor.element_size()
        stop = start + _extent(tensor)
        if self.initialised is None:
            self.initialised = np.ones(self.raw.size, np.bool_)
        pattern = np.frombuffer(_POISON.get(tensor.dtype, b"\x5a"), np.uint8)
        self.raw[start:stop].reshape(-1, pattern.size)[:] = pattern
        self.initialised[start:stop] = False
        self._declared.append((start, stop, pattern))

    def unwritten(self, tensor: Tensor) -> int:
        """Bytes of a tensor, from its first element to its last, that nobody has written."""
        if self.initialised is None:
            return 0
        self.notice_writes_of_torch()
        start = tensor.storage_offset() * tensor.element_size()
        return int((~self.initialised[start : start + _extent(tensor)]).sum())

    def notice_writes_of_torch(self) -> None:
        """Counts as written what is no longer poison: torch wrote it since the last launch."""
        if self.initialised is not None:
            for start, stop, pattern in self._declared:
                written = self.raw[start:stop].reshape(-1, pattern.size) != pattern
                self.initialised[start:stop] |= written.any(1).repeat(pattern.size)


@dataclass
class Region:
    """The addresses through which a kernel may reach one tensor.

    Attributes:
        base: address of the tensor's first element.
        buffer: its storage.
        start: byte offset of that element in the storage.
        low, high: the valid bytes are ``[base + low, base + high)``.
        steps: (stride in bytes, size) of each dimension, widest first, where not every byte
            between them belongs to the tensor; None where every one does.
        element: bytes of one element.
        label: for messages.
        view: whether the tensor is only a part of its storage.
    """

    base: int
    buffer: Buffer
    start: int
    low: int
    high: int
    steps: tuple[tuple[int, int], ...] | None
    element: int
    label: str
    view: bool

    def valid(self, offsets: Array, size: int) -> Array:
        """Mask of the accesses of `size` bytes, at byte `offsets`, that stay in the tensor."""
        inside = (offsets >= self.low) & (offsets + size <= self.high)
        if self.steps is not None and inside.any():
            inside &= self._in_element(offsets) & self._in_element(offsets + (size - 1))
        return inside

    def _in_element(self, offsets: Array) -> Array:
        rest, inside = offsets, np.ones(offsets.shape, np.bool_)
        for stride, size in self.steps or ():
            index = rest // stride
            inside &= index < size
            rest = rest - index * stride
        return inside & (rest < self.element)

    def say(self, offset: int) -> str:
        """Where a bad byte offset lies with respect to the tensor."""
        if self.high == self.low:
            where = "an address in"
        elif offset < self.low:
            where = f"{self.low - offset} bytes before the start of"
        elif offset >= self.high:
            where = f"{offset - self.high} bytes past the end of"
        else:
            where = f"byte {offset} lies between the rows, or across the end, of"
        hint = ""
        if self.view and 0 <= self.start + offset < self.buffer.raw.size:
            hint = " (inside its storage; bounds='storage' allows that)"
        return f"{where} {self.label}{hint}"


def _steps(tensor: Tensor) -> tuple[tuple[int, int], ...] | None:
    """Strides and sizes of a tensor with gaps; None if dense, or if its rows interleave."""
    size = tensor.element_size()
    dims = sorted(
        ((st * size, n) for st, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1),
        reverse=True,
    )
    inner = size
    for stride, n in reversed(dims):
        if stride < inner:
            return None
        inner = stride * (n - 1) + inner
    return None if inner == tensor.numel() * size else tuple(dims)


class AddressSpace:
    """All tensors that the kernels of one block of launches have met.

    Args:
        bounds: "tensor" for the elements of the argument itself, "storage" for everything in the
            storage behind it.
    """

    def __init__(self, bounds: str) -> None:
        self._bounds = bounds
        self._buffers: dict[int, Buffer] = {}
        self._regions: list[Region] = []
        self._real: list[Region] = []
        self._handed_out: dict[int, tuple[StorageWeakRef, int, str]] = {}

    def begin_launch(self) -> None:
        """Forgets the arguments of the launch before, and storages that are gone."""
        self._regions = []
        self._real = []
        self._buffers = {k: b for k, b in self._buffers.items() if not b.expired()}
        for buffer in self._buffers.values():
            buffer.notice_writes_of_torch()

    def buffer(self, tensor: Tensor) -> Buffer:
        """The buffer of a tensor's storage."""
        storage = tensor.untyped_storage()
        found = self._buffers.get(storage._cdata)
        if found is None or found.expired():
            found = Buffer(storage, tensor.element_size())
            self._buffers[storage._cdata] = found
        return found

    def argument(self, name: str, tensor: Tensor) -> int:
        """Gives a tensor argument its place, and returns the address of its first element."""
        # The low bits are the real ones, so that alignment is what the GPU would see.
        base = _VIRTUAL | len(self._regions) << _REGION_BITS | 1 << (_REGION_BITS - 1)
        base |= tensor.data_ptr() % _PAGE
        self._regions.append(self._region(base, tensor, f"{name} {describe(tensor)}"))
        return base

    def _region(self, base: int, tensor: Tensor, label: str, whole: bool = False) -> Region:
        buffer = self.buffer(tensor)
        size = tensor.element_size()
        start = int(tensor.storage_offset()) * size
        extent = _extent(tensor)
        low, high, steps = 0, extent, _steps(tensor) if tensor.numel() else None
        view = extent < buffer.raw.size or steps is not None
        if self._bounds == "storage" or whole:
            low, high, steps, view = -start, buffer.raw.size - start, None, False
        # resize_(0) frees a storage under a tensor that still has its shape.
        high = min(high, buffer.raw.size - start)
        return Region(base, buffer, start, low, max(high, low), steps, size, label, view)

    def hand_out(self, tensor: Tensor) -> None:
        """Remembers that the program has this tensor's real address as an integer."""
        storage = tensor.untyped_storage()
        entry = StorageWeakRef(storage), storage.nbytes(), describe(tensor)
        self._handed_out[storage.data_ptr()] = entry

    def find(self, address: int) -> Region | None:
        """The region that an address was computed from, valid or not."""
        if address & _VIRTUAL:
            index = (address & ~_VIRTUAL) >> _REGION_BITS
            return self._regions[index] if index < len(self._regions) else None
        for region in self._real:
            if region.base + region.low <= address < region.base + region.high:
                return region
        # Only tables of pointers come here, so the walk over all objects is rare.
        for candidate in gc.get_objects():
            # By type(): isinstance() would make lazy objects and dead proxies answer.
            if issubclass(type(candidate), Tensor) and is_plain(candidate):
                storage = candidate.untyped_storage()
                start = storage.data_ptr()
                if start <= address < start + storage.nbytes():
                    label = f"the storage of a tensor {describe(candidate)}"
                    base = start + candidate.storage_offset() * candidate.element_size()
                    region = self._region(base, candidate, label, whole=True)
                    self._real.append(region)
                    return region
        return None

    def freed(self, address: int) -> str | None:
        """What lay at a real address while it was alive, if the program once held it."""
        for start, (alive, nbytes, label) in self._handed_out.items():
            if start <= address < start + nbytes and alive.expired():
                return label
        return None

    def nearest(self, address: int) -> str:
        """The argument nearest to an address that belongs to none."""

        def distance(region: Region) -> int:
            first = region.buffer.address + region.start
            return max(first - address, address - first - region.high, 0)

        if not self._regions:
            return "the launch has no tensor"
        region = min(self._regions, key=distance)
        return f"nearest is {region.label}, {distance(region)} bytes away"
