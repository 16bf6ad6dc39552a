"""A batch of CTAs that runs: registers, groups of threads, blocks, schedule.

Many CTAs run in one numpy step: a register is an array over all threads of the batch. Threads at
the same place form a group; a branch that not all of a group take parts it, and groups that come to
the same place merge. The group whose block comes first runs first (`flow`), so that threads meet
again at the immediate post-dominator. With a seed, warps are dealt into lots that take turns at
random, and merge only within the lot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kimi_ops.testing.ptx.async_copies import AsyncCopies
from kimi_ops.testing.ptx.async_units import AsyncUnits
from kimi_ops.testing.ptx.barriers import Barriers
from kimi_ops.testing.ptx.binding import Active, Site
from kimi_ops.testing.ptx.errors import Deadlock, Divergence, Uninitialised
from kimi_ops.testing.ptx.mbarrier_objects import MBARRIERS
from kimi_ops.testing.ptx.register_pool import RegisterPool
from kimi_ops.testing.ptx.shared_memory import LocalMemory, SharedMemory
from kimi_ops.testing.ptx.special import special_registers
from kimi_ops.testing.ptx.steps import Steps
from kimi_ops.testing.ptx.syntax import Instruction
from kimi_ops.testing.ptx.trace import Recorder
from kimi_ops.testing.ptx.types import BITS, WARP, Array
from kimi_ops.testing.ptx.wgmma import GROUP, Warpgroups, is_mma

if TYPE_CHECKING:
    from kimi_ops.testing.ptx.launch import Launch

# Where a group of a lot could run while others jump back this often, these let it go first: they
# may be waiting for it. Counted by lot, since a loop that waits may itself hold barriers (Triton
# shares what its one thread read of a lock so) or lose a turn to another lot at every block.
_PATIENCE = 200
# Up to so many lanes a run as one costs less; beyond, a call into numpy is no longer what takes the
# time, and the copies of a run do (measured: even at 1,024, 15% slower at 2,048).
_FUSED_LANES = 1024


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
        names: dict[np.dtype[Any], list[str]] = {}
        for name in launch.rows:
            scalar = program.registers[name]
            kind = np.dtype(bool) if scalar.kind == "p" else BITS[scalar.size]
            names.setdefault(kind, []).append(name)
        files = {kind: np.zeros((len(held), self.lanes), kind) for kind, held in names.items()}
        self.registers: dict[str, Array] = {}
        self._place: dict[str, tuple[Array, int]] = {}
        for kind, held in names.items():
            for row, name in enumerate(held):
                self.registers[name] = files[kind][row]
                self._place[name] = files[kind], row
        self.flags = {name: np.zeros(self.lanes, bool) for name in launch.watched}
        self.carry = np.zeros(self.lanes, bool)
        self.live = np.zeros(self.lanes, bool)
        self.cta_number = np.zeros(self.lanes, np.int64)
        self._special = special_registers(launch.grid, launch.block, self.thread, self.warp_of)
        self._special["%nwarpid"] = np.full(self.lanes, self.warps, np.uint32)
        self._special["%dynamic_smem_size"] = np.full(self.lanes, launch.dynamic_bytes, np.uint32)
        self._special["%total_smem_size"] = np.full(self.lanes, launch.shared_bytes, np.uint32)
        self.shared = SharedMemory(
            ctas,
            self.warps,
            launch.shared_bytes,
            launch.granule,
            self.cta_of,
            self.warp_of,
            MBARRIERS if launch.has_mbarriers else 0,
            self.warps // GROUP if any(is_mma(ins) for ins in program.code) else 0,
        )
        self.local = LocalMemory(self.lanes, launch.local_bytes)
        self.sites = [Site(self, ins, i) for i, ins in enumerate(program.code)]
        self.issued = np.zeros(len(program.code), np.int64)
        self.recorder = Recorder(launch, ctas, self.warps)
        self.barriers = Barriers(self)
        self.warpgroups = Warpgroups(self)
        self.register_pool = RegisterPool(self)
        self.copies = AsyncCopies(self)
        self.async_units = AsyncUnits(self)
        self.steps = Steps(self)
        self.ready: dict[tuple[int, int], Array] = {}
        self.parked: dict[tuple[int, int], tuple[Array, str, Array]] = {}
        self._impatience: dict[tuple[int, int], int] = {}
        # Jumps back per lot, and how many of them there were when a group became ready.
        self._jumps: dict[int, int] = {}
        self._since: dict[tuple[int, int], int] = {}
        self.lot_of_warp = np.zeros(ctas * self.warps, np.int64)
        self.steps_left = 0
        # Blocks and control steps done, and that number when parked groups last looked again.
        self._progress = 0
        self._progress_seen = -1

    # Names

    def special(self, name: str) -> Array | None:
        """A special register as uint32 [lanes]; None if there is none."""
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

    def rows_of(self, names: list[str]) -> tuple[Array, Array]:
        """The register file [registers, lanes] that holds registers of one width; their rows."""
        places = [self._place[name] for name in names]
        return places[0][0], np.array([row for _, row in places])

    def require(self, flag: Array, mask: Array, name: str, index: int) -> None:
        """Raises where an active lane reads a register that it has never written."""
        missing = mask & ~flag
        if missing.any():
            raise self.sites[index].fail(
                Uninitialised, f"read of register {name}, never written", int(missing.argmax())
            )

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
        if key in self.ready:
            self.ready[key] = self.ready[key] | mask
        else:
            self.ready[key] = mask
            self._since[key] = self._jumps.get(key[0], 0)

    def _jump_back(self, key: tuple[int, int]) -> bool:
        """A group goes back to a place; whether it now lets another of its lot go first."""
        lot = key[0]
        jumps = self._jumps[lot] = self._jumps.get(lot, 0) + 1
        starves = any(
            jumps - self._since[other] > _PATIENCE
            for other in self.ready
            if other[0] == lot and other != key
        )
        if starves:
            self._impatience[key] = self._impatience.get(key, 0) + 1
        return starves

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
        launch.memory.begin_batch(self)
        checks = launch.checks
        self.shared.check_initialised = checks.shared_initialised
        self.shared.check_races = checks.shared_races
        self.barriers.reset()
        self.warpgroups.reset()
        self.register_pool.reset()
        self.copies.reset()
        self.async_units.reset()
        self.recorder.begin()
        self.ready, self.parked, self._impatience = {}, {}, {}
        self._jumps, self._since = {}, {}
        if launch.random is not None:
            self.lot_of_warp = launch.random.integers(0, 3, self.ctas * self.warps)
        self.enter(0, self.live.copy())
        self.steps_left = launch.step_limit
        holders = (self.barriers, self.warpgroups, self.register_pool, self.async_units)
        while self.ready or self.parked or any(holder.waiting for holder in holders):
            if not self.ready:
                self._unblock()
            key = self._pick()
            self._impatience.pop(key, None)
            self._run_group(key, self.ready.pop(key))
        self.recorder.end(numbers)

    def _unblock(self) -> None:
        """Nothing can run: what waits for other threads looks again, once; then it is a report."""
        if self.async_units.progress() and self.ready:
            return
        if not self.parked:
            holders = (self.register_pool, self.warpgroups, self.async_units, self.barriers)
            for holder in holders:
                if holder.waiting:
                    raise Deadlock(*holder.stuck())
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
        fuses = self.launch.fusion is not None and self.lanes <= _FUSED_LANES
        while True:
            self.steps_left -= 1
            if self.steps_left < 0:
                raise self.sites[place].fail(
                    Deadlock, "no end in sight: a loop that makes no progress", active.lanes[0]
                )
            done: int | None = 0
            try:
                if fuses and active.whole:
                    fused, end = self.steps.fused_block(place)
                    for step, before in fused:
                        done = before
                        step(active)
                else:
                    steps, end = self.steps.block(place)
                    for number, step in enumerate(steps):
                        done = number
                        step(active)
            except NotConverged as stop:
                if done is None:
                    raise
                self._park(lot, place, place + done, active, stop)
                return
            self.issued[place:end] += len(active.warps)
            self.recorder.ran(place, end, active)
            self._progress += end > place
            groups: list[tuple[int, Array | None]] = [(end, None)]
            control = end < len(order) and entries[end].control
            # With a label right at a control instruction, others may be there, to merge with.
            if control and (end == place or end not in self.steps.leaders):
                groups = self._control_step(end, lot, active)
            if len(groups) == 1 and groups[0][1] is None:
                following = groups[0][0]
                alone = not self.ready and not self.parked
                if alone and following < len(order) and self.launch.random is None:
                    place = following
                    continue
                self.enter(following, active.mask)
                following_key = (lot, following)
                if following <= place and self._jump_back(following_key):
                    return
                if following_key in self.ready and self._pick() == following_key:
                    active = self._active(self.ready.pop(following_key))
                    place = following
                    continue
                return
            for following, part in groups:
                self.enter(following, active.mask if part is None else part)
                if following <= place:
                    self._jump_back((lot, following))
            return

    def _control_step(self, index: int, lot: int, active: Active) -> list[tuple[int, Array | None]]:
        try:
            groups: list[tuple[int, Array | None]] = self.steps.single(index)(active)
        except NotConverged as stop:
            self._park(lot, index, index, active, stop)
            return []
        self._progress += 1
        self.issued[index] += len(active.warps)
        self.recorder.ran(index, index + 1, active)
        return groups

    def _park(self, lot: int, start: int, place: int, active: Active, stop: NotConverged) -> None:
        """Warps that must wait for their own threads stay; the others go on from here."""
        self.issued[start:place] += len(active.warps)
        self.recorder.ran(start, place, active)
        self._progress += place > start
        self.steps.lead(place)
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
        self.warpgroups.leave(mask)
        self.barriers.release()
        self.async_units.leave(mask)

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
