"""Asynchronous copies of threads from global to shared memory.

Source: PTX ISA, "Data Movement and Conversion Instructions": cp.async and its groups.
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
    section="Data Movement and Conversion Instructions: cp.async",
    modifiers="ca cg shared shared::cta global L2::cache_hint L2::64B L2::128B L2::256B",
    results=0,
    order="access",
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
    memory, copies = b.machine.launch.memory, b.machine.copies

    def given(value: Array, active: Active) -> Array:
        return np.broadcast_to(value, b.shape)[..., active.lanes].reshape(-1)

    def step(active: Active) -> None:
        lanes = b.lanes_of(active)
        target, start = to(active), source(active)
        b.require_apart(lanes, target, shared=True)
        b.require_one_buffer(start)
        data = np.zeros((len(lanes), size // 4), np.uint32)
        reads: Array = np.ones(len(lanes), bool)
        if ignore is not None:
            reads = ~given(ignore(), active)
        if bytes_read is not None:
            amount = given(bytes_read, active)
            if ((amount != 0) & (amount != size)).any():
                raise UnsupportedPtx(
                    f"unsupported: cp.async with a source size between 0 and {size}",
                    b.machine.where(b.ins, int(lanes[0])),
                )
            reads = amount != 0
        b.require_alike(reads)
        if reads.all():
            data = memory.read(b.site, lanes, start, 4, size // 4)
        elif reads.any():
            data[reads] = memory.read(b.site, lanes[reads], start[reads], 4, size // 4)
        b.site.traffic.async_copy_bytes += int(reads.sum()) * size
        copies.issue(b.site, lanes, target, data)

    return step


@instruction(
    "cp.async.commit_group",
    family="async copy",
    section="Data Movement and Conversion Instructions: cp.async.commit_group",
    results=0,
    order="ordered",
)
def commit(b: Binder) -> Step:
    """Closes the thread's group of copies."""
    return b.machine.copies.commit


@instruction(
    "cp.async.wait_group",
    family="async copy",
    section="Data Movement and Conversion Instructions: cp.async.wait_group, cp.async.wait_all",
    results=0,
    order="ordered",
)
def wait_group(b: Binder) -> Step:
    """Waits until at most n groups of the thread are in flight."""
    pending = b.integer(0)
    return lambda active: b.machine.copies.wait(active, pending)


@instruction(
    "cp.async.wait_all",
    family="async copy",
    section="Data Movement and Conversion Instructions: cp.async.wait_group, cp.async.wait_all",
    results=0,
    order="ordered",
)
def wait_all(b: Binder) -> Step:
    """Waits for all copies of the thread."""

    def step(active: Active) -> None:
        b.machine.copies.commit(active)
        b.machine.copies.wait(active, 0)

    return step
