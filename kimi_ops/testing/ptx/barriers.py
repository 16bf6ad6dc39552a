"""Barriers of a CTA.

Warps that wait are kept with the place where they go on. A barrier completes, CTA by CTA, when the
warps that it counts have arrived; a warp that has exited counts as arrived where no thread count is
given, as the hardware has it.

Source: PTX ISA, "Parallel Synchronization and Communication Instructions: bar, barrier".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kimi_ops.testing.ptx.errors import Divergence
from kimi_ops.testing.ptx.types import WARP, Array

if TYPE_CHECKING:
    from kimi_ops.testing.ptx.binding import Active, Site
    from kimi_ops.testing.ptx.machine import Machine

BARRIERS = 16


class Barriers:
    """The sixteen barriers of every CTA of a batch.

    Attributes:
        waiting: (barrier, place to go on, mask of lanes, site).
        completed: number of completed barriers, over CTAs.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.completed = 0
        self.reset()

    def reset(self) -> None:
        """Forgets arrivals, for a new batch."""
        machine = self.machine
        self.waiting: list[tuple[int, int, Array, Site]] = []
        self._arrived = np.zeros((machine.ctas, BARRIERS, machine.warps), bool)
        self._count = np.zeros((machine.ctas, BARRIERS), np.int64)
        self._place = np.full((machine.ctas, BARRIERS), -1, np.int64)

    def arrive(
        self,
        site: Site,
        active: Active,
        barrier: int,
        threads: int | None,
        *,
        wait: bool,
        aligned: bool = True,
    ) -> list[tuple[int, Array | None]]:
        """The active warps arrive; returns the groups that go on.

        Args:
            threads: number of threads that the barrier waits for; None for all of the CTA.
            wait: False for ``arrive``.
            aligned: whether all warps are expected at one place; ``barrier.sync`` is for others.
        """
        machine = self.machine
        after = site.index + 1
        # A count that is given includes who has exited.
        everyone = threads == machine.warps * WARP and active.count == machine.lanes
        if (
            wait
            and active.full
            and (threads is None or everyone)
            and not self.waiting
            and not self._arrived.any()
        ):
            self.completed += len(np.unique(machine.cta_of[active.lanes]))
            machine.shared.races.join_all()
            return [(after, None)]
        warps = active.warps
        ctas, own = warps // machine.warps, warps % machine.warps
        expected = -1 if threads is None else threads
        for cta in np.unique(ctas):
            lane = int(active.lanes[machine.cta_of[active.lanes] == cta][0])
            if self._arrived[cta, barrier].any():
                if self._count[cta, barrier] != expected:
                    raise site.fail(
                        Divergence, f"barrier {barrier} with different thread counts", lane
                    )
                if aligned and threads is None and self._place[cta, barrier] != site.index:
                    other = machine.sites[int(self._place[cta, barrier])].line
                    raise site.fail(
                        Divergence,
                        f"divergent barrier {barrier}: other warps of the CTA wait at it at PTX "
                        f"line {other}",
                        lane,
                    )
            self._count[cta, barrier] = expected
            self._place[cta, barrier] = site.index
        if self._arrived[ctas, barrier, own].any():
            raise site.fail(
                Divergence, f"a warp arrives twice at barrier {barrier}", int(active.lanes[0])
            )
        self._arrived[ctas, barrier, own] = True
        if wait:
            self.waiting.append((barrier, after, active.mask, site))
        self.release()
        return [] if wait else [(after, None)]

    def release(self) -> None:
        """Completes what can be completed, after an arrival or an exit."""
        machine = self.machine
        waiting = sorted({barrier for barrier, _, _, _ in self.waiting})
        if not waiting:
            return
        exited: Array = ~machine.live.reshape(machine.ctas, machine.warps, WARP).any(axis=2)
        for barrier in waiting:
            arrived = self._arrived[:, barrier]
            counted: Array = np.where(
                self._count[:, barrier] < 0,
                (arrived | exited).all(axis=1),
                arrived.sum(axis=1) * WARP >= self._count[:, barrier],
            )
            complete: Array = counted & arrived.any(axis=1)
            if not complete.any():
                continue
            self.completed += int(complete.sum())
            done = complete[machine.cta_of]
            waits = np.zeros(machine.lanes, bool)
            left = []
            for number, place, mask, site in self.waiting:
                if number != barrier:
                    left.append((number, place, mask, site))
                    continue
                go = mask & done
                waits |= go
                if go.any():
                    machine.enter(place, go)
                if (mask & ~done).any():
                    left.append((number, place, mask & ~done, site))
            self.waiting = left
            waiting_warps: Array = waits.reshape(machine.ctas, machine.warps, WARP).any(axis=2)
            for cta in np.flatnonzero(complete):
                came = arrived[cta] | (exited[cta] & (self._count[cta, barrier] < 0))
                machine.shared.races.join(int(cta), came, waiting_warps[cta])
            machine.shared.races.restamp()
            arrived[complete] = False

    def stuck(self) -> tuple[str, str]:
        """What a deadlock at barriers is: (message, where)."""
        machine = self.machine
        barrier, _, mask, site = self.waiting[0]
        lane = int(mask.argmax())
        cta = int(machine.cta_of[lane])
        arrived = np.flatnonzero(self._arrived[cta, barrier])
        others = [
            f"warps at barrier {b} (PTX line {s.line})"
            for b, _, m, s in self.waiting[1:]
            if (m & (machine.cta_of == cta)).any()
        ]
        message = (
            f"deadlock: warps {arrived.tolist()} of {machine.warps} wait at barrier {barrier}"
            + (f"; also {', '.join(others)}" if others else "")
        )
        return message, machine.where(site.ins, lane)
