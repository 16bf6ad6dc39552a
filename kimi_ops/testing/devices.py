"""Published limits of the GPUs that kernels are compiled for: one row per architecture.

Sources, as numbers in the margin: [1] CUDA C++ Programming Guide 13.0, "Compute Capabilities",
table "Technical Specifications per Compute Capability"; [2] ``cuda_occupancy.h`` of CUDA 13.0
(allocation units, register files per SM); [3] PTX ISA, "Tensor Memory";
[4] AMD Instinct MI300 (CDNA3) Instruction Set Architecture guide; [5] LLVM "User Guide for AMDGPU
Backend", gfx942.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Device:
    """Limits of one architecture; an SM of NVIDIA's is a compute unit of AMD's, a warp a wave.

    Attributes:
        arch: name for the compilers: ``sm_90a``, ``gfx942``.
        capability: NVIDIA's compute capability times ten, or None.
        example: a product.
        shared_per_block_bytes: largest shared memory of one block, after opting in where needed.
        shared_per_sm_bytes: shared memory of one SM at the largest carve-out.
        shared_reserved_bytes: what each block uses of the SM's on top of its own.
        shared_unit_bytes: a block's shared memory is rounded up to a multiple of this.
        registers_per_sm: 32-bit registers of one SM (AMD: vector registers of one lane, times 64
            lanes and 4 SIMDs).
        registers_per_thread: most that one thread may use.
        register_unit: registers per thread are rounded up to a multiple of this.
        partitions: parts of an SM (AMD: SIMDs), each with its own share of registers and warps.
        warp_size: threads.
        warps_per_sm, blocks_per_sm, threads_per_block: most that are resident or launched.
        tensor_memory_columns: of the SM's tensor memory; 0 where there is none.
    """

    arch: str
    capability: int | None
    example: str
    shared_per_block_bytes: int  # [1]; AMD [4]
    shared_per_sm_bytes: int  # [1]; AMD [4]
    warps_per_sm: int  # [1]; AMD [5]: 8 waves on each of 4 SIMDs
    blocks_per_sm: int  # [1]; AMD: 16 barriers, so 16 work groups of more than one wave
    tensor_memory_columns: int = 0  # [3]
    shared_reserved_bytes: int = 1 * KIB  # [1]
    shared_unit_bytes: int = 128  # [2]; AMD [5]
    registers_per_sm: int = 64 * KIB  # [1]; AMD [4]
    registers_per_thread: int = 255  # [1]; AMD [4]: 256 VGPRs and 256 AGPRs
    register_unit: int = 8  # [2]: 256 per warp of 32 lanes; AMD [5]
    partitions: int = 4  # [2]; AMD [4]
    warp_size: int = 32
    threads_per_block: int = 1024


DEVICES = {
    device.arch: device
    for device in (
        Device("sm_80", 80, "A100", 163 * KIB, 164 * KIB, 64, 32),
        Device("sm_86", 86, "A10, RTX 3090", 99 * KIB, 100 * KIB, 48, 16),
        Device("sm_89", 89, "L4, L40S, RTX 4090", 99 * KIB, 100 * KIB, 48, 24),
        Device("sm_90a", 90, "H100, H200", 227 * KIB, 228 * KIB, 64, 32),
        Device("sm_100a", 100, "B200", 227 * KIB, 228 * KIB, 64, 32, tensor_memory_columns=512),
        # CUDA's Blackwell Tuning Guide gives this one 32 blocks and 128 KiB, against [1] and [2].
        Device("sm_120", 120, "RTX 5090, RTX PRO 6000", 99 * KIB, 100 * KIB, 48, 24),
        Device(
            "gfx942",
            None,
            "MI300X",
            64 * KIB,
            64 * KIB,
            32,
            16,
            shared_reserved_bytes=0,
            shared_unit_bytes=512,
            registers_per_sm=512 * 64 * 4,
            registers_per_thread=512,
            warp_size=64,
        ),
    )
}
ARCHES = tuple(DEVICES)

# Names in use for the same thing: without the suffix of the instructions that only one chip has.
_ALIASES = {"sm_90": "sm_90a", "sm_100": "sm_100a", "sm_120a": "sm_120"}


def device(arch: str | int) -> Device:
    """The limits of an architecture.

    Args:
        arch: ``sm_90a``, ``sm_90``, ``90``, ``90a``, the number 90, or ``gfx942``.

    Raises:
        ValueError: an architecture that is not in the table.
    """
    name = str(arch)
    name = f"sm_{name}" if name[:1].isdigit() else name
    name = _ALIASES.get(name, name)
    if name not in DEVICES:
        raise ValueError(f"unknown architecture {arch!r}; there are {', '.join(ARCHES)}")
    return DEVICES[name]
