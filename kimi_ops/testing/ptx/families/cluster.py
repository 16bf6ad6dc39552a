"""Clusters, of one CTA each: a larger one is refused where the kernel declares it.

Source: PTX ISA, "Parallel Synchronization and Communication Instructions",
"Data Movement and Conversion Instructions".
"""

from __future__ import annotations

import numpy as np

from kimi_ops.testing.ptx.binding import Active, Binder, Step, put
from kimi_ops.testing.ptx.errors import OutOfBounds
from kimi_ops.testing.ptx.families.control import Groups
from kimi_ops.testing.ptx.registry import instruction
from kimi_ops.testing.ptx.types import TYPES


def _converge(b: Binder, active: Active) -> None:
    full = np.where(active.bits != 0, np.uint32(0xFFFFFFFF), np.uint32(0))
    b.machine.converged(active, full, "divergent barrier.cluster")


@instruction(
    "barrier.cluster.arrive",
    family="barrier",
    section="Parallel Synchronization and Communication Instructions: barrier.cluster",
    modifiers="release relaxed aligned",
    results=0,
)
def arrive(b: Binder) -> Step:
    """Arrives at the barrier of the cluster."""
    release = "relaxed" not in b.mods

    def step(active: Active) -> None:
        _converge(b, active)
        b.machine.async_units.cluster.arrive(b.site, active, release=release)

    return step


@instruction(
    "barrier.cluster.wait",
    family="barrier",
    section="Parallel Synchronization and Communication Instructions: barrier.cluster",
    modifiers="acquire relaxed aligned",
    results=0,
    control=True,
)
def wait(b: Binder) -> Step:
    """Waits until all threads of the cluster have arrived."""
    if b.ins.guard is not None:
        raise b.unsupported("a predicated barrier")
    acquire = "relaxed" not in b.mods

    def step(active: Active) -> Groups:
        _converge(b, active)
        held = b.machine.async_units.cluster.wait(b.site, active, acquire=acquire)
        if not held.any():
            return [(b.site.index + 1, None)]
        rest = active.mask & ~held
        return [(b.site.index + 1, rest)] if rest.any() else []

    return step


@instruction(
    "mapa",
    family="move",
    section="Data Movement and Conversion Instructions: mapa",
    types="u32 u64",
    modifiers="shared::cluster",
)
def mapa(b: Binder) -> Step:
    """The address of a variable of the cluster's CTA b: with one CTA, the address itself."""
    d, x, rank = b.dst(0, b.type), b.src(1, b.type), b.src(2, TYPES["u32"])

    def step(active: Active) -> None:
        others = active.mask & (np.broadcast_to(rank, active.mask.shape) != 0)
        if others.any():
            raise b.site.fail(
                OutOfBounds, "mapa of a CTA other than 0, in a cluster of one", int(others.argmax())
            )
        put(d, x, active)

    return step


@instruction(
    "getctarank",
    family="move",
    section="Data Movement and Conversion Instructions: getctarank",
    types="u32 u64",
    modifiers="shared::cluster",
)
def getctarank(b: Binder) -> Step:
    """The rank of the CTA that an address belongs to: 0."""
    return b.compute(lambda: np.uint32(0), b.dst(0, TYPES["u32"]))
