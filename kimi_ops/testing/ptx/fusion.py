"""Which instructions of a block run as one.

Compilers unroll: a block has runs of the same instruction on other registers, mixed with the
arithmetic of their addresses. Run one by one, each costs a call into numpy for as few as 32 lanes.
A plan brings like instructions of a block together, so that one call serves all of them, on rows
of the register file.

Nothing that a kernel can tell may change, and no report either, so an instruction says with
``order`` in its registration what it may be moved across:

- ``pure``: reads and writes registers, cannot fail. Moves freely between its operands' writers and
  its results' readers; any two that are independent and alike run as one.
- ``lanes``: exchanges values within a warp; pure where its member mask is the constant of all
  lanes and the lanes are constant too, else ordered.
- ``access``: loads and stores. Keeps its place among all that touch memory; neighbours there that
  are alike run as one, but for those of which two write the same place.
- ``ordered``: touches memory or fails. Keeps its place among those; never runs as one.
- ``fixed`` (the default): everything before it in the text is done before it, nothing after it;
  so its warps can be parked there and come back.

What reads or writes a register that may never have been written can fail: it is ordered.

One report may come out of turn: that a register is used while a wgmma still works on it is found
where the instruction runs, so before a bug in an access of memory that it has been moved across.

The plan holds only where warps are whole (all 32 lanes active), so that no collective finds lanes
missing; other groups of threads run the text as it stands, as does a run in which a check fails:
the single instruction that it fails at then makes the report.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from kimi_ops.testing.ptx.flow import Flow
from kimi_ops.testing.ptx.program import Program
from kimi_ops.testing.ptx.registry import Entry
from kimi_ops.testing.ptx.syntax import (
    Address,
    Immediate,
    Name,
    Operand,
    Pair,
    Vector,
)
from kimi_ops.testing.ptx.types import WARP

Uses = Sequence[tuple[set[str], set[str]]]
# Of these the constants may differ within a run; others look at theirs when they are bound.
# Accesses of other spaces, generic ones and those that synchronise stay on their own.
_SPACES = {"global", "shared", "shared::cta"}
_STRONG = {"relaxed", "acquire", "release", "volatile"}
_ALL_LANES = (1 << WARP) - 1
_ANY_CONSTANT = {
    *("add", "sub", "or", "xor", "and", "mov", "mul.lo", "mad.lo", "mad.wide", "setp", "selp"),
    *("mul", "fma"),
}


@dataclass(frozen=True)
class Part:
    """Instructions that run as one.

    Attributes:
        members: their indices, in the order of the text.
        fixed: how many instructions of the block are done when this one runs; None where that
            is not a prefix of the text, since it cannot stop there.
    """

    members: tuple[int, ...]
    fixed: int | None


class Fusion:
    """Plans of the blocks of a program, and where that puts its registers.

    Args:
        watched: registers that may hold what nobody wrote.
    """

    def __init__(
        self,
        program: Program,
        flow: Flow,
        entries: Sequence[Entry],
        uses: Uses,
        watched: set[str],
    ) -> None:
        self._program, self._entries, self._uses = program, entries, uses
        self._watched = watched
        self._plans: dict[tuple[int, int], list[Part]] = {}
        parts = []
        start = 0
        leaders = {*flow.leaders, len(entries)}
        for index in range(len(entries) + 1):
            if index in leaders or entries[index].control:
                parts += self.plan(start, index)
                start = index + (index < len(entries) and entries[index].control)
        self.rows = self._rows(sorted(parts, key=lambda part: -len(part.members)))

    def _rows(self, parts: list[Part]) -> list[str]:
        """Names of the registers in an order that keeps those of a run together."""
        code, registers = self._program.code, self._program.registers
        rows: dict[str, None] = {}
        for part in parts:
            if len(part.members) > 1:
                for column in zip(*(_flat(code[i].operands) for i in part.members), strict=True):
                    if not any(name in rows for name in column):
                        rows |= dict.fromkeys(name for name in column if name in registers)
        return list(rows | dict.fromkeys(registers))

    def plan(self, start: int, end: int) -> list[Part]:
        """The parts of the instructions from ``start`` up to ``end``, in the order to run."""
        plan = self._plans.get((start, end))
        if plan is None:
            plan = self._plans[(start, end)] = self._planned(start, end)
        return plan

    def _kind(self, index: int) -> tuple[str, Hashable]:
        """(what it may be moved across, what its likes have in common) of an instruction."""
        ins, entry = self._program.code[index], self._entries[index]
        reads, writes = self._uses[index]
        alone = ("alone", index)
        order = entry.order
        if order == "fixed":
            return order, alone
        if not self._watched.isdisjoint(reads | writes):
            return "ordered", alone
        if ins.guard is not None and order != "access":
            return ("pure" if order == "pure" else "ordered"), alone
        if order == "ordered" or any(t.name == "f64" for t in ins.types):
            return order, alone
        if order == "access" and (_SPACES.isdisjoint(ins.parts) or _STRONG & set(ins.parts)):
            return "ordered", alone
        if order == "lanes":
            given = [o.value if isinstance(o, Immediate) else None for o in ins.operands[2:]]
            if None in given or int(given[-1] or 0) & _ALL_LANES != _ALL_LANES:
                return "ordered", alone
            order = "pure"
        constants = entry.opcode in _ANY_CONSTANT
        shapes = tuple(self._shape(operand, constants) for operand in ins.operands)
        return order, (ins.opcode, ins.guard, shapes)

    def _shape(self, operand: Operand, constants: bool) -> Hashable:
        """What operands of a run must have in common."""
        if isinstance(operand, Name):
            scalar = self._program.registers.get(operand.name)
            if scalar is None:
                return operand
            return scalar.size, operand.negated
        if isinstance(operand, Immediate):
            return "constant" if constants else operand
        if isinstance(operand, Vector):
            return tuple(self._shape(item, constants) for item in operand.items)
        if isinstance(operand, Address):
            return "address", self._shape(operand.base, constants)
        return "pair", self._shape(operand.first, False), self._shape(operand.second, False)

    def _planned(self, start: int, end: int) -> list[Part]:
        kinds = {i: self._kind(i) for i in range(start, end)}
        plan: list[Part] = []
        first = start
        for index in range(start, end + 1):
            if index == end or kinds[index][0] == "fixed":
                plan += _Scheduler(range(first, index), kinds, self._uses).parts()
                if index < end:
                    plan.append(Part((index,), index - start))
                first = index + 1
        return plan


def _flat(operands: Sequence[Operand]) -> list[str]:
    """The names in operands, one per place; places without a register give what none is named."""
    out: list[str] = []
    for operand in operands:
        if isinstance(operand, Vector):
            out += _flat(operand.items)
        elif isinstance(operand, Address):
            out += _flat([operand.base])
        elif isinstance(operand, Pair):
            out += [operand.first.name, operand.second.name]
        else:
            out.append(operand.name if isinstance(operand, Name) else "")
    return out


class _Scheduler:
    """Orders a stretch without fixed instructions: greedily, the fullest runs first."""

    def __init__(self, stretch: range, kinds: dict[int, tuple[str, Hashable]], uses: Uses) -> None:
        self._kinds = kinds
        self._after: dict[int, set[int]] = {i: set() for i in stretch}
        self._waits = dict.fromkeys(stretch, 0)
        self._memory = [i for i in stretch if kinds[i][0] != "pure"]
        self._left: dict[Hashable, int] = {}
        self._ready: dict[Hashable, list[int]] = {}
        writer: dict[str, int] = {}
        readers: dict[str, list[int]] = {}
        for i in stretch:
            reads, writes = uses[i]
            for name in reads:
                self._edge(writer.get(name), i)
                readers.setdefault(name, []).append(i)
            for name in writes:
                self._edge(writer.get(name), i)
                for reader in readers.pop(name, ()):
                    self._edge(reader, i)
                writer[name] = i
            if kinds[i][0] == "pure":
                self._left[kinds[i][1]] = self._left.get(kinds[i][1], 0) + 1
        for i in stretch:
            self._arrive(i)

    def _edge(self, before: int | None, after: int) -> None:
        if before is not None and before != after and after not in self._after[before]:
            self._after[before].add(after)
            self._waits[after] += 1

    def _arrive(self, index: int) -> None:
        if not self._waits[index] and self._kinds[index][0] == "pure":
            self._ready.setdefault(self._kinds[index][1], []).append(index)

    def _neighbours(self) -> tuple[list[int], bool]:
        """The next accesses of memory that can run as one, and whether none of them is missing."""
        run: list[int] = []
        for i in self._memory:
            order, key = self._kinds[i]
            if run and (order != "access" or key != self._kinds[run[0]][1]):
                return run, True
            if self._waits[i]:
                return run, False
            run.append(i)
        return run, True

    def _next(self) -> list[int]:
        fullest = max(
            self._ready,
            key=lambda key: (len(self._ready[key]) / self._left[key], len(self._ready[key])),
            default=None,
        )
        if fullest is not None and len(self._ready[fullest]) == self._left[fullest]:
            return self._ready.pop(fullest)
        accesses, whole = self._neighbours()
        if accesses and (whole or fullest is None):
            self._memory = self._memory[len(accesses) :]
            return accesses
        assert fullest is not None, "a dependence that points back"
        return self._ready.pop(fullest)

    def parts(self) -> list[Part]:
        """All instructions of the stretch."""
        out: list[Part] = []
        while self._ready or self._memory:
            members = sorted(self._next())
            out.append(Part(tuple(members), None))
            for i in members:
                order, key = self._kinds[i]
                if order == "pure":
                    self._left[key] -= 1
                for following in self._after[i]:
                    self._waits[following] -= 1
                    self._arrive(following)
        return out
