"""Binds a run of like instructions as one.

`RunBinder` gives a builder, instead of arrays over lanes, arrays [n, lanes] over the n instructions
of the run: rows of the register file where they lie together, else a copy that is filled before the
step and, for results, written back after it. The builder is the one of the single instruction.

What a run counts belongs to its instructions; what it finds wrong it does not report: the run is
done again one by one, and the instruction that fails makes the report (`RunFailed`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from kimi_ops.testing.ptx.binding import Active, Binder, Site, Step
from kimi_ops.testing.ptx.counters import Traffic
from kimi_ops.testing.ptx.errors import PtxError
from kimi_ops.testing.ptx.memory import STRIDE_BITS, WINDOW_BYTES
from kimi_ops.testing.ptx.syntax import Address, Immediate, Name, Operand, Pair, Vector
from kimi_ops.testing.ptx.types import BITS, TYPES, WARP, Array, ScalarType

if TYPE_CHECKING:
    from kimi_ops.testing.ptx.machine import Machine


class RunFailed(PtxError):  # noqa: N818
    """A check of a run found something; the single instructions say what."""


class RunParted(Exception):  # noqa: N818
    """Raised before a run has done anything: its instructions must run one by one."""


@dataclass(frozen=True)
class Column:
    """The operands at one place of all instructions of a run; alike, as `fusion` has it."""

    items: tuple[Operand, ...]


class _RunPatterns:
    """Shared wavefronts or global sectors of a run: each instruction counts its own pattern.

    Args:
        counters: of the instructions.
    """

    def __init__(self, counters: list[Any]) -> None:
        self._counters = counters
        self._pattern: Array | None = None
        self._answers: tuple[Array, ...] = ()

    def count(self, rows: Array, size: int) -> tuple[Array, ...]:
        """The counts of accesses at addresses [n * warps, 32], each [n]."""
        period = self._counters[0].period
        pattern = rows - rows.max(axis=1, keepdims=True) // period * period
        if self._pattern is None or not np.array_equal(pattern, self._pattern):
            self._pattern = pattern
            each = rows.reshape(len(self._counters), -1, WARP)
            answers = [
                counter.count(part, size)
                for counter, part in zip(self._counters, each, strict=True)
            ]
            self._answers = tuple(np.array(answers, np.int64).T)
        return self._answers


class RunSite(Site):
    """The sites of a run, as one."""

    def __init__(self, machine: Machine, members: list[Site]) -> None:
        super().__init__(machine, members[0].ins, members[0].index)
        self.members = members
        self._lines = np.array([site.line for site in members], np.int32)
        # What memory asks a site for, here of several: counts come as arrays [n].
        self.wavefronts: Any = _RunPatterns([site.wavefronts for site in members])
        self.sectors: Any = _RunPatterns([site.sectors for site in members])
        self.line: Any = self._lines

    def fail(self, kind: type[PtxError], message: str, lane: int) -> PtxError:
        """Raises, so that nobody takes it for a report; see the module.

        Raises:
            RunFailed: always.
        """
        raise RunFailed(message)

    def per_access(self, count: int) -> None:
        """Prepares for accesses of ``count`` lanes per instruction: `line` is one per access."""
        self.line = np.repeat(self._lines, count)[:, None]

    def split(self, count: int) -> list[tuple[Site, slice]]:
        """Which of ``count`` accesses are whose."""
        share = count // len(self.members)
        return [(site, slice(i * share, (i + 1) * share)) for i, site in enumerate(self.members)]

    def settle(self) -> None:
        """Hands what the run has counted to its instructions; a single number is of all alike."""
        count = len(self.members)
        for field in fields(Traffic):
            total: Any = getattr(self.traffic, field.name)
            if np.ndim(total):
                shares = total.tolist()
            elif total:
                assert total % count == 0, f"{field.name} of a run that its members cannot share"
                shares = [total // count] * count
            else:
                continue
            for site, share in zip(self.members, shares, strict=True):
                setattr(site.traffic, field.name, getattr(site.traffic, field.name) + share)
        self.traffic = Traffic()


class RunBinder(Binder):
    """Operands of a run as arrays [n, lanes], or [n, 1], [lanes] or a scalar where that is enough.

    Args:
        members: indices of its instructions.
    """

    def __init__(self, machine: Machine, members: tuple[int, ...]) -> None:
        code, entries = machine.launch.program.code, machine.launch.entries
        site = RunSite(machine, [machine.sites[i] for i in members])
        super().__init__(machine, code[members[0]], entries[members[0]], site)
        self.run = site
        self.shape = (len(members), machine.lanes)
        self._columns = [
            Column(items) for items in zip(*(code[i].operands for i in members), strict=True)
        ]
        # (register file, rows, copy): filled before the step; written back after it.
        self._gathers: list[tuple[Array, Array, Array]] = []
        self._scatters: list[tuple[Array, Array, Array]] = []

    def _column(self, operand: Any) -> tuple[Operand, ...]:
        column = self._columns[operand] if isinstance(operand, int) else operand
        assert isinstance(column, Column)
        return column.items

    def items(self, operand: int) -> tuple[Any, ...]:
        """The elements of a vector operand, each a `Column`."""
        column = self._column(operand)
        vectors = [item.items for item in column if isinstance(item, Vector)]
        return tuple(map(Column, zip(*vectors, strict=True))) if vectors else (Column(column),)

    def _rows(self, names: list[str], *, result: bool) -> Array:
        """Registers [n, lanes] as bits: a view, or a copy."""
        file, rows = self.machine.rows_of(names)
        if (np.diff(rows) == 1).all():
            return file[rows[0] : rows[-1] + 1]
        copy = np.empty(self.shape, file.dtype)
        (self._scatters if result else self._gathers).append((file, rows, copy))
        return copy

    def src(self, operand: Any, scalar: ScalarType, *, wide: bool = False) -> Any:
        """As `Binder.src`; for a register [n, lanes], or [lanes] where all have the same."""
        items = self._column(operand)
        first = items[0]
        if isinstance(first, Immediate):
            values = [self._constant(i, scalar) for i in items if isinstance(i, Immediate)]
            if len(set(items)) == 1:
                return values[0]
            return np.array(values, scalar.dtype)[:, None]
        names = [item.name for item in items if isinstance(item, Name)]
        if len(set(names)) == 1:
            return super().src(first, scalar, wide=wide)
        held = self._rows(names, result=False)
        return self._read_as(held, names[0], scalar, wide)

    def predicate(self, operand: Any) -> Callable[[], Any]:
        """A predicate operand."""
        items = self._column(operand)
        held = self.src(Column(items), TYPES["pred"])
        if isinstance(items[0], Name) and items[0].negated:
            return lambda: ~held
        return lambda: held

    def dst(self, operand: Any, scalar: ScalarType, *, wide: bool = False) -> Array:
        """As `Binder.dst`, [n, lanes]."""
        items = self._column(operand)
        names = [
            item.first.name if isinstance(item, Pair) else item.name
            for item in items
            if isinstance(item, (Name, Pair))
        ]
        return self._result(names, scalar, wide)

    def _result(self, names: list[str], scalar: ScalarType, wide: bool) -> Array:
        if names[0] == "_":
            return np.empty(self.shape, scalar.dtype)
        return self._write_as(self._rows(names, result=True), names[0], scalar, wide)

    def second(self, operand: int) -> Array | None:
        """The ``q`` of results ``p|q``; None without one."""
        names = [item.second.name for item in self._column(operand) if isinstance(item, Pair)]
        return self._result(names, TYPES["pred"], False) if names else None

    def flag(self, operand: int) -> Array | None:
        """None: registers that may hold nothing are in no run."""
        return None

    def address(self, operand: int) -> Callable[[Active], Array]:
        """The addresses [n * active lanes]."""
        items = [item for item in self._column(operand) if isinstance(item, Address)]
        offsets = np.array([item.offset for item in items], np.int64)[:, None]
        bases = Column(tuple(item.base for item in items))
        name = bases.items[0]
        held = self.machine.registers.get(name.name) if isinstance(name, Name) else None
        base = self.src(bases, TYPES["u64" if held is None else f"u{8 * held.itemsize}"])
        lanes = self.machine.lanes

        def addresses(active: Active) -> Array:
            picked = np.asarray(base)
            if picked.shape[-1:] == (lanes,) and active.count != lanes:
                picked = picked[..., active.lanes]
            both = np.broadcast_to(picked.astype(np.int64), (len(offsets), active.count)) + offsets
            return both.reshape(-1)

        return addresses

    def require_apart(self, lanes: Array, addresses: Array, *, shared: bool) -> None:
        """Raises `RunParted` where two accesses of the run, all of one size, meet."""
        ctas = self.machine.cta_of[lanes] * WINDOW_BYTES if shared else 0
        ordered = np.sort(addresses + ctas)
        if (ordered[1:] == ordered[:-1]).any():
            raise RunParted

    def require_one_buffer(self, addresses: Array) -> None:
        """Raises `RunParted` where global addresses are in more than one buffer."""
        number = addresses >> STRIDE_BITS
        if (number != number[0]).any():
            raise RunParted

    def require_alike(self, flags: Array) -> None:
        """Raises `RunParted` where only some of the flags are set."""
        if flags.any() and not flags.all():
            raise RunParted

    def bound(self, step: Step, singles: list[Step]) -> Step:
        """The step of the run.

        Args:
            step: what the builder made.
            singles: steps of the instructions one by one.
        """
        gathers, scatters, site = self._gathers, self._scatters, self.run
        guard = self.ins.guard
        holds = None if guard is None else self.predicate(Column((guard,)))

        def run(active: Active) -> None:
            for file, rows, copy in gathers:
                file.take(rows, 0, copy, "clip")
            if not active.full:
                for file, rows, copy in scatters:
                    file.take(rows, 0, copy, "clip")
            step(active)
            for file, rows, copy in scatters:
                file[rows] = copy

        if self.entry.order != "access":
            return run

        def checked(active: Active) -> None:
            taken = active.count
            if holds is not None:
                taken = int(np.count_nonzero(active.mask & holds()))
                if not taken:
                    return
            site.per_access(active.count)
            stop: Exception = RunParted()
            if taken == active.count:
                try:
                    run(active)
                    return
                except (RunFailed, RunParted) as found:
                    stop = found
            for single in singles:
                single(active)
            if isinstance(stop, RunFailed):
                raise stop

        return checked


__all__ = ["BITS", "Column", "RunBinder", "RunFailed", "RunSite"]
