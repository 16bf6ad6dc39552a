"""Where threads go on.

Source: PTX ISA, "Control Flow Instructions", "Miscellaneous Instructions".
"""

from __future__ import annotations

import numpy as np

from kimi_ops.testing.ptx.binding import Active, Binder, Step
from kimi_ops.testing.ptx.errors import OutOfBounds, PtxError
from kimi_ops.testing.ptx.registry import instruction
from kimi_ops.testing.ptx.types import TYPES, Array

Groups = list[tuple[int, Array | None]]


def taken_lanes(b: Binder, active: Active) -> Array | None:
    """Active lanes whose guard holds; None for all of them."""
    guard = b.ins.guard
    if guard is None:
        return None
    flag = b.machine.flags.get(guard.name)
    if flag is not None:
        b.machine.require(flag, active.mask, guard.name, b.site.index)
    taken: Array = active.mask & b.predicate(guard)()
    return taken


@instruction(
    "bra",
    family="control",
    section="Control Flow Instructions: bra",
    modifiers="uni",
    results=0,
    control=True,
)
def bra(b: Binder) -> Step:
    """Goes on at a label."""
    (target,) = b.machine.launch.flow.targets[b.site.index]
    after = b.site.index + 1

    def step(active: Active) -> Groups:
        taken = taken_lanes(b, active)
        if taken is None:
            return [(target, None)]
        count = int(np.count_nonzero(taken))
        if count == active.count:
            return [(target, None)]
        if count == 0:
            return [(after, None)]
        return [(target, taken), (after, active.mask & ~taken)]

    return step


@instruction(
    "brx.idx",
    family="control",
    section="Control Flow Instructions: brx.idx",
    modifiers="uni",
    results=0,
    control=True,
)
def brx(b: Binder) -> Step:
    """Goes on at the label that an index picks."""
    if b.ins.guard is not None:
        raise b.unsupported("a predicated brx.idx")
    targets = b.machine.launch.flow.targets[b.site.index]
    index = b.src(0, TYPES["u32"])

    def step(active: Active) -> Groups:
        picked = np.broadcast_to(index, (b.machine.lanes,))
        wrong = active.mask & (picked >= len(targets))
        if wrong.any():
            raise b.site.fail(
                OutOfBounds, f"index {int(picked[wrong][0])} of brx.idx", int(wrong.argmax())
            )
        groups: Groups = []
        for number in np.unique(picked[active.mask]):
            groups.append((targets[int(number)], active.mask & (picked == number)))
        return groups

    return step


@instruction(
    "ret exit",
    family="control",
    section="Control Flow Instructions: ret, exit",
    modifiers="uni",
    results=0,
    control=True,
)
def leave(b: Binder) -> Step:
    """Ends the thread."""
    after = b.site.index + 1

    def step(active: Active) -> Groups:
        taken = taken_lanes(b, active)
        gone = active.mask if taken is None else taken
        b.machine.leave(gone)
        if taken is None:
            return []
        rest = active.mask & ~taken
        return [(after, rest)] if rest.any() else []

    return step


@instruction(
    "trap brkpt", family="control", section="Miscellaneous Instructions: trap, brkpt", results=0
)
def trap(b: Binder) -> Step:
    """Aborts the kernel: reported."""

    def step(active: Active) -> None:
        raise b.site.fail(PtxError, f"{b.entry.opcode} executed", active.lanes[0])

    return step


@instruction(
    "nanosleep",
    family="control",
    section="Miscellaneous Instructions: nanosleep",
    types="u32",
    results=0,
)
def nanosleep(b: Binder) -> Step:
    """Waits; no effect here."""
    return lambda active: None


@instruction(
    "griddepcontrol",
    family="control",
    section="Parallel Synchronization and Communication Instructions: griddepcontrol",
    modifiers="wait launch_dependents",
    results=0,
)
def griddepcontrol(b: Binder) -> Step:
    """Orders dependent launches; one launch runs at a time here, so it has no effect."""
    return lambda active: None
