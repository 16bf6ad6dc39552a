"""Which registers an instruction reads and writes, and which may hold what nobody wrote.

Compilers pass unknown values through data flow that ends unused, as when a warp reduces a few lanes
with shuffles of all. So registers that some path may read before they are written, and whatever is
made of them, carry a flag per lane; reading an unknown one is an error where it matters: in
addresses, predicates, stores, matrix instructions and everything that is not plain arithmetic.

LLVM also joins bytes or halves with one that it leaves open, which a later ``prmt`` or ``mov``
drops: a register none of whose bytes reaches anything carries no flag.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

from kimi_ops.testing.ptx.registry import Entry
from kimi_ops.testing.ptx.syntax import Address, Immediate, Instruction, Name, Operand, Pair, Vector

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


def byte_moves(ins: Instruction) -> list[tuple[str, int, str, int]] | None:
    """(register, byte of it, register it goes to, byte there) for each byte that a ``prmt`` or a
    ``mov`` of halves passes on; None for any other instruction."""
    result, *sources = ins.operands or (None,)
    if ins.guard is not None or ins.opcode not in ("prmt.b32", "mov.b32"):
        return None
    if ins.opcode == "prmt.b32":
        selector = sources.pop()
        if not isinstance(selector, Immediate):
            return None
        choices = [int(selector.value) >> 4 * place & 7 for place in range(4)]
        ends = [(sources[c // 4], c % 4, result, place) for place, c in enumerate(choices)]
    elif isinstance(result, Vector) and len(result.items) == 2:
        ends = [(sources[0], i, result.items[i // 2], i % 2) for i in range(4)]
    elif isinstance(sources[0], Vector) and len(sources[0].items) == 2:
        ends = [(sources[0].items[i // 2], i % 2, result, i) for i in range(4)]
    else:
        return None
    return [
        (source.name, i, target.name, j)
        for source, i, target, j in ends
        if isinstance(source, Name) and isinstance(target, Name)
    ]


def never_needed(
    unassigned: set[str], code: Sequence[Instruction], uses: list[tuple[set[str], set[str]]]
) -> set[str]:
    """Those of the registers of which every chain of `byte_moves` drops all bytes."""
    readers: dict[str, list[int]] = {}
    for index, (reads, _) in enumerate(uses):
        for name in reads:
            readers.setdefault(name, []).append(index)
    needed: dict[str, set[int]] = {}  # bytes of a register that something else reads

    def bytes_of(name: str) -> set[int]:
        if name not in needed:
            needed[name] = set(range(4))  # in a loop: all of them
            found: set[int] = set()
            for index in readers.get(name, []):
                moves = byte_moves(code[index])
                if moves is None:
                    found |= set(range(4))
                else:
                    found |= {i for s, i, to, j in moves if s == name and j in bytes_of(to)}
            needed[name] = found
        return needed[name]

    return {name for name in unassigned if not bytes_of(name)}
