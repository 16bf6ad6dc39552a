"""What a launch did, counted: instructions, traffic, conflicts.

A memory instruction of a warp touches global memory in sectors of 32 bytes; the ideal is as many
sectors as its distinct bytes fill. It touches shared memory in wavefronts: 32 banks of 4 bytes each
serve one word at a time, and a warp is served in phases of at most 128 bytes, so that the ideal is
one wavefront per phase.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field, fields
from hashlib import blake2b

import numpy as np

from kimi_ops.testing.ptx.syntax import Instruction
from kimi_ops.testing.ptx.types import WARP, Array

SECTOR_BYTES = 32
LINE_BYTES = 128
BANKS = 32
# Of one instruction, to remember.
_PATTERNS = 64


@dataclass
class Traffic:
    """Counts of one instruction, one source line or one launch; all of warps that were active.

    Attributes:
        global_load_bytes, global_store_bytes: asked for by threads, atomics excluded.
        global_sectors, global_sectors_ideal: of 32 bytes, per warp and instruction.
        l2_sectors: of them, those that reach L2: not those of loads that an L1 of unlimited size,
            empty at the start of each CTA, would have. Loads past L1 (``.cg``, ordered ones),
            stores and atomics always do.
        l1_lines: of 128 bytes, per warp and instruction.
        l1_wavefronts: of 128 bytes each, that loads to registers take through L1.
        atomic_sectors: of the global sectors, those of atomics.
        shared_load_bytes, shared_store_bytes: asked for by threads.
        shared_wavefronts, shared_wavefronts_ideal: per warp and instruction.
        atomics: thread-level atomic operations.
        async_copy_bytes: global to shared by cp.async; also in the global and shared counts.
        bulk_load_bytes, bulk_store_bytes: of shared memory, to and from it by bulk copies; what
            of them lies in global memory is in the global counts, their wavefronts in the shared.
        multiply_adds: of matrix instructions.
        matrix_shared_bytes, matrix_shared_wavefronts: that wgmma reads; in no other count.
    """

    global_load_bytes: int = 0
    global_store_bytes: int = 0
    global_sectors: int = 0
    global_sectors_ideal: int = 0
    l2_sectors: int = 0
    l1_lines: int = 0
    l1_wavefronts: int = 0
    atomic_sectors: int = 0
    shared_load_bytes: int = 0
    shared_store_bytes: int = 0
    shared_wavefronts: int = 0
    shared_wavefronts_ideal: int = 0
    atomics: int = 0
    async_copy_bytes: int = 0
    bulk_load_bytes: int = 0
    bulk_store_bytes: int = 0
    multiply_adds: int = 0
    matrix_shared_bytes: int = 0
    matrix_shared_wavefronts: int = 0

    @property
    def used(self) -> bool:
        """Whether anything was counted."""
        return any(self.__dict__.values())

    def add(self, other: Traffic) -> None:
        """Adds another's counts to this one."""
        # Most are 0, and a report adds those of every instruction.
        for name in _COUNTS:
            if count := getattr(other, name):
                setattr(self, name, getattr(self, name) + count)


_COUNTS = tuple(f.name for f in fields(Traffic))


@dataclass
class Counts(Traffic):
    """Counts of a launch or of a source line.

    Attributes:
        instructions: warp instructions issued, by class: "integer", "float", "conversion",
            "move", "memory", "warp", "matrix", "async copy", "barrier", "control".
        opcodes: the same by opcode without types, e.g. "ld.global".
        tensor: multiply-adds by `tensor_kind`.
        barriers: CTA barriers completed (whole launch only).
        mbarrier_phases: of mbarriers, completed (whole launch only).
    """

    instructions: Counter[str] = field(default_factory=Counter)
    opcodes: Counter[str] = field(default_factory=Counter)
    tensor: Counter[str] = field(default_factory=Counter)
    barriers: int = 0
    mbarrier_phases: int = 0

    @property
    def warp_instructions(self) -> int:
        """Of all classes."""
        return sum(self.instructions.values())


def tensor_kind(ins: Instruction) -> str:
    """What a matrix instruction is for the hardware: "mma.sync bf16.f32" (A, then D)."""
    result, left = ins.types[:2]
    name = ".".join(ins.parts[:2]) if ins.parts[0] == "mma" else ins.parts[0]
    return f"{name} {left.name}.{result.name}"


def by_warp(values: Array, lanes: Array, lane_count: int) -> Array:
    """[k] values of the lanes [k] as [active warps, 32], -1 for inactive lanes.

    The lanes ascend; of a run of instructions they come again for each, in whole warps.
    """
    if len(lanes) == lane_count or (lanes[1:] <= lanes[:-1]).any():
        return values.reshape(-1, WARP)
    spread = np.full(lane_count, -1, np.int64)
    spread[lanes] = values
    rows = spread.reshape(-1, WARP)
    active = np.zeros(lane_count // WARP, bool)
    active[lanes // WARP] = True
    return rows[active]


def _distinct(rows: Array) -> Array:
    """Number of distinct non-negative values in each row."""
    ordered = np.sort(rows, axis=1)
    fresh = np.ones(ordered.shape, bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return (fresh & (ordered >= 0)).sum(1)


class _Remembered(ABC):
    """Computes a count once for each pattern of addresses, of those met last.

    Loops repeat their patterns at other base addresses; the counts are the same for a shift by a
    multiple of ``period`` bytes. Which warps come together varies with the schedule.
    """

    period = 1

    def __init__(self) -> None:
        self._answers: dict[bytes, tuple[int, ...]] = {}

    def count(self, rows: Array, size: int) -> tuple[int, ...]:
        """What accesses of ``size`` bytes at addresses [warps, 32] take; -1 is inactive."""
        first = rows.max(axis=1, keepdims=True)
        pattern = np.where(rows < 0, -1, rows - first // self.period * self.period + (1 << 48))
        digest = blake2b(pattern.data, digest_size=16).digest()
        answer = self._answers.get(digest)
        if answer is None:
            if len(self._answers) == _PATTERNS:
                self._answers.clear()
            answer = self._answers[digest] = self._compute(pattern, size)
        return answer

    @abstractmethod
    def _compute(self, rows: Array, size: int) -> tuple[int, ...]:
        """The answer for one pattern."""


class Sectors(_Remembered):
    """(sectors, ideal sectors, lines) of a global access."""

    period = LINE_BYTES

    def _compute(self, rows: Array, size: int) -> tuple[int, ...]:
        sectors = np.where(rows < 0, -1, rows // SECTOR_BYTES)
        lines = np.where(rows < 0, -1, rows // LINE_BYTES)
        ideal = -(-_distinct(rows) * size // SECTOR_BYTES)
        return int(_distinct(sectors).sum()), int(ideal.sum()), int(_distinct(lines).sum())


class Wavefronts(_Remembered):
    """(wavefronts, ideal wavefronts) of a shared access."""

    period = 4 * BANKS

    def _compute(self, rows: Array, size: int) -> tuple[int, ...]:
        words = max(1, size // 4)
        per_phase = WARP // words
        phases = rows.reshape(-1, per_phase)
        phases = phases[(phases >= 0).any(1)]
        word = phases[:, :, None] // 4 + np.arange(words)
        word[phases < 0] = -1
        flat = np.sort(word.reshape(len(phases), -1), axis=1)
        fresh = np.ones(flat.shape, bool)
        fresh[:, 1:] = flat[:, 1:] != flat[:, :-1]
        fresh &= flat >= 0
        slot = np.arange(len(phases))[:, None] * BANKS + flat % BANKS
        load = np.bincount(slot[fresh], minlength=len(phases) * BANKS)
        return int(load.reshape(-1, BANKS).max(axis=1).sum()), len(phases)
