"""Which registers an instruction reads and writes, and which may hold what nobody wrote.

Compilers pass unknown values through data flow that ends unused, as when a warp reduces a few lanes
with shuffles of all. So registers that some path may read before they are written, and whatever is
made of them, carry a flag per lane; reading an unknown one is an error where it matters: in
addresses, predicates, stores, matrix instructions and everything that is not plain arithmetic.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

from kimi_ops.testing.ptx.registry import Entry
from kimi_ops.testing.ptx.syntax import Address, Instruction, Name, Operand, Pair, Vector

# Families whose results are unknown where an operand is; all others must know their operands.
CARRYING = ("integer", "float", "conversion", "move")


def names(operand: Operand) -> Iterator[str]:
    """The names in an operand."""
    if isinstance(operand, Name):
        yield operand.name
    elif isinstance(operand, Vector):
        for item in operand.items:
            yield from names(item)
    elif isinstance(operand, Pair):
        yield from (operand.first.name, operand.second.name)
    elif isinstance(operand, Address):
        yield from names(operand.base)
        for item in operand.coords:
            yield from names(item)


def register_uses(
    ins: Instruction, entry: Entry, registers: Container[str]
) -> tuple[set[str], set[str]]:
    """(registers that an instruction reads, registers that it writes)."""
    reads = {ins.guard.name} if ins.guard else set()
    writes: set[str] = set()
    for position, operand in enumerate(ins.operands):
        found = {name for name in names(operand) if name in registers}
        if position < entry.results:
            writes |= found
            if entry.reads_results:
                reads |= found
        else:
            reads |= found
    return reads, writes


def watched_registers(
    unassigned: set[str], uses: list[tuple[set[str], set[str]]], entries: list[Entry]
) -> set[str]:
    """Registers that may hold a value never written: those found so, and what is made of them."""
    watched = set(unassigned)
    grew = bool(watched)
    while grew:
        grew = False
        for (reads, writes), entry in zip(uses, entries, strict=True):
            carries = entry.family in CARRYING or entry.opcode == "shfl.sync"
            if carries and not reads.isdisjoint(watched) and not writes <= watched:
                watched |= writes
                grew = True
    return watched
