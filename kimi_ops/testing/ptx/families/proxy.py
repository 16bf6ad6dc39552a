"""Fences between proxies, and descriptors that a kernel makes itself.

Source: PTX ISA, "Parallel Synchronization and Communication Instructions",
"Data Movement and Conversion Instructions".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kimi_ops.testing.ptx.binding import Active, Binder, Step
from kimi_ops.testing.ptx.errors import Misaligned
from kimi_ops.testing.ptx.families.data import Spaces
from kimi_ops.testing.ptx.memory import SHARED_WINDOW, WINDOW_BYTES
from kimi_ops.testing.ptx.registry import instruction
from kimi_ops.testing.ptx.syntax import Immediate
from kimi_ops.testing.ptx.tensor_maps import MAP_BYTES, field_place
from kimi_ops.testing.ptx.types import Array

_FIELDS = (
    "global_address rank box_dim global_dim global_stride element_stride elemtype "
    "interleave_layout swizzle_mode swizzle_atomicity fill_mode"
)
_SINGLE = {
    "global_address", "rank", "elemtype", "interleave_layout", "swizzle_mode",
    "swizzle_atomicity", "fill_mode",
}  # fmt: skip


@instruction(
    "fence.proxy.async",
    family="barrier",
    section="Parallel Synchronization and Communication Instructions: membar, fence",
    modifiers="global shared::cta shared::cluster",
    results=0,
)
def fence_async(b: Binder) -> Step:
    """Makes what the generic proxy did known to the async proxy; only shared memory is tracked."""
    if "global" in b.mods:
        return lambda active: None
    return lambda active: b.machine.shared.races.fence_proxy(active.warps)


@instruction(
    "fence.proxy.alias",
    family="barrier",
    section="Parallel Synchronization and Communication Instructions: membar, fence",
    results=0,
)
def fence_alias(b: Binder) -> Step:
    """Orders accesses through aliases: one address has one name here, so it has no effect."""
    return lambda active: None


@instruction(
    "fence.mbarrier_init",
    family="barrier",
    section="Parallel Synchronization and Communication Instructions: membar, fence",
    modifiers="release cluster",
    results=0,
)
def fence_mbarrier_init(b: Binder) -> Step:
    """Makes the thread's mbarrier.init known to the async proxy, and with a barrier to all."""
    return lambda active: b.machine.async_units.mbarriers.publish(active.warps)


@instruction(
    "fence.proxy.tensormap::generic",
    family="barrier",
    section="Parallel Synchronization and Communication Instructions: membar, fence",
    modifiers="acquire release cta cluster gpu sys",
    results=0,
)
def fence_tensormap(b: Binder) -> Step:
    """Makes a changed descriptor known to copies; ``.acquire`` is what a use waits for."""
    if "release" in b.mods:
        return lambda active: None
    addresses = b.address(0)
    if b.integer(1) != MAP_BYTES:
        raise b.unsupported(f"size {b.integer(1)}")
    machine = b.machine

    def step(active: Active) -> None:
        lanes = active.lanes
        pairs = np.unique(np.stack([lanes // 32, addresses(active)]), axis=1)
        for warp, address in pairs.T.tolist():
            cta, own = divmod(warp, machine.warps)
            machine.async_units.maps.acquire(address, cta, own, machine.shared.races)

    return step


@dataclass
class _Bytes:
    """Reads and writes of descriptors in memory, 4 bytes at a time."""

    spaces: Spaces

    def read(self, lanes: Array, address: Array) -> Array:
        """[k] numbers of 4 bytes."""
        values: Array = self.spaces.read(lanes, address, 4, 1)[:, 0]
        return values

    def write(self, lanes: Array, address: Array, values: Array) -> None:
        """[k] numbers of 4 bytes."""
        self.spaces.write(lanes, address, values.astype(np.uint32)[:, None])


def _require_map(b: Binder, lanes: Array, address: Array) -> None:
    wrong = address % 64 != 0
    if wrong.any():
        at = int(wrong.argmax())
        raise b.site.fail(
            Misaligned, f"tensor map at {int(address[at]):#x}, not a multiple of 64", lanes[at]
        )


@instruction(
    "tensormap.replace.tile",
    family="memory",
    section="Data Movement and Conversion Instructions: tensormap.replace",
    types="b32 b64",
    modifiers=f"{_FIELDS} global shared::cta b1024",
    results=0,
)
def replace(b: Binder) -> Step:
    """Replaces one field of a descriptor."""
    (field,) = b.mods & set(_FIELDS.split())
    single = field in _SINGLE
    at, size = field_place(field, 0 if single else b.integer(1))
    value = b.src(1 if single else 2, b.type)
    if isinstance(b.ins.operands[1], Immediate) and single and size == 1 and value > 15:
        raise b.unsupported(f"value {value} of .{field}")
    addresses, spaces = b.address(0), Spaces(b)
    words = _Bytes(spaces)
    maps = b.machine.async_units.maps

    def step(active: Active) -> None:
        lanes, start = active.lanes, addresses(active)
        _require_map(b, lanes, start)
        new = np.broadcast_to(value, active.mask.shape)[lanes].astype(np.uint64)
        place = start + at
        if size == 1:
            shift = at % 4 * 8
            word = words.read(lanes, place - at % 4)
            new = (word & np.uint32(~(0xFF << shift) & 0xFFFFFFFF)) | (
                (new.astype(np.uint32) & np.uint32(0xFF)) << np.uint32(shift)
            )
            words.write(lanes, place - at % 4, new)
        else:
            for part in range(size // 4):
                words.write(lanes, place + 4 * part, (new >> np.uint64(32 * part)) & 0xFFFFFFFF)
        if "global" in b.mods:
            for address in np.unique(start).tolist():
                maps.change(address)

    return step


@instruction(
    "tensormap.cp_fenceproxy",
    family="memory",
    section="Parallel Synchronization and Communication Instructions: tensormap.cp_fenceproxy",
    modifiers="global shared::cta tensormap::generic release cta cluster gpu sys sync aligned",
    results=0,
)
def copy_fenced(b: Binder) -> Step:
    """Copies a descriptor from shared to global memory, for a fence at its user to acquire."""
    to, source = b.address(0), b.address(1)
    if b.integer(2) != MAP_BYTES:
        raise b.unsupported(f"size {b.integer(2)}")
    machine = b.machine
    shared, memory, maps = machine.shared, machine.launch.memory, machine.async_units.maps

    def step(active: Active) -> None:
        full = np.where(active.bits != 0, np.uint32(0xFFFFFFFF), np.uint32(0))
        machine.converged(active, full, "divergent tensormap.cp_fenceproxy")
        lanes, target, start = active.lanes, to(active), source(active)
        start = np.where(start >= SHARED_WINDOW, start % WINDOW_BYTES, start)
        _require_map(b, lanes, start)
        _require_map(b, lanes, target)
        # The 32 lanes of a warp share the work: 4 bytes each.
        part = 4 * (lanes % 32)
        data = shared.read(b.site, lanes, start + part, 4, 1)
        memory.write(b.site, lanes, target + part, data)
        for address in np.unique(target).tolist():
            maps.change(address)

    return step
