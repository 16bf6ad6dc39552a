"""The barrier of a cluster of one CTA.

Source: PTX ISA, "Parallel Synchronization and Communication Instructions: barrier.cluster".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kimi_ops.testing.ptx.errors import Divergence
from kimi_ops.testing.ptx.types import WARP, Array

if TYPE_CHECKING:
    from kimi_ops.testing.ptx.binding import Active, Site
    from kimi_ops.testing.ptx.machine import Machine


class ClusterBarrier:
    """Arrivals at the cluster barrier of every CTA of a batch, and who waits for it.

    Attributes:
        held: (place to go on, mask of lanes, site).
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.reset()

    def reset(self) -> None:
        """Forgets everything, for a new batch."""
        machine = self.machine
        self.held: list[tuple[int, Array, Site]] = []
        # Warps that have arrived, and warps that have and did not yet wait.
        self._arrived = np.zeros((machine.ctas, machine.warps), bool)
        self._owes = np.zeros((machine.ctas, machine.warps), bool)
        self._open = np.zeros_like(machine.shared.races.clock[:, 0])
        self._done = np.zeros_like(self._open)

    def _owners(self, warps: Array) -> tuple[Array, Array]:
        return warps // self.machine.warps, warps % self.machine.warps

    def arrive(self, site: Site, active: Active, *, release: bool) -> None:
        """The active warps arrive."""
        ctas, own = self._owners(active.warps)
        if self._owes[ctas, own].any():
            raise site.fail(
                Divergence,
                "a warp arrives twice at the cluster barrier without a wait in between",
                int(active.lanes[0]),
            )
        races = self.machine.shared.races
        if release:
            for cta, warp in zip(ctas.tolist(), own.tolist(), strict=True):
                clock = races.release(cta, warp)
                np.maximum(self._open[cta], clock, out=self._open[cta])
            races.restamp()
        self._arrived[ctas, own] = self._owes[ctas, own] = True
        self.release()

    def release(self) -> None:
        """Completes what can be completed, after an arrival or an exit."""
        machine = self.machine
        if not self._arrived.any():
            return
        exited: Array = ~machine.live.reshape(machine.ctas, machine.warps, WARP).any(axis=2)
        complete = (self._arrived | exited).all(axis=1) & self._arrived.any(axis=1)
        if not complete.any():
            return
        self._done[complete] = np.maximum(self._done[complete], self._open[complete])
        self._open[complete] = 0
        self._arrived[complete] = False
        machine.shared.races.barriers[complete] += 1
        machine.async_units.mbarriers.announce(complete)
        held, self.held = self.held, []
        for place, mask, site in held:
            go = mask & complete[machine.cta_of]
            if go.any():
                machine.enter(place, go)
            if (mask & ~go).any():
                self.held.append((place, mask & ~go, site))

    def wait(self, site: Site, active: Active, *, acquire: bool) -> Array:
        """The active warps wait; returns the mask of the lanes that are held."""
        machine = self.machine
        ctas, own = self._owners(active.warps)
        if not self._owes[ctas, own].all():
            raise site.fail(
                Divergence, "a wait at the cluster barrier without an arrive", int(active.lanes[0])
            )
        through = ~self._arrived[ctas, own]
        for cta, warp in zip(ctas[through].tolist(), own[through].tolist(), strict=True):
            self._owes[cta, warp] = False
            if acquire:
                machine.shared.races.acquire(cta, warp, self._done[cta])
        waits = np.zeros(machine.ctas * machine.warps, bool)
        waits[active.warps[~through]] = True
        mask: Array = np.repeat(waits, WARP) & active.mask
        if mask.any():
            self.held.append((site.index, mask, site))
        return mask

    def stuck(self) -> tuple[str, str]:
        """What a deadlock at the cluster barrier is: (message, where)."""
        _, mask, site = self.held[0]
        lane = int(mask.argmax())
        arrived = np.flatnonzero(self._arrived[self.machine.cta_of[lane]])
        return (
            f"deadlock: warps {arrived.tolist()} of {self.machine.warps} have arrived at the "
            "cluster barrier",
            self.machine.where(site.ins, lane),
        )
