"""mbarrier: barriers in shared memory that count arrivals and bytes.

Source: PTX ISA, "Parallel Synchronization and Communication Instructions": mbarrier.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kimi_ops.testing.ptx.binding import Active, Binder, Step, put_lanes
from kimi_ops.testing.ptx.families.control import Groups, taken_lanes
from kimi_ops.testing.ptx.memory import shared_addresses
from kimi_ops.testing.ptx.registry import instruction
from kimi_ops.testing.ptx.syntax import Name
from kimi_ops.testing.ptx.types import TYPES, Array

U32, B64, PRED = TYPES["u32"], TYPES["b64"], TYPES["pred"]
# A cluster is one CTA, whose shared memory is all that ``.shared::cluster`` can name.
_SPACES = "shared shared::cta shared::cluster"
_SCOPES = "cta cluster"


def _picked(value: Any, active: Active) -> Array:
    """An operand in the active lanes."""
    return np.broadcast_to(value, active.mask.shape)[active.lanes]


@instruction(
    "mbarrier.init", family="barrier",
    section="Parallel Synchronization and Communication Instructions: mbarrier.init",
    types="b64", modifiers=_SPACES,
    results=0,
)  # fmt: skip
def init(b: Binder) -> Step:
    """Makes an mbarrier that expects b arrivals in each phase."""
    addresses, count = b.address(0), b.src(1, U32)
    mbarriers = b.machine.async_units.mbarriers

    def step(active: Active) -> None:
        at, counts = shared_addresses(addresses(active)), _picked(count, active)
        for lane, address, n in zip(active.lanes, at, counts, strict=True):
            mbarriers.init(b.site, int(lane), int(address), int(n))

    return step


@instruction(
    "mbarrier.inval", family="barrier",
    section="Parallel Synchronization and Communication Instructions: mbarrier.inval",
    types="b64", modifiers=_SPACES,
    results=0,
)  # fmt: skip
def inval(b: Binder) -> Step:
    """Ends an mbarrier."""
    addresses, mbarriers = b.address(0), b.machine.async_units.mbarriers

    def step(active: Active) -> None:
        at = shared_addresses(addresses(active))
        for lane, address in zip(active.lanes, at, strict=True):
            mbarriers.invalidate(b.site, int(lane), int(address))

    return step


@instruction(
    "mbarrier.arrive mbarrier.arrive_drop",
    family="barrier",
    section="Parallel Synchronization and Communication Instructions: mbarrier.arrive",
    types="b64",
    modifiers=f"expect_tx noComplete release relaxed {_SCOPES} {_SPACES}",
)
def arrive(b: Binder) -> Step:
    """Arrives c times, once by default; with ``.expect_tx`` once, after c bytes are announced."""
    if {"expect_tx", "noComplete"} <= b.mods:
        raise b.unsupported(".expect_tx with .noComplete")
    expects = "expect_tx" in b.mods
    d, addresses = b.dst(0, B64), b.address(1)
    amount = b.src(2, U32) if b.has(2) else np.uint32(1)
    mbarriers = b.machine.async_units.mbarriers

    def step(active: Active) -> None:
        amounts = _picked(amount, active).astype(np.int64)
        states = mbarriers.arrive(
            b.site,
            active.lanes,
            shared_addresses(addresses(active)),
            np.ones_like(amounts) if expects else amounts,
            expects=amounts if expects else None,
            release="relaxed" not in b.mods,
            drop=b.entry.opcode == "mbarrier.arrive_drop",
            complete="noComplete" not in b.mods,
        )
        put_lanes(d, states, active)

    return step


@instruction(
    "mbarrier.expect_tx mbarrier.complete_tx",
    family="barrier",
    section="Parallel Synchronization and Communication Instructions: mbarrier.expect_tx",
    types="b64",
    modifiers=f"relaxed {_SCOPES} {_SPACES}",
    results=0,
)
def expect_tx(b: Binder) -> Step:
    """Announces b bytes to the current phase, or says that they have come."""
    addresses, amount = b.address(0), b.src(1, U32)
    mbarriers = b.machine.async_units.mbarriers
    sign = -1 if b.entry.opcode == "mbarrier.complete_tx" else 1

    def step(active: Active) -> None:
        at, amounts = shared_addresses(addresses(active)), _picked(amount, active)
        for lane, address, size in zip(active.lanes, at, amounts, strict=True):
            bar = mbarriers.find(b.site, int(lane), int(address))
            mbarriers.expect(b.site, int(lane), bar, sign * int(size))
            if sign < 0:
                mbarriers.settle(bar)

    return step


@instruction(
    "mbarrier.test_wait mbarrier.try_wait",
    family="barrier",
    section="Parallel Synchronization and Communication Instructions: mbarrier.test_wait",
    types="b64",
    modifiers=f"parity acquire relaxed {_SCOPES} {_SPACES}",
    control=True,
)
def wait(b: Binder) -> Step:
    """Whether the phase of a state or parity is complete; try_wait may hold the thread for it."""
    d, addresses = b.dst(0, PRED), b.address(1)
    parity = "parity" in b.mods
    phase = b.src(2, U32 if parity else B64)
    machine, index = b.machine, b.site.index
    units = machine.async_units
    reads, _ = machine.launch.uses[index]
    watched = [(name, machine.flags[name]) for name in sorted(reads) if name in machine.flags]
    result = b.ins.operands[0]
    known = machine.flags.get(result.name) if isinstance(result, Name) else None

    def step(active: Active) -> Groups:
        taken = taken_lanes(b, active)
        who = active if taken is None else Active(taken, int(np.count_nonzero(taken)), False)
        if who.count == 0:
            return [(index + 1, None)]
        for name, flag in watched:
            machine.require(flag, who.mask, name, index)
        units.bulk.nudge()
        complete, held = units.mbarriers.wait(
            b.site,
            who.lanes,
            shared_addresses(addresses(who)),
            _picked(phase, who),
            parity=parity,
            acquire="relaxed" not in b.mods,
            blocking=b.entry.opcode == "mbarrier.try_wait",
        )
        d[who.lanes] = complete
        if known is not None:
            known[who.lanes] = True
        if not held.any():
            return [(index + 1, None)]
        rest = active.mask.copy()
        rest[who.lanes[held]] = False
        return [(index + 1, rest)] if rest.any() else []

    return step


@instruction(
    "mbarrier.pending_count",
    family="barrier",
    section="Parallel Synchronization and Communication Instructions: mbarrier.pending_count",
    types="b64",
)
def pending_count(b: Binder) -> Step:
    """Arrivals that were pending when a state was taken."""
    d, state = b.dst(0, U32), b.src(1, B64)
    return b.compute(lambda: (state & np.uint64(0xFFFFFFFF)).astype(np.uint32), d)


@instruction(
    "cp.async.mbarrier.arrive",
    family="async copy",
    section="Parallel Synchronization and Communication Instructions: cp.async.mbarrier.arrive",
    types="b64",
    modifiers="noinc shared shared::cta",
    results=0,
)
def arrive_on_copies(b: Binder) -> Step:
    """Arrives when the thread's copies by cp.async so far have landed; ``.noinc`` is counted."""
    addresses = b.address(0)
    mbarriers, copies = b.machine.async_units.mbarriers, b.machine.copies

    def step(active: Active) -> None:
        at = shared_addresses(addresses(active))
        for lane, address in zip(active.lanes.tolist(), at.tolist(), strict=True):
            bar = mbarriers.find(b.site, lane, address)
            copies.hand_over(b.site, lane, bar, counted="noinc" in b.mods)

    return step
