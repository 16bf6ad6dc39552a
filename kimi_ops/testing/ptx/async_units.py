"""What works beside the threads of a batch: mbarriers, bulk copies, the barrier of the cluster.

The machine runs until no thread can go on; then copies in flight land, which lets threads that wait
go on. When nothing is in flight either, it is a deadlock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kimi_ops.testing.ptx.bulk_copies import BulkCopies
from kimi_ops.testing.ptx.clusters import ClusterBarrier
from kimi_ops.testing.ptx.mbarriers import Mbarriers
from kimi_ops.testing.ptx.tensor_maps import MapFences
from kimi_ops.testing.ptx.types import Array

if TYPE_CHECKING:
    from kimi_ops.testing.ptx.machine import Machine


class AsyncUnits:
    """The asynchronous machinery of a batch.

    Attributes:
        mbarriers, bulk, cluster, maps: its parts.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.mbarriers = Mbarriers(machine)
        self.bulk = BulkCopies(machine)
        self.cluster = ClusterBarrier(machine)
        self.maps = MapFences()

    def reset(self) -> None:
        """Forgets everything, for a new batch."""
        self.mbarriers.reset()
        self.bulk.reset()
        self.cluster.reset()
        self.maps.reset()

    @property
    def waiting(self) -> bool:
        """Whether any thread is held."""
        return bool(self.mbarriers.held or self.cluster.held)

    def progress(self) -> bool:
        """No thread can go on: what is in flight lands; whether there was anything."""
        return self.bulk.progress()

    def stuck(self) -> tuple[str, str]:
        """What the deadlock of held threads is: (message, where)."""
        return self.mbarriers.stuck() if self.mbarriers.held else self.cluster.stuck()

    def leave(self, gone: Array) -> None:
        """Lanes [bool] have exited; `Machine.live` knows.

        Raises:
            MissingWait: something of a CTA that is done is still in flight.
        """
        machine = self.machine
        live = np.bincount(machine.cta_of[machine.live], minlength=machine.ctas)
        done = np.zeros(machine.ctas, bool)
        done[machine.cta_of[gone]] = True
        done &= live == 0
        self.cluster.release()
        if done.any():
            machine.copies.finish(done)
            self.bulk.finish(done)
