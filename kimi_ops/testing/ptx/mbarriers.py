"""mbarrier objects: phases, arrivals, bytes in flight, and who waits.

An mbarrier lives in eight bytes of shared memory; its state is kept here, by CTA and address. Its
granules are stamped like data (init and inval write, every other operation reads), so that a use
that is not ordered after the init, or an inval that is not ordered after the uses, is a race.

The first wait of a warp for a phase answers false, as the hardware's may, unless all that the phase
waits for is already ordered before it; the second holds its warps until the phase completes, so
that a wait that can never end is a deadlock that names the mbarrier. What completes on an mbarrier
besides arrivals is kept by `bulk_copies`.

Source: PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier",
"Memory Consistency Model".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kimi_ops.testing.ptx.errors import MbarrierError
from kimi_ops.testing.ptx.mbarrier_objects import (
    LARGEST_COUNT,
    MBARRIERS,
    SIZE,
    Copies,
    Held,
    Mbarrier,
)
from kimi_ops.testing.ptx.memory import aligned, in_bounds
from kimi_ops.testing.ptx.types import WARP, Array

if TYPE_CHECKING:
    from kimi_ops.testing.ptx.binding import Site
    from kimi_ops.testing.ptx.machine import Machine

# Polls by ``test_wait`` before its warps are held like those of ``try_wait``.
_POLLS = 100


class Mbarriers:
    """All mbarriers of a batch.

    Attributes:
        completed: phases, over the launch.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.completed = 0
        self.reset()

    def reset(self) -> None:
        """Forgets everything, for a new batch."""
        self.objects: dict[tuple[int, int], Mbarrier] = {}
        self._copies: dict[tuple[int, int], Copies] = {}
        self.held: list[Held] = []

    # Objects

    def _require_place(self, site: Site, lanes: Array, at: Array) -> None:
        aligned(site, lanes, at, SIZE, "mbarrier")
        in_bounds(site, lanes, at, SIZE, 0, self.machine.shared.size, "shared memory")

    def _touch(self, site: Site, lane: int, address: int, *, write: bool) -> Array:
        """Checks an operation on the object at an address as an access; returns its granules."""
        shared, lanes, at = self.machine.shared, np.array([lane]), np.array([address])
        self._require_place(site, lanes, at)
        cells = shared.cells(shared.base[lanes] + at, SIZE)
        shared.require_landed(site, lanes, cells)
        if write:
            shared.async_reads.require_free(site, lanes, cells)
        if shared.check_races:
            report = site.race("mbarrier at shared memory", lanes, at)
            access = shared.races.on_write if write else shared.races.on_read
            access(lanes, cells, site.line, report)
        return cells

    def find(self, site: Site, lane: int, address: int) -> Mbarrier:
        """The live mbarrier at an address, used by a lane.

        Raises:
            MbarrierError: there is none.
            Race: the use is not ordered after the init.
        """
        key = (int(self.machine.cta_of[lane]), address)
        bar = self.objects.get(key)
        if bar is None:
            self._require_place(site, np.array([lane]), np.array([address]))
            copies = self._copies.get(key)
            why = "nothing has initialised"
            if copies is not None:
                why = f"mbarrier.inval at PTX line {copies.dead} has ended"
            raise site.fail(MbarrierError, f"use of shared memory + {address} as an mbarrier, "
                            f"which {why}", lane)  # fmt: skip
        self._touch(site, lane, address, write=False)
        if not bar.used:
            self._first_use(site, lane, bar)
        return bar

    def _first_use(self, site: Site, lane: int, bar: Mbarrier) -> None:
        """From here on the memory is the mbarrier's: Triton lays others over those it never uses.

        Raises:
            MbarrierError: something else has been written there since the init.
        """
        shared = self.machine.shared
        bar.used = True
        shared.hold_mbarrier(bar.cells, held=True)
        lines = shared.races.written_line[bar.cells]
        if shared.check_races and (lines != bar.site.line).any():
            raise site.fail(
                MbarrierError,
                f"use of the {bar.name}, initialised at PTX line {bar.site.line}, but overwritten "
                f"since at PTX line {int(lines[lines != bar.site.line][0])}",
                lane,
            )

    def init(self, site: Site, lane: int, address: int, count: int) -> None:
        """Makes an mbarrier that expects ``count`` arrivals in each phase."""
        machine = self.machine
        shared, races = machine.shared, machine.shared.races
        cta, warp = int(machine.cta_of[lane]), int(machine.warp_of[lane])
        if not 1 <= count <= LARGEST_COUNT:
            raise site.fail(MbarrierError, f"mbarrier.init with a count of {count}", lane)
        key = (cta, address)
        old = self.objects.get(key)
        # What Triton 3.7 emits for two copies that share an mbarrier: the same init twice.
        again = old is not None and old.count == count == old.pending and not old.polls
        if old is not None and not (again and old.phase == old.bytes_pending == 0):
            raise site.fail(
                MbarrierError,
                f"init of the {self.objects[key].name}, which lives since PTX line "
                f"{self.objects[key].site.line}; mbarrier.inval must come first",
                lane,
            )
        cells = self._touch(site, lane, address, write=True)
        if key not in self._copies:
            number = sum(1 for other, _ in self._copies if other == cta)
            if number >= MBARRIERS:
                raise site.fail(MbarrierError, f"more than {MBARRIERS} mbarriers in a CTA", lane)
            self._copies[key] = Copies(machine.warps + 2 * number)
        shared.lands_by_mbarrier = True
        clock = races.clock[cta, warp]
        self.objects[key] = Mbarrier(
            site=site,
            warp=warp,
            stamp=int(clock[warp]),
            barriers=int(races.barriers[cta, warp]),
            cta=cta,
            address=address,
            cells=cells,
            copies=self._copies[key],
            count=count,
            pending=count,
            open=np.zeros_like(clock),
            done=np.zeros_like(clock),
        )

    def invalidate(self, site: Site, lane: int, address: int) -> None:
        """Ends an mbarrier; its memory may serve other uses."""
        bar = self.find(site, lane, address)
        shared = self.machine.shared
        if any(held.bar is bar for held in self.held):
            raise site.fail(MbarrierError, f"inval of the {bar.name}, which warps wait for", lane)
        if self.machine.async_units.bulk.in_flight(bar):
            raise site.fail(
                MbarrierError, f"inval of the {bar.name} with copies to it in flight", lane
            )
        shared.hold_mbarrier(self._touch(site, lane, address, write=True), held=False)
        # Its bytes mean nothing any more.
        at = shared.base[lane] + address
        shared.flags[at : at + SIZE] = 0
        bar.copies.dead = site.line
        del self.objects[bar.cta, address]

    # Phases

    def arrive(
        self,
        site: Site,
        lanes: Array,
        addresses: Array,
        counts: Array,
        *,
        expects: Array | None = None,
        release: bool = True,
        drop: bool = False,
        complete: bool = True,
    ) -> Array:
        """Lanes [k] arrive ``counts`` times each, in order; returns states, uint64 [k].

        Args:
            expects: bytes [k] to add to the tx-count before.
            release: whether what the lanes have done so far is ordered before the phase's end.
            drop: the arrivals count in no later phase either.
            complete: False for ``.noComplete``, where ending the phase is an error.
        """
        machine = self.machine
        races = machine.shared.races
        states = np.zeros(len(lanes), np.uint64)
        released: set[tuple[int, int]] = set()
        for i, (lane, address) in enumerate(zip(lanes.tolist(), addresses.tolist(), strict=True)):
            bar = self.find(site, lane, address)
            warp = int(machine.warp_of[lane])
            if expects is not None:
                self.expect(site, lane, bar, int(expects[i]))
            count = int(counts[i])
            if not 1 <= count <= LARGEST_COUNT:
                raise site.fail(MbarrierError, f"arrival with a count of {count}", lane)
            if count > bar.pending:
                raise site.fail(MbarrierError, f"{count} arrivals at once, but {bar.state}", lane)
            if release and (id(bar), warp) not in released:
                released.add((id(bar), warp))
                np.maximum(bar.open, races.release(bar.cta, warp), out=bar.open)
            states[i] = np.uint64(bar.phase << 32 | bar.pending)
            bar.pending -= count
            if drop:
                bar.count -= count
            if not complete and bar.pending == 0:
                raise site.fail(
                    MbarrierError, f"arrive.noComplete ends the phase of the {bar.name}", lane
                )
            self.settle(bar)
        races.restamp()
        return states

    def expect(self, site: Site, lane: int, bar: Mbarrier, size: int) -> None:
        """The current phase expects ``size`` more bytes (fewer, if negative)."""
        bar.bytes_pending += size
        if abs(bar.bytes_pending) > LARGEST_COUNT:
            raise site.fail(
                MbarrierError,
                f"tx-count of {bar.bytes_pending} bytes at the {bar.name}; the largest is "
                f"{LARGEST_COUNT}",
                lane,
            )

    def settle(self, bar: Mbarrier) -> None:
        """Completes the current phase if nothing is left to come."""
        if bar.pending or bar.bytes_pending:
            return
        bar.phase += 1
        bar.pending = bar.count
        bar.copies.time += 1
        self.completed += 1
        np.maximum(bar.done, bar.open, out=bar.done)
        bar.open[:] = 0
        waiting, self.held = self.held, []
        for held in waiting:
            if held.bar is bar:
                self.machine.enter(held.place, held.mask)
            else:
                self.held.append(held)

    def wait(
        self, site: Site, lanes: Array, addresses: Array, phases: Array, *, parity: bool,
        acquire: bool, blocking: bool,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Lanes [k] look whether phases [k] (parities or states) are complete.

        Returns:
            (complete, held), both bool [k]; lanes that are held come again when the phase ends.
        """
        machine = self.machine
        complete, held = np.zeros(len(lanes), bool), np.zeros(len(lanes), bool)
        keys = np.stack([lanes // WARP, addresses, phases.astype(np.int64)])
        _, first, group = np.unique(keys, axis=1, return_index=True, return_inverse=True)
        group = group.reshape(-1)
        for number, at in enumerate(first.tolist()):
            lane, members = int(lanes[at]), group == number
            warp = int(machine.warp_of[lane])
            bar = self.find(site, lane, int(addresses[at]))
            if parity:
                done = (bar.phase & 1) != (int(phases[at]) & 1)
                phase = bar.phase - done
            else:
                phase = int(phases[at]) >> 32
                done = phase < bar.phase
                if not bar.phase - 1 <= phase <= bar.phase:
                    raise site.fail(
                        MbarrierError,
                        f"a state of another phase than the last two: {bar.state}",
                        lane,
                    )
            races = machine.shared.races
            polls = bar.polls.get((warp, phase), 0)
            known = bar.done <= races.clock[bar.cta, warp]
            if done and (polls or known[: races.actors].all()):
                complete |= members
                if acquire:
                    races.acquire(bar.cta, warp, bar.done)
                    bar.acquired = bar.copies.time
                continue
            bar.polls[warp, phase] = polls + 1
            if polls >= (1 if blocking else _POLLS):
                held |= members
                mask = np.zeros(machine.lanes, bool)
                mask[lanes[members]] = True
                self.held.append(Held(bar, bar.phase, site.index, mask, site))
        return complete, held

    # The async proxy

    def require_published(self, site: Site, lane: int, bar: Mbarrier) -> None:
        """A copy that a lane issues may complete on the mbarrier only if its init is known.

        Raises:
            MbarrierError: neither a fence nor a barrier lies between init and copy.
        """
        races = self.machine.shared.races
        if not self.machine.shared.check_races or bar.published:
            return
        warp = int(self.machine.warp_of[lane])
        fenced = races.clock[bar.cta, warp, races.actors + bar.warp] >= bar.stamp
        if not fenced and races.barriers[bar.cta, bar.warp] == bar.barriers:
            raise site.fail(
                MbarrierError,
                f"an asynchronous copy completes on the {bar.name} without fence.mbarrier_init, "
                f"fence.proxy.async or a barrier after its init at PTX line {bar.site.line}",
                lane,
            )

    def publish(self, warps: Array) -> None:
        """``fence.mbarrier_init`` of warps, numbered over the batch."""
        for bar in self.objects.values():
            if bar.cta * self.machine.warps + bar.warp in warps:
                bar.published = True

    def announce(self, ctas: Array) -> None:
        """Every thread of CTAs [bool] has passed a barrier: fenced inits are known to all."""
        races = self.machine.shared.races
        for bar in self.objects.values():
            if bar.published and ctas[bar.cta]:
                races.written[bar.cells] = 0

    def stuck(self) -> tuple[str, str]:
        """What a deadlock at mbarriers is: (message, where)."""
        held = self.held[0]
        others = {h.bar.state for h in self.held if h.bar.cta == held.bar.cta and h.bar != held.bar}
        message = f"deadlock: {held.bar.state}; nothing that runs or is in flight can complete it"
        if others:
            message += "; also waited for: " + "; ".join(sorted(others))
        return message, self.machine.where(held.site.ins, int(held.mask.argmax()))
