"""Asynchronous copies of threads from global to shared memory.

Source: PTX ISA 8.7, sections 9.7.9.25.3.1 (cp.async), 9.7.9.25.3.2 (commit_group), 9.7.9.25.3.3
(wait_group, wait_all).
"""

from __future__ import annotations

import numpy as np

from kimi_ops.testing.ptx.binding import Active, Binder, Step
from kimi_ops.testing.ptx.errors import UnsupportedPtx
from kimi_ops.testing.ptx.registry import instruction
from kimi_ops.testing.ptx.syntax import Name
from kimi_ops.testing.ptx.types import TYPES, Array


@instruction(
    "cp.async",
    family="async copy",
    section="9.7.9.25.3.1",
    modifiers="ca cg shared shared::cta global L2::cache_hint L2::64B L2::128B L2::256B",
    results=0,
)
def copy(b: Binder) -> Step:
    """Starts a copy of 4, 8 or 16 bytes; fewer from the source leave zeros."""
    size = b.integer(2)
    if size not in ((16,) if "cg" in b.mods else (4, 8, 16)):
        raise b.unsupported(f"size {size}")
    to, source = b.address(0), b.address(1)
    operands = len(b.ins.operands) - ("L2::cache_hint" in b.mods)
    bytes_read = None
    ignore = None
    if operands > 3:
        fourth = b.ins.operands[3]
        held = b.machine.registers.get(fourth.name) if isinstance(fourth, Name) else None
        if held is not None and held.dtype == np.bool_:
            ignore = b.predicate(3)
        else:
            bytes_read = b.src(3, TYPES["u32"])
    memory, copies, lanes_all = b.machine.launch.memory, b.machine.copies, b.machine.lanes

    def step(active: Active) -> None:
        lanes = active.lanes
        target, start = to(active), source(active)
        data = np.zeros((len(lanes), size // 4), np.uint32)
        reads: Array = np.ones(len(lanes), bool)
        if ignore is not None:
            reads = ~np.broadcast_to(ignore(), (lanes_all,))[lanes]
        if bytes_read is not None:
            amount = np.broadcast_to(bytes_read, (lanes_all,))[lanes]
            if ((amount != 0) & (amount != size)).any():
                raise UnsupportedPtx(
                    f"unsupported: cp.async with a source size between 0 and {size}",
                    b.machine.where(b.ins, int(lanes[0])),
                )
            reads = amount != 0
        if reads.all():
            data = memory.read(b.site, lanes, start, 4, size // 4)
        elif reads.any():
            data[reads] = memory.read(b.site, lanes[reads], start[reads], 4, size // 4)
        b.site.traffic.async_copy_bytes += int(reads.sum()) * size
        copies.issue(b.site, lanes, target, data)

    return step


@instruction("cp.async.commit_group", family="async copy", section="9.7.9.25.3.2", results=0)
def commit(b: Binder) -> Step:
    """Closes the thread's group of copies."""
    return b.machine.copies.commit


@instruction("cp.async.wait_group", family="async copy", section="9.7.9.25.3.3", results=0)
def wait_group(b: Binder) -> Step:
    """Waits until at most n groups of the thread are in flight."""
    pending = b.integer(0)
    return lambda active: b.machine.copies.wait(active, pending)


@instruction("cp.async.wait_all", family="async copy", section="9.7.9.25.3.3", results=0)
def wait_all(b: Binder) -> Step:
    """Waits for all copies of the thread."""

    def step(active: Active) -> None:
        b.machine.copies.commit(active)
        b.machine.copies.wait(active, 0)

    return step
