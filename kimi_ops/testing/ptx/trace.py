"""What the longest CTA of a launch executed, in order, for models of its time.

A batch records which warps ran which instructions and how far each of its loads had to go. At the
end of the batch the CTA with the most warp instructions is kept, if it has more than the longest of
the batches before. The record is of the emulator's order, which is one of those that are possible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kimi_ops.testing.ptx.counters import SECTOR_BYTES
from kimi_ops.testing.ptx.syntax import Immediate, Instruction
from kimi_ops.testing.ptx.types import Array

if TYPE_CHECKING:
    from kimi_ops.testing.ptx.binding import Active, Site
    from kimi_ops.testing.ptx.launch import Launch
    from kimi_ops.testing.ptx.program import Program
    from kimi_ops.testing.ptx.registry import Entry

# How far a load went: to a line that its CTA has touched before, to a sector that the launch has
# touched before, or to one that nobody has.
L1, L2, DRAM = 1, 2, 3
# A batch with more blocks of code than this is not recorded: half a gigabyte of events.
EVENT_LIMIT = 2_000_000
# Loads that go past L1 (PTX ISA, "Cache Operators" and "Memory Consistency Model").
_PAST_L1 = {"cg", "cv", "volatile", "relaxed", "acquire", "bulk"}


@dataclass(frozen=True)
class Static:
    """One instruction of the program.

    Attributes:
        opcode, family, loc: as in the text and the counters.
        reads, writes: registers.
        number: the first operand that is a constant (a barrier, a number of groups), or None.
    """

    opcode: str
    family: str
    loc: tuple[str, int]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    number: int | None


@dataclass(frozen=True)
class Event:
    """Warps that executed instructions ``start`` to ``end``.

    Attributes:
        warps: bit set, of the CTA's warps.
        levels: (instruction, `L1`, `L2` or `DRAM`) of the loads among them.
    """

    start: int
    end: int
    warps: int
    levels: tuple[tuple[int, int], ...]


@dataclass
class Trace:
    """The longest CTA of a launch.

    Attributes:
        code: the program.
        cta: linear number in the grid.
        warps: of a CTA.
        events: in order; empty if there were more than `EVENT_LIMIT`.
        executed: per instruction of the program, by warps of the whole launch.
    """

    code: tuple[Static, ...]
    cta: int = -1
    warps: int = 0
    events: list[Event] = field(default_factory=list)
    executed: list[int] = field(default_factory=list)


def _number(ins: Instruction) -> int | None:
    for operand in ins.operands:
        if isinstance(operand, Immediate) and isinstance(operand.value, int):
            return operand.value
    return None


def static_code(
    program: Program, entries: Sequence[Entry], uses: Sequence[tuple[set[str], set[str]]]
) -> tuple[Static, ...]:
    """The instructions of a program."""
    return tuple(
        Static(
            ins.opcode,
            entry.family,
            ins.loc,
            tuple(sorted(reads)),
            tuple(sorted(writes)),
            _number(ins),
        )
        for ins, entry, (reads, writes) in zip(program.code, entries, uses, strict=True)
    )


class Recorder:
    """Records the batches of a launch.

    Attributes:
        issued: [CTAs of the grid] warp instructions.
        trace: what is kept.
    """

    def __init__(self, launch: Launch, ctas: int, warps: int) -> None:
        self.ctas, self.warps = ctas, warps
        self.issued = np.zeros(int(np.prod(launch.grid)), np.int64)
        self.trace = Trace(launch.text.code, warps=warps)
        self.begin()

    def begin(self) -> None:
        """A new batch."""
        self._events: list[tuple[int, int, bytes, list[tuple[int, Array]]]] = []
        self._loads: list[tuple[int, Array]] = []
        self._seen: dict[int, Array] = {}
        # Set of warps, as bytes -> instructions that it has executed.
        self._counts: dict[bytes, int] = {}

    def ran(self, start: int, end: int, active: Active) -> None:
        """The active warps have executed a run of instructions."""
        if start == end:
            return
        warps = active.bits.tobytes()
        self._counts[warps] = self._counts.get(warps, 0) + end - start
        loads, self._loads = self._loads, []
        # One more than is allowed tells that there were too many.
        if len(self._events) <= EVENT_LIMIT:
            self._events.append((start, end, warps, loads))

    def loaded(
        self, site: Site, lanes: Array, key: int, offset: Array, touched: Array
    ) -> int | Array | None:
        """A load or an atomic; returns the sectors that it asks of L2, None for all of its warps'.

        Of a run of instructions the answer is an array, one of each.

        Args:
            lanes: of the batch, [k].
            key: of the buffer.
            offset: bytes in it, [k].
            touched: [2, sectors], which of the buffer the launch has read or written before.
        """
        # Of a run of instructions (`grouped`) the first that touches a sector is who fetches it.
        members = getattr(site, "members", [site])
        width = -(-touched.shape[1] // 8) * 8
        everyone = site.machine.cta_of[lanes]
        place = everyone * width + offset // SECTOR_BYTES
        levels = np.zeros((len(members), self.ctas), np.uint8)
        past = site.ins.parts[0] == "atom" or not _PAST_L1.isdisjoint(site.ins.parts)
        if len(members) == 1:
            # Neighbours mostly share a sector, and most accesses ascend: both spare the sort.
            place = place[np.diff(place, prepend=-1) != 0]
            if (np.diff(place) < 0).any():
                place = np.unique(place)
            member = np.zeros(len(place), np.int64)
            levels[0, place // width] = L2 if past else L1
        else:
            of = np.arange(len(lanes)) // (len(lanes) // len(members))
            levels[of, everyone] = L2 if past else L1
            place, first = np.unique(place, return_index=True)
            member = of[first]
        cta, sector = place // width, place % width
        asked = None
        if not past:
            new = self._first_touches(key, place, width)
            levels[member[new], cta[new]] = L2
            asked = np.bincount(member[new], minlength=len(members))
        cold = ~(touched[0][sector] | touched[1][sector])
        if len(members) > 1 and cold.any():
            which, inverse = np.unique(sector, return_inverse=True)
            earliest = np.full(len(which), len(members))
            np.minimum.at(earliest, inverse, member)
            cold &= member == earliest[inverse]
        levels[member[cold], cta[cold]] = DRAM
        self._loads += zip([s.index for s in members], levels, strict=True)
        if asked is None or len(members) > 1:
            return asked
        return int(asked[0])

    def _first_touches(self, key: int, place: Array, width: int) -> Array:
        """Which of the ascending places (CTA times width, plus sector) are new in this batch."""
        if key not in self._seen:
            # A bit each, CTA by CTA: pages that nobody touches cost nothing.
            self._seen[key] = np.zeros(self.ctas * width // 8, np.uint8)
        seen = self._seen[key]
        byte, bit = place >> 3, np.left_shift(1, place & 7).astype(np.uint8)
        new: Array = (seen[byte] & bit) == 0
        byte, bit = byte[new], bit[new]
        if len(byte):
            starts = np.flatnonzero(np.diff(byte, prepend=-1))
            seen[byte[starts]] |= np.bitwise_or.reduceat(bit, starts)
        return new

    def end(self, numbers: Array) -> None:
        """The batch is done; ``numbers`` are its CTAs."""
        issued = np.zeros(self.ctas, np.int64)
        for warps, count in self._counts.items():
            issued += self._of_ctas(warps).sum(1) * count
        issued = issued[: len(numbers)]
        longest_before = self.issued.max()
        self.issued[numbers] = issued
        if self.trace.cta < 0 or issued.max() > longest_before:
            self._keep(int(issued.argmax()), int(numbers[issued.argmax()]))
        self._events, self._seen = [], {}

    def _of_ctas(self, warps: bytes) -> Array:
        """A set of warps as bool [CTAs, warps]."""
        return np.frombuffer(warps, np.uint32).reshape(self.ctas, self.warps) != 0

    def _keep(self, place: int, cta: int) -> None:
        sets = {
            warps: sum(1 << w for w in np.flatnonzero(self._of_ctas(warps)[place]).tolist())
            for warps in self._counts
        }
        self.trace.cta, self.trace.events = cta, []
        if len(self._events) <= EVENT_LIMIT:
            self.trace.events = [
                Event(
                    start,
                    end,
                    sets[warps],
                    tuple((at, int(levels[place])) for at, levels in loads if levels[place]),
                )
                for start, end, warps, loads in self._events
                if sets[warps]
            ]
