"""A batch of CTAs that runs: registers, groups of threads, blocks, schedule.

Many CTAs run in one numpy step: a register is an array over all threads of the batch. Threads at
the same place form a group; a branch that not all of a group take parts it, and groups that come to
the same place merge. The group whose block comes first runs first (`flow`), so that threads meet
again at the immediate post-dominator. With a seed, warps are dealt into lots that take turns at
random, and merge only within the lot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from kimi_ops.testing.ptx.async_copies import AsyncCopies
from kimi_ops.testing.ptx.barriers import Barriers
from kimi_ops.testing.ptx.binding import Active, Binder, Site, Step
from kimi_ops.testing.ptx.errors import Deadlock, Divergence, Uninitialised
from kimi_ops.testing.ptx.shared_memory import LocalMemory, SharedMemory
from kimi_ops.testing.ptx.special import special_registers
from kimi_ops.testing.ptx.syntax import Instruction
from kimi_ops.testing.ptx.types import BITS, WARP, Array
from kimi_ops.testing.ptx.uses import CARRYING

if TYPE_CHECKING:
    from kimi_ops.testing.ptx.kernel import Launch

# A group that jumps back this often while others could run lets them go first: it may be waiting
# for them.
_PATIENCE = 200


class NotConverged(Exception):  # noqa: N818
    """Raised by a collective before it does anything: warps whose other threads must come first.

    Attributes:
        awaited: uint32 [warps of the batch], the lanes that must come.
        what: for the report, should they never come.
    """

    def __init__(self, awaited: Array, what: str) -> None:
        super().__init__(what)
        self.awaited, self.what = awaited, what


class Machine:
    """Runs batches of CTAs of one launch; built once, reset for each batch.

    Attributes:
        launch: what is run.
        ctas, warps, lanes: CTAs in the batch, warps per CTA, threads of the batch with padding.
        cta_of, warp_of: [lanes] CTA within the batch, warp within the CTA.
        registers: name -> array [lanes] of bits, or of bool for predicates.
        live: [lanes] threads that exist and have not exited.
        carry: [lanes] the carry flag of extended-precision arithmetic.
    """

    def __init__(self, launch: Launch, ctas: int) -> None:
        self.launch = launch
        program = launch.program
        threads = int(np.prod(launch.block))
        self.ctas, self.warps = ctas, -(-threads // WARP)
        self.lanes = ctas * self.warps * WARP
        lane = np.arange(self.lanes)
        self.cta_of = lane // (self.warps * WARP)
        self.warp_of = lane // WARP % self.warps
        self.thread = lane % (self.warps * WARP)
        self.registers: dict[str, Array] = {
            name: np.zeros(self.lanes, bool if t.kind == "p" else BITS[t.size])
            for name, t in program.registers.items()
        }
        self.flags = {name: np.zeros(self.lanes, bool) for name in launch.watched}
        self.carry = np.zeros(self.lanes, bool)
        self.live = np.zeros(self.lanes, bool)
        self.cta_number = np.zeros(self.lanes, np.int64)
        self._special = special_registers(launch.grid, launch.block, self.thread, self.warp_of)
        self._special["%nwarpid"] = np.full(self.lanes, self.warps, np.uint32)
        self._special["%dynamic_smem_size"] = np.full(self.lanes, launch.dynamic_bytes, np.uint32)
        self._special["%total_smem_size"] = np.full(self.lanes, launch.shared_bytes, np.uint32)
        self.shared = SharedMemory(
            ctas, self.warps, launch.shared_bytes, launch.granule, self.cta_of, self.warp_of
        )
        self.local = LocalMemory(self.lanes, launch.local_bytes)
        self.sites = [Site(self, ins, i) for i, ins in enumerate(program.code)]
        self.steps: list[Step | None] = [None] * len(program.code)
        self.issued = np.zeros(len(program.code), np.int64)
        self.leaders = set(launch.flow.leaders)
        self._blocks: dict[int, tuple[list[Step], int]] = {}
        self.barriers = Barriers(self)
        self.copies = AsyncCopies(self)
        self.ready: dict[tuple[int, int], Array] = {}
        self.parked: dict[tuple[int, int], tuple[Array, str, Array]] = {}
        self._impatience: dict[tuple[int, int], int] = {}
        self.lot_of_warp = np.zeros(ctas * self.warps, np.int64)
        self.steps_left = 0
        # Blocks and control steps done, and that number when parked groups last looked again.
        self._progress = 0
        self._progress_seen = -1

    # Names

    def special(self, name: str) -> Array | None:
        """A special register (PTX ISA 8.7, chapter 10) as uint32 [lanes]; None if there is none."""
        return self._special.get(name)

    def address_of(self, name: str) -> int | None:
        """The address of a variable in its own space, or None."""
        return self.launch.addresses.get(name)

    def where(self, ins: Instruction, lane: int) -> str:
        """Kernel, source line, CTA, warp, lane and text of an instruction, for reports."""
        number = int(self.cta_number[lane])
        gx, gy, _ = self.launch.grid
        cta = (number % gx, number // gx % gy, number // (gx * gy))
        file, line = ins.loc
        source = f"{file.rsplit('/', 1)[-1]}:{line}, " if line else ""
        return (
            f"{self.launch.program.name}, {source}PTX line {ins.line} ({ins.opcode}), CTA {cta}, "
            f"warp {int(self.warp_of[lane])}, lane {lane % WARP}"
        )

    # Steps

    def _bind(self, index: int) -> Step:
        ins, entry = self.launch.program.code[index], self.launch.entries[index]
        binder = Binder(self, ins, entry, self.sites[index])
        step: Step = entry.build(binder)
        if entry.control:
            return step
        reads, writes = self.launch.uses[index]
        if ins.guard is not None:
            reads = reads - {ins.guard.name}
        watched_reads = sorted(r for r in reads if r in self.flags)
        watched_writes = sorted(w for w in writes if w in self.flags)
        if (watched_reads or watched_writes) and not binder.tracks:
            step = self._watched(step, index, watched_reads, watched_writes)
        if ins.guard is not None:
            guard_flag = self.flags.get(ins.guard.name)
            step = self._guarded(step, binder.predicate(ins.guard), guard_flag, index)
        return step

    def _watched(self, step: Step, index: int, reads: list[str], writes: list[str]) -> Step:
        read_flags = [(name, self.flags[name]) for name in reads]
        write_flags = [self.flags[name] for name in writes]
        carries = self.launch.entries[index].family in CARRYING

        def watched(active: Active) -> None:
            known = active.mask
            for name, flag in read_flags:
                if carries:
                    known = known & flag
                else:
                    self.require(flag, active.mask, name, index)
            step(active)
            for flag in write_flags:
                np.copyto(flag, known, where=active.mask)

        return watched

    def require(self, flag: Array, mask: Array, name: str, index: int) -> None:
        """Raises where an active lane reads a register that it has never written."""
        missing = mask & ~flag
        if missing.any():
            raise self.sites[index].fail(
                Uninitialised, f"read of register {name}, never written", int(missing.argmax())
            )

    def _guarded(
        self, step: Step, predicate: Callable[[], Array], flag: Array | None, index: int
    ) -> Step:
        name = self.launch.program.code[index].guard

        def guarded(active: Active) -> None:
            if flag is not None and name is not None:
                self.require(flag, active.mask, name.name, index)
            mask = active.mask & predicate()
            count = int(np.count_nonzero(mask))
            if count == active.count:
                step(active)
            elif count:
                step(Active(mask, count, False))

        return guarded

    def _block(self, start: int) -> tuple[list[Step], int]:
        """The steps from ``start`` up to the next leader or control instruction, and its index."""
        block = self._blocks.get(start)
        if block is None:
            code, entries = self.launch.program.code, self.launch.entries
            steps: list[Step] = []
            index = start
            while index < len(code) and not entries[index].control:
                if index > start and index in self.leaders:
                    break
                step = self.steps[index]
                if step is None:
                    step = self.steps[index] = self._bind(index)
                steps.append(step)
                index += 1
            block = self._blocks[start] = (steps, index)
        return block

    def _control(self, index: int) -> Step:
        step = self.steps[index]
        if step is None:
            step = self.steps[index] = self._bind(index)
        return step

    # Schedule

    def enter(self, place: int, mask: Array) -> None:
        """Lets lanes go on at an instruction; they merge with those of their lot already there."""
        if place >= len(self.launch.program.code):
            self.leave(mask)
            return
        if self.launch.random is None:
            self._enter((0, place), mask)
            return
        lots = np.repeat(self.lot_of_warp, WARP)
        for lot in np.unique(lots[mask]):
            self._enter((int(lot), place), mask & (lots == lot))

    def _enter(self, key: tuple[int, int], mask: Array) -> None:
        if key in self.parked:
            mask = mask | self.parked.pop(key)[0]
        self.ready[key] = self.ready[key] | mask if key in self.ready else mask

    def _pick(self) -> tuple[int, int]:
        order = self.launch.flow.order
        lots = sorted({lot for lot, _ in self.ready})
        lot = lots[0]
        if self.launch.random is not None:
            lot = lots[int(self.launch.random.integers(len(lots)))]
        return min(
            (key for key in self.ready if key[0] == lot),
            key=lambda key: (self._impatience.get(key, 0), order[key[1]], key[1]),
        )

    def run(self, numbers: Array) -> None:
        """Runs CTAs (linear numbers, at most ``ctas`` of them) from start to end."""
        launch = self.launch
        threads = int(np.prod(launch.block))
        self.live[:] = (self.cta_of < len(numbers)) & (self.thread < threads)
        padded = np.zeros(self.ctas, np.int64)
        padded[: len(numbers)] = numbers
        self.cta_number[:] = padded[self.cta_of]
        gx, gy, _ = launch.grid
        self._special["%ctaid.x"][:] = self.cta_number % gx
        self._special["%ctaid.y"][:] = self.cta_number // gx % gy
        self._special["%ctaid.z"][:] = self.cta_number // (gx * gy)
        for flag in self.flags.values():
            flag[:] = False
        self.shared.reset()
        self.local.flags[:] = 0
        launch.memory.cta_of = self.cta_number
        checks = launch.checks
        self.shared.check_initialised = checks.shared_initialised
        self.shared.check_races = checks.shared_races
        self.barriers.reset()
        self.copies.reset()
        self.ready, self.parked, self._impatience = {}, {}, {}
        if launch.random is not None:
            self.lot_of_warp = launch.random.integers(0, 3, self.ctas * self.warps)
        self.enter(0, self.live.copy())
        self.steps_left = launch.step_limit
        while self.ready or self.parked or self.barriers.waiting:
            if not self.ready:
                self._unblock()
            key = self._pick()
            self._impatience.pop(key, None)
            self._run_group(key, self.ready.pop(key))

    def _unblock(self) -> None:
        """Nothing can run: what waits for other threads looks again, once; then it is a report."""
        if not self.parked:
            raise Deadlock(*self.barriers.stuck())
        parked, self.parked = self.parked, {}
        if self._progress != self._progress_seen:
            # Threads have exited or moved since these parked.
            self._progress_seen = self._progress
            for (_, place), (mask, _, _) in parked.items():
                self.enter(place, mask)
            return
        (_, place) = min(parked)
        mask, what, _ = parked[min(parked)]
        raise self.sites[place].fail(Divergence, what, int(mask.argmax()))

    def _active(self, mask: Array) -> Active:
        count = int(np.count_nonzero(mask))
        return Active(mask, count, count == int(np.count_nonzero(self.live)))

    def _run_group(self, key: tuple[int, int], mask: Array) -> None:
        lot, place = key
        active = self._active(mask)
        order, entries = self.launch.flow.order, self.launch.entries
        back = 0
        while True:
            steps, end = self._block(place)
            self.steps_left -= 1
            if self.steps_left < 0:
                raise self.sites[place].fail(
                    Deadlock, "no end in sight: a loop that makes no progress", active.lanes[0]
                )
            done = 0
            try:
                for step in steps:
                    step(active)
                    done += 1
            except NotConverged as stop:
                self._park(lot, place, place + done, active, stop)
                return
            self.issued[place:end] += len(active.warps)
            self._progress += bool(steps)
            groups: list[tuple[int, Array | None]] = [(end, None)]
            control = end < len(order) and entries[end].control
            # With a label right at a control instruction, others may be there, to merge with.
            if control and (end == place or end not in self.leaders):
                groups = self._control_step(end, lot, active)
            if len(groups) == 1 and groups[0][1] is None:
                following = groups[0][0]
                back += following <= place
                alone = not self.ready and not self.parked
                if alone and following < len(order) and self.launch.random is None:
                    place = following
                    continue
                self.enter(following, active.mask)
                if back > _PATIENCE and len(self.ready) > 1:
                    self._impatience[(lot, following)] = (
                        self._impatience.get((lot, following), 0) + 1
                    )
                    return
                following_key = (lot, following)
                if following_key in self.ready and self._pick() == following_key:
                    active = self._active(self.ready.pop(following_key))
                    place = following
                    continue
                return
            for following, part in groups:
                self.enter(following, active.mask if part is None else part)
            return

    def _control_step(self, index: int, lot: int, active: Active) -> list[tuple[int, Array | None]]:
        try:
            groups: list[tuple[int, Array | None]] = self._control(index)(active)
        except NotConverged as stop:
            self._park(lot, index, index, active, stop)
            return []
        self._progress += 1
        self.issued[index] += len(active.warps)
        return groups

    def _park(self, lot: int, start: int, place: int, active: Active, stop: NotConverged) -> None:
        """Warps that must wait for their own threads stay; the others go on from here."""
        self.issued[start:place] += len(active.warps)
        self._progress += place > start
        if place not in self.leaders:
            self.leaders.add(place)
            self._blocks.clear()
        waits = np.repeat(stop.awaited != 0, WARP) & active.mask
        rest = active.mask & ~waits
        key = (lot, place)
        if key in self.ready:
            # The others are already on their way to this very place.
            self.ready[key] |= waits
        else:
            bits = stop.awaited.view(np.uint8)
            awaited = np.unpackbits(bits, bitorder="little").astype(bool)
            if key in self.parked:
                before = self.parked[key]
                waits, awaited = waits | before[0], awaited | before[2]
            self.parked[key] = (waits, stop.what, awaited)
        if rest.any():
            self.ready[key] = self.ready[key] | rest if key in self.ready else rest

    def leave(self, mask: Array) -> None:
        """Lanes exit; others of their warp must not wait for them."""
        for (_, place), (_, what, awaited) in self.parked.items():
            if (awaited & mask).any():
                raise self.sites[place].fail(Divergence, what, int((awaited & mask).argmax()))
        self.live &= ~mask
        self.barriers.release()

    def converged(self, active: Active, members: Array, what: str) -> None:
        """Raises unless every live lane in ``members`` (uint32 [warps], 0 inactive) is active."""
        missing = members & ~active.bits
        if missing.any():
            live = np.packbits(self.live, bitorder="little").view(np.uint32)
            missing &= live
            if missing.any():
                first = int(np.flatnonzero(missing)[0])
                raise NotConverged(
                    missing,
                    f"{what}: lanes {int(missing[first]):#010x} of the warp never arrive",
                )
