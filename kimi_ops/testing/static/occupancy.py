"""How many blocks of a kernel are resident on one SM, and what keeps the next one out.

The rules are those of ``cuda_occupancy.h`` (CUDA 13.0): registers are given to warps in units, out
of the file of their partition; shared memory is given to blocks in units, with 1 KiB per block on
top. On AMD the same rules hold with that device's units.
"""

from __future__ import annotations

from dataclasses import dataclass

from kimi_ops.testing.devices import Device


@dataclass(frozen=True)
class Occupancy:
    """Residents of one SM (AMD: compute unit) at best, before the grid's size is considered.

    Attributes:
        blocks: resident blocks; 0 means that the kernel cannot be launched.
        warps: resident warps (AMD: waves).
        warps_limit: the most the device holds.
        limited_by: ``registers``, ``shared memory``, ``tensor memory``, ``warps``, ``blocks``, or
            several joined by ``+``.
    """

    blocks: int
    warps: int
    warps_limit: int
    limited_by: str

    @property
    def fraction(self) -> float:
        """Resident warps over the most the device holds."""
        return self.warps / self.warps_limit


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(
    device: Device,
    *,
    threads_per_block: int,
    registers: int,
    shared_bytes: int,
    tensor_memory_columns: int = 0,
) -> Occupancy:
    """Blocks and warps per SM of a kernel.

    Args:
        device: limits.
        threads_per_block: of the launch.
        registers: per thread (AMD: VGPRs and AGPRs together).
        shared_bytes: per block, static and dynamic, without what the device reserves.
        tensor_memory_columns: what a block allocates of the tensor memory.

    Raises:
        ValueError: no threads, or more than a block can have.
    """
    if not 0 < threads_per_block <= device.threads_per_block:
        raise ValueError(
            f"{threads_per_block} threads per block on {device.arch}: "
            f"must be 1 to {device.threads_per_block}"
        )
    warps = -(-threads_per_block // device.warp_size)
    limits = {"warps": device.warps_per_sm // warps, "blocks": device.blocks_per_sm}
    if warps == 1 and device.capability is None:
        # A work group of one wave needs no barrier, and barriers are what the limit is about.
        limits["blocks"] = device.warps_per_sm
    if registers:
        per_warp = _round_up(registers, device.register_unit) * device.warp_size
        per_partition = device.registers_per_sm // device.partitions // per_warp
        limits["registers"] = per_partition * device.partitions // warps
        if registers > device.registers_per_thread:
            limits["registers"] = 0
    used = _round_up(shared_bytes + device.shared_reserved_bytes, device.shared_unit_bytes)
    if shared_bytes > device.shared_per_block_bytes:
        limits["shared memory"] = 0
    elif used:
        limits["shared memory"] = device.shared_per_sm_bytes // used
    if tensor_memory_columns:
        limits["tensor memory"] = device.tensor_memory_columns // tensor_memory_columns
    blocks = min(limits.values())
    limited_by = "+".join(sorted(name for name, limit in limits.items() if limit == blocks))
    return Occupancy(blocks, blocks * warps, device.warps_per_sm, limited_by)
