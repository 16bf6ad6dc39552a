"""Loops of a function, from its branches: where a kernel spends its time.

A loop is a strongly connected part of the control flow; taking its header away and looking again
gives the loops inside. That also finds loops whose slow path the compiler moved to the end of the
function, and such with two entries. Calls are taken to return: what a called function executes is
not counted into the loop that calls it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kimi_ops.testing.static.instructions import Instruction, Mix, count

# A loop of nothing but these, with a wait in it, only waits for somebody else.
_WAITING = {"barrier", "control", "integer", "move", "predicate", "constant", "nop", "shuffle"}
_WAITS = ("TRYWAIT", "NANOSLEEP", "s_sleep")


@dataclass(frozen=True)
class Loop:
    """One loop.

    Attributes:
        start: address of its header, bytes from the start of the section.
        depth: 1 for an outermost loop.
        waits: whether it only waits (on an mbarrier, or asleep).
        mix: its instructions, those of inner loops included.
    """

    start: int
    depth: int
    waits: bool
    mix: Mix


def _components(members: Sequence[int], successors: Sequence[Sequence[int]]) -> list[list[int]]:
    """Strongly connected components of the sub-graph of ``members`` (Tarjan, without recursion)."""
    inside = set(members)
    number: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    found: list[list[int]] = []
    for root in members:
        if root in number:
            continue
        number[root] = low[root] = len(number)
        stack.append(root)
        on_stack.add(root)
        work = [(root, iter(successors[root]))]
        while work:
            node, rest = work[-1]
            for other in rest:
                if other not in inside:
                    continue
                if other not in number:
                    number[other] = low[other] = len(number)
                    stack.append(other)
                    on_stack.add(other)
                    work.append((other, iter(successors[other])))
                    break
                if other in on_stack:
                    low[node] = min(low[node], number[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == number[node]:
                    component: list[int] = []
                    while not component or component[-1] != node:
                        component.append(stack.pop())
                        on_stack.discard(component[-1])
                    found.append(sorted(component))
    return found


def _successors(instructions: Sequence[Instruction]) -> list[list[int]]:
    place = {i.address: n for n, i in enumerate(instructions)}
    successors = [
        [place[t] for t in i.targets if t in place]
        + ([n + 1] if i.falls_through and n + 1 < len(instructions) else [])
        for n, i in enumerate(instructions)
    ]
    return successors


def in_loops(instructions: Sequence[Instruction]) -> frozenset[int]:
    """Addresses of what is in any loop of a function."""
    successors = _successors(instructions)
    return frozenset(
        instructions[n].address
        for component in _components(range(len(instructions)), successors)
        for n in component
        if len(component) > 1 or n in successors[n]
    )


def find_loops(instructions: Sequence[Instruction]) -> tuple[Loop, ...]:
    """All loops of a function, by address; the endless jump to itself after its end is none."""
    successors = _successors(instructions)
    before: list[list[int]] = [[] for _ in instructions]
    for n, following in enumerate(successors):
        for other in following:
            before[other].append(n)

    loops: list[Loop] = []
    pending = [(list(range(len(instructions))), 1)]
    while pending:
        members, depth = pending.pop()
        for component in _components(members, successors):
            first = component[0]
            if len(component) == 1 and successors[first] in ([], [first]):
                continue
            if len(component) == 1 and first not in successors[first]:
                continue
            own = set(component)
            entries = [n for n in component if any(b not in own for b in before[n])]
            header = min(entries, default=first)
            body = [instructions[n] for n in component]
            waits = {i.kind for i in body} <= _WAITING and any(
                word in i.opcode for i in body for word in _WAITS
            )
            loops.append(Loop(instructions[header].address, depth, waits, count(body)))
            pending.append(([n for n in component if n != header], depth + 1))
    return tuple(sorted(loops, key=lambda loop: (loop.start, loop.depth)))


def hottest(loops: Sequence[Loop]) -> Loop | None:
    """The loop that most likely runs most: the deepest that does not only wait, then the longest.

    A guess from the code alone, which does not know how often anything runs.
    """
    working = [loop for loop in loops if not loop.waits]
    return max(working, key=lambda loop: (loop.depth, loop.mix.instructions), default=None)
