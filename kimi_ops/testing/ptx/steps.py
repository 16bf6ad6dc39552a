"""Steps of the instructions of a batch, bound when they are first needed.

An instruction's step is what its family's builder makes, within checks of what it may read: first
its guard, then registers that may never have been written, then those that a wgmma still uses. A
block is the steps from a place up to the next leader or control instruction; `fusion` says which
of them run as one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from kimi_ops.testing.ptx.binding import Active, Binder, Step
from kimi_ops.testing.ptx.grouped import RunBinder
from kimi_ops.testing.ptx.types import Array
from kimi_ops.testing.ptx.uses import CARRYING

if TYPE_CHECKING:
    from kimi_ops.testing.ptx.machine import Machine


class Steps:
    """The steps of a machine.

    Attributes:
        leaders: where blocks start; places where warps have been parked are added.
        runs: instructions that run as one, for their counts.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine, self._launch = machine, machine.launch
        self._steps: list[Step | None] = [None] * len(machine.launch.program.code)
        self.leaders = set(machine.launch.flow.leaders)
        self.runs: list[RunBinder] = []
        self._blocks: dict[int, tuple[list[Step], int]] = {}
        self._ends: dict[int, int] = {}
        self._fused: dict[int, list[tuple[Step, int | None]]] = {}

    def lead(self, place: int) -> None:
        """A block starts here from now on."""
        if place not in self.leaders:
            self.leaders.add(place)
            self._blocks.clear()
            self._ends.clear()
            self._fused.clear()

    def _bind(self, index: int) -> Step:
        ins, entry = self._launch.program.code[index], self._launch.entries[index]
        binder = Binder(self._machine, ins, entry, self._machine.sites[index])
        step: Step = self._machine.warpgroups.watch(entry.build(binder), (index,))
        if entry.control:
            return step
        reads, writes = self._launch.uses[index]
        if ins.guard is not None:
            reads = reads - {ins.guard.name}
        watched_reads = sorted(r for r in reads if r in self._machine.flags)
        watched_writes = sorted(w for w in writes if w in self._machine.flags)
        if (watched_reads or watched_writes) and not binder.tracks:
            step = self._watched(step, index, watched_reads, watched_writes)
        if ins.guard is not None:
            guard_flag = self._machine.flags.get(ins.guard.name)
            step = self._guarded(step, binder.predicate(ins.guard), guard_flag, index)
        return step

    def _watched(self, step: Step, index: int, reads: list[str], writes: list[str]) -> Step:
        read_flags = [(name, self._machine.flags[name]) for name in reads]
        write_flags = [self._machine.flags[name] for name in writes]
        carries = self._launch.entries[index].family in CARRYING

        def watched(active: Active) -> None:
            known = active.mask
            for name, flag in read_flags:
                if carries:
                    known = known & flag
                else:
                    self._machine.require(flag, active.mask, name, index)
            step(active)
            for flag in write_flags:
                np.copyto(flag, known, where=active.mask)

        return watched

    def _guarded(
        self, step: Step, predicate: Callable[[], Array], flag: Array | None, index: int
    ) -> Step:
        name = self._launch.program.code[index].guard

        def guarded(active: Active) -> None:
            if flag is not None and name is not None:
                self._machine.require(flag, active.mask, name.name, index)
            mask = active.mask & predicate()
            count = int(np.count_nonzero(mask))
            if count == active.count:
                step(active)
            elif count:
                step(Active(mask, count, False))

        return guarded

    def single(self, index: int) -> Step:
        """The step of one instruction."""
        step = self._steps[index]
        if step is None:
            step = self._steps[index] = self._bind(index)
        return step

    def _run_of(self, members: tuple[int, ...]) -> Step:
        """One step for a run of instructions."""
        if len(members) == 1:
            return self.single(members[0])
        binder = RunBinder(self._machine, members)
        self.runs.append(binder)
        entry = self._launch.entries[members[0]]
        singles = [] if entry.order != "access" else [self.single(i) for i in members]
        return self._machine.warpgroups.watch(binder.bound(entry.build(binder), singles), members)

    def fused_block(self, start: int) -> tuple[list[tuple[Step, int | None]], int]:
        """The block for whole warps: steps, each with `fusion.Part.fixed` of its part."""
        end = self._end(start)
        steps = self._fused.get(start)
        if steps is None:
            assert self._launch.fusion is not None
            parts = self._launch.fusion.plan(start, end)
            steps = [(self._run_of(part.members), part.fixed) for part in parts]
            self._fused[start] = steps
        return steps, end

    def _end(self, start: int) -> int:
        """The next leader or control instruction after ``start``."""
        end = self._ends.get(start)
        if end is None:
            code, entries = self._launch.program.code, self._launch.entries
            end = start
            while end < len(code) and not entries[end].control:
                if end > start and end in self.leaders:
                    break
                end += 1
            self._ends[start] = end
        return end

    def block(self, start: int) -> tuple[list[Step], int]:
        """The steps from ``start`` up to the next leader or control instruction, and its index."""
        block = self._blocks.get(start)
        if block is None:
            end = self._end(start)
            block = self._blocks[start] = ([self.single(i) for i in range(start, end)], end)
        return block
