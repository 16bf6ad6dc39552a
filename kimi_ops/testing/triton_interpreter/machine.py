"""Loads, stores and atomics of one program after the other, each checked before it happens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kimi_ops.testing.triton_interpreter.faults import KernelFault, Launch, Place, Report
from kimi_ops.testing.triton_interpreter.memory import AddressSpace, Region
from kimi_ops.testing.triton_interpreter.races import Array, Ledger

KERNEL_CODE = "__interpreted_kernel_code__"  # a name in the globals of every function we run

# A program that reads the same value this often, and does nothing else, waits for it to change.
MAX_SPINS = 1_000


class Machine:
    """The state of the interpreter: memory, the program that runs, and what was found.

    Args:
        report: where faults and launches are recorded.
        bounds: see `AddressSpace`.
        checks: whether to look for races, overlaps, uninitialised loads and overflows; bounds
            and alignment are checked always.
        keep_going: record faults and go on, instead of raising the first.
        ignore: kinds of faults to pass over.
    """

    def __init__(
        self,
        report: Report,
        bounds: str,
        checks: bool,
        keep_going: bool,
        ignore: frozenset[str],
    ) -> None:
        self.space = AddressSpace(bounds)
        self.checks = checks
        self._report = report
        self._ledger = Ledger()
        self._keep_going = keep_going
        self._ignore = ignore
        self._kernel = ""
        self._program = (0, 0, 0)
        self._spinning: tuple[int, str, int, bytes] | None = None
        self._spins = 0
        self.launch = Launch("", (0, 0, 0))

    def begin_launch(self, kernel: str, grid: tuple[int, int, int]) -> None:
        """Starts a launch; its arguments are placed before this."""
        self._kernel = kernel
        self.launch = Launch(kernel, grid)
        self._report.launches.append(self.launch)
        self._ledger.begin_launch(grid[0] * grid[1] * grid[2])

    def begin_program(self, program: tuple[int, int, int]) -> None:
        """Starts a program of the launch."""
        self._program = program
        self._spinning = None
        self._ledger.begin_program()

    def barrier(self) -> None:
        """All threads of the program meet."""
        self._ledger.barrier()

    def place(self) -> Place:
        """The kernel's line that is being executed, inside Triton's own library or not."""
        frame: Any = sys._getframe(1)
        found = None
        while frame is not None:
            if KERNEL_CODE in frame.f_globals:
                found = found or frame
                if not str(frame.f_globals.get("__name__", "")).startswith("triton."):
                    found = frame
                    break
            frame = frame.f_back
        if found is None:
            return Place(self._kernel, self._program, self._kernel, "the launch", 0)
        code = found.f_code
        return Place(
            self._kernel, self._program, code.co_name, code.co_filename, int(found.f_lineno)
        )

    def fault(self, kind: str, detail: str, other: Place | None = None) -> None:
        """Reports a fault at the current line: raises it, or records it when told to keep going.

        Raises:
            KernelFault: unless the block was opened with ``keep_going=True``.
        """
        if kind in self._ignore:
            return
        found = KernelFault(kind, detail, self.place(), other)
        self._report.add(found)
        if not self._keep_going:
            raise found

    def _groups(self, addresses: Array, size: int) -> Iterator[tuple[Region, Array, Array]]:
        """Splits active addresses by tensor: (tensor, positions, byte offsets), valid ones only."""
        rest = np.arange(addresses.size)
        while rest.size:
            first = int(addresses[rest[0]])
            region = self.space.find(first)
            if region is None:
                label = self.space.freed(first)
                if label is not None:
                    self.fault("freed", f"address {first:#x} belonged to a tensor {label}")
                else:
                    self.fault("wild", f"address {first:#x}; {self.space.nearest(first)}")
                return
            offsets = addresses[rest] - region.base
            ours = np.abs(offsets) < 1 << 43
            if first < 1 << 62:
                ours = (offsets >= region.low) & (offsets < region.high)
            positions, offsets = rest[ours], offsets[ours]
            rest = rest[~ours]
            valid = region.valid(offsets, size)
            if not valid.all():
                bad = int(offsets[int(valid.argmin())])
                count = int((~valid).sum())
                self.fault("out of bounds", f"{count} of {valid.size} lanes; {region.say(bad)}")
            crooked = valid & (addresses[positions] % size != 0)
            if crooked.any():
                bad = int(offsets[int(crooked.argmax())])
                self.fault("misaligned", f"byte {bad} of {region.label} for {size}-byte elements")
                valid &= ~crooked
            if valid.any():
                yield region, positions[valid], offsets[valid]

    def _say(self, conflicts: Iterator[tuple[str, int, int]], region: Region, at: Array) -> None:
        for kind, position, number in conflicts:
            other = self._ledger.place(number) if kind != "overlapping store" else None
            offset = int(at[position]) - region.start
            self.fault(kind, f"byte {offset} of {region.label}", other)

    def load(self, addresses: Array, lanes: Array, out: Array, volatile: bool) -> None:
        """Loads into ``out``, one element per active lane; bad lanes keep what they have.

        Args:
            addresses: int64, of the active lanes.
            lanes: uint32, their positions in the block.
            out: flat, of the element's numpy type.
            volatile: exempt from races, like an atomic, but orders nothing.
        """
        size = out.dtype.itemsize
        self.launch.loaded_bytes += size * addresses.size
        for region, positions, offsets in self._groups(addresses, size):
            at = offsets + region.start
            buffer = region.buffer
            if self.checks:
                if buffer.initialised is not None:
                    fresh = ~(buffer.initialised[at] & buffer.initialised[at + (size - 1)])
                    if fresh.any():
                        offset = int(offsets[int(fresh.argmax())])
                        count = int(fresh.sum())
                        self.fault(
                            "uninitialised",
                            f"{count} of {fresh.size} lanes, first byte {offset} of {region.label}",
                        )
                number = self._ledger.number(self.place())
                if volatile:
                    seen = buffer.shadow.atomic(self._ledger, at, size, number, False, False)
                else:
                    seen = buffer.shadow.load(self._ledger, at, size, lanes[positions], number)
                self._say(seen, region, at)
            out[positions] = _elements(buffer.raw, at, out.dtype)
        if volatile:
            self._watch(out)
        else:
            self._spinning = None

    def store(self, addresses: Array, lanes: Array, values: Array) -> None:
        """Stores one element per active lane; where lanes collide the last one wins."""
        size = values.dtype.itemsize
        self.launch.stored_bytes += size * addresses.size
        self._spinning = None
        for region, positions, offsets in self._groups(addresses, size):
            at = offsets + region.start
            buffer = region.buffer
            if self.checks:
                number = self._ledger.number(self.place())
                seen = buffer.shadow.store(self._ledger, at, size, lanes[positions], number)
                self._say(seen, region, at)
            _set_elements(buffer.raw, at, values[positions])
            _mark_written(region, at, size)

    def atomic(
        self,
        addresses: Array,
        out: Array,
        change: Callable[[Array, Array], Array],
        acquire: bool,
        release: bool,
    ) -> None:
        """Replaces each active element by ``change(old, positions)``; ``out`` gets the old ones.

        Lanes that share an address take turns.
        """
        size = out.dtype.itemsize
        self.launch.atomics += addresses.size
        alone = addresses.size == 1
        for region, positions, offsets in self._groups(addresses, size):
            at = offsets + region.start
            buffer = region.buffer
            if self.checks:
                if alone and release:
                    self.barrier()
                number = self._ledger.number(self.place())
                seen = buffer.shadow.atomic(self._ledger, at, size, number, acquire, release)
                self._say(seen, region, at)
                if alone and acquire:
                    self.barrier()
                if buffer.initialised is not None and not buffer.initialised[at].all():
                    self.fault("uninitialised", f"an atomic operation on {region.label}")
            for turn in _turns(at):
                old = _elements(buffer.raw, at[turn], out.dtype)
                out[positions[turn]] = old
                _set_elements(buffer.raw, at[turn], change(old, positions[turn]))
            _mark_written(region, at, size)
        self._watch(out)

    def _watch(self, seen: Array) -> None:
        """Programs run one by one: whoever waits for a later one would wait for ever."""
        place = self.place()
        now = (len(self._report.launches), place.file, place.line, seen.tobytes())
        self._spins = self._spins + 1 if now == self._spinning else 0
        self._spinning = now
        if self._spins >= MAX_SPINS:
            detail = f"the same value {MAX_SPINS} times in a row; programs here run one by one"
            raise KernelFault("waits forever", detail, place)


def _elements(raw: Array, at: Array, dtype: np.dtype[Any]) -> Array:
    """Elements at byte offsets of a storage."""
    size = dtype.itemsize
    if size == 1:
        return raw[at].view(dtype)
    if not (at % size).any():
        result: Array = raw[: raw.size // size * size].view(dtype)[at // size]
        return result
    return raw[at[:, None] + np.arange(size)].view(dtype).reshape(-1)


def _set_elements(raw: Array, at: Array, values: Array) -> None:
    size = values.dtype.itemsize
    if not (at % size).any():
        raw[: raw.size // size * size].view(values.dtype)[at // size] = values
    else:
        raw[at[:, None] + np.arange(size)] = values.view(np.uint8).reshape(-1, size)


def _mark_written(region: Region, at: Array, size: int) -> None:
    initialised = region.buffer.initialised
    if initialised is not None:
        for byte in range(size):
            initialised[at + byte] = True


def _turns(at: Array) -> Iterator[Array]:
    """Splits positions into rounds in which no offset occurs twice, in lane order."""
    order = np.argsort(at, kind="stable")
    ordered = at[order]
    start = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    rank = np.arange(at.size) - np.repeat(start, np.diff(np.r_[start, at.size]))
    for turn in range(int(rank.max(initial=-1)) + 1):
        yield order[rank == turn]
