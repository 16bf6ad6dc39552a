"""What the device can do at best, measured in the same run: read, copy, and matrix products.

Each ceiling is a probe, timed in turn with the contestants of a case, so that its rate is the one
that the machine had during those very rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kimi_ops.bench.case import Work
from kimi_ops.bench.clock import Clock

_BUFFER = {"cpu": 1 << 30, "cuda": 4 << 30}  # bytes, far beyond any cache
_SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices of a product
# Where so little is written, reading alone is the limit.
_READS = 1 / 8
# Beyond this the C library returns memory to the system, which hands out new pages at each call.
_NEW_MEMORY = 32 << 20


@dataclass(frozen=True)
class Probe:
    """One ceiling.

    Attributes:
        name: "read", "copy", "clone" (a copy into new memory, as a large result of an op on a CPU
            is), "bfloat16 product".
        amount: bytes or operations of one call.
        call: makes it; the number says which of the rotation.
    """

    name: str
    amount: float
    call: Callable[[int], object]


@dataclass
class Ceilings:
    """The probes of a device, made when first wanted.

    Attributes:
        device: theirs.
        clock: of the device.
        rates: of each probe, bytes or operations per second, as first measured.
    """

    device: torch.device
    clock: Clock
    rates: dict[str, float] = field(default_factory=dict)
    _probes: dict[str, Probe] = field(default_factory=dict)
    _buffer: Tensor | None = None

    def probe(self, name: str) -> Probe:
        """The probe of this name; measures its rate when it is new."""
        if name not in self._probes:
            made = self._product(name) if name.endswith("product") else self._memory(name)
            self._probes[name] = made
            sample = self.clock.sampler(made.call, 1).sample
            self.rates[name] = made.amount / sorted(sample() for _ in range(5))[2]
        return self._probes[name]

    def binding(self, work: Work, *, new_memory: bool) -> tuple[Probe, float]:
        """The probe that binds a floor, and the bytes or operations of the floor in its unit.

        Args:
            work: the floor.
            new_memory: what is written are new tensors.
        """
        name = "read" if work.written <= _READS * work.read else "copy"
        if name == "copy" and new_memory and work.written > _NEW_MEMORY:
            name = "clone" if self.device.type == "cpu" else "copy"
        memory = self.probe(name)
        if not work.flops:
            return memory, work.bytes
        product = self.probe(f"{str(work.dtype).removeprefix('torch.')} product")
        memory_s = work.bytes / self.rates[memory.name]
        product_s = work.flops / self.rates[product.name]
        return (memory, work.bytes) if memory_s > product_s else (product, work.flops)

    def _memory(self, name: str) -> Probe:
        if self._buffer is None:
            words = _BUFFER[self.device.type] // 8
            self._buffer = torch.ones(words, dtype=torch.int64, device=self.device)
        buffer, half = self._buffer, len(self._buffer) // 2
        size = buffer.numel() * 8
        if name == "read":
            return Probe(name, size, lambda _: buffer.sum())
        if name == "clone":
            return Probe(name, size, lambda _: buffer[half:].clone())
        return Probe(name, size, lambda _: buffer[:half].copy_(buffer[half:]))

    def _product(self, name: str) -> Probe:
        side = _SIDE[self.device.type]
        dtype = getattr(torch, name.split()[0])
        a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
        return Probe(name, 2.0 * side**3, lambda _: a @ b)
