"""Barriers of the CTA and fences.

Source: PTX ISA, "Parallel Synchronization and Communication Instructions".
"""

from __future__ import annotations

import numpy as np

from kimi_ops.testing.ptx.barriers import BARRIERS
from kimi_ops.testing.ptx.binding import Active, Binder, Step
from kimi_ops.testing.ptx.errors import Divergence
from kimi_ops.testing.ptx.registry import instruction
from kimi_ops.testing.ptx.syntax import Immediate
from kimi_ops.testing.ptx.types import TYPES, WARP, Array

U32 = TYPES["u32"]


def _uniform(b: Binder, operand: int, active: Active) -> int:
    """An operand that must be the same in all active lanes."""
    value = b.src(operand, U32)
    if np.ndim(value) == 0:
        return int(value)
    picked = value[active.lanes]
    if (picked != picked[0]).any():
        raise b.site.fail(
            Divergence, "a barrier number or count that differs between threads", active.lanes[0]
        )
    return int(picked[0])


@instruction(
    "bar.sync bar.cta.sync barrier.sync barrier.cta.sync bar.arrive bar.cta.arrive "
    "barrier.arrive barrier.cta.arrive",
    family="barrier",
    section="Parallel Synchronization and Communication Instructions: bar, barrier",
    modifiers="aligned",
    results=0,
    control=True,
)
def barrier(b: Binder) -> Step:
    """Waits at (or only arrives at) barrier a for b threads, all of the CTA by default."""
    if b.ins.guard is not None:
        raise b.unsupported("a predicated barrier")
    wait = "sync" in b.entry.opcode
    aligned = b.entry.opcode.startswith("bar.") or "aligned" in b.mods
    if isinstance(b.ins.operands[0], Immediate) and not 0 <= b.integer(0) < BARRIERS:
        raise b.unsupported(f"barrier number {b.integer(0)}")
    if not wait and not b.has(1):
        raise b.unsupported("arrive without a thread count")

    def step(active: Active) -> list[tuple[int, Array | None]]:
        full = np.where(active.bits != 0, np.uint32(0xFFFFFFFF), np.uint32(0))
        b.machine.converged(active, full, "divergent barrier")
        number = _uniform(b, 0, active)
        threads = _uniform(b, 1, active) if b.has(1) else None
        if not 0 <= number < BARRIERS:
            raise b.site.fail(Divergence, f"barrier number {number}", active.lanes[0])
        if threads is not None and (threads <= 0 or threads % WARP):
            raise b.site.fail(
                Divergence, f"barrier for {threads} threads, no multiple of 32", active.lanes[0]
            )
        return b.machine.barriers.arrive(
            b.site, active, number, threads, wait=wait, aligned=aligned
        )

    return step


@instruction(
    "membar fence",
    family="barrier",
    section="Parallel Synchronization and Communication Instructions: membar, fence",
    modifiers="cta gl sys gpu cluster sc acq_rel acquire release",
    results=0,
)
def fence(b: Binder) -> Step:
    """Orders the thread's accesses, those before against those after it (`global_clocks`)."""
    memory = b.machine.launch.memory
    return lambda active: memory.fence(b.site, active.lanes)
