"""Control flow of a program: blocks, the order that makes divergent threads meet again, and which
reads of registers need watching.

Groups of threads at different places run in the order of their blocks, lowest first, and merge when
they meet. The order is a reverse postorder that takes the ways out of a loop after the loop, so
that for reducible code a block comes after everything it post-dominates: groups meet at the
immediate post-dominator of the branch that parted them, as the hardware's convergence barriers have
it.
"""

from __future__ import annotations

from kimi_ops.testing.ptx.errors import PtxSyntaxError
from kimi_ops.testing.ptx.program import Program
from kimi_ops.testing.ptx.syntax import Instruction, Name


class Flow:
    """Blocks of a program.

    Attributes:
        leaders: indices at which a block starts, ascending.
        order: per instruction, rank of its block; unreachable blocks last.
        targets: index of a branch -> where it may go.
    """

    def __init__(self, program: Program) -> None:
        code = program.code
        self.targets = {
            i: _targets(program, ins)
            for i, ins in enumerate(code)
            if ins.parts[0] in ("bra", "brx")
        }
        leaders = {0} | {t for targets in self.targets.values() for t in targets}
        for i, ins in enumerate(code):
            if ins.parts[0] in ("bra", "brx", "ret", "exit"):
                leaders.add(i + 1)
        # A label may stand behind the last instruction.
        self.leaders = sorted(i for i in leaders if i < len(code))
        ends = [*self.leaders[1:], len(code)]
        self.block_of = [0] * len(code)
        for number, (start, end) in enumerate(zip(self.leaders, ends, strict=True)):
            self.block_of[start:end] = [number] * (end - start)
        self.ends = ends
        self.successors = [self._successors(code, number) for number in range(len(ends))]
        rank = self._ranks()
        self.order = [rank.get(b, len(ends)) for b in self.block_of]

    def _successors(self, code: list[Instruction], number: int) -> list[int]:
        last = self.ends[number] - 1
        ins = code[last]
        after = [number + 1] if number + 1 < len(self.ends) else []
        kind = ins.parts[0]
        if kind in ("bra", "brx"):
            taken = [self.block_of[t] for t in self.targets[last] if t < len(code)]
            return list(dict.fromkeys(taken + (after if ins.guard else [])))
        if kind in ("ret", "exit"):
            return after if ins.guard else []
        return after

    def _reachable(self) -> list[int]:
        """Reachable blocks in postorder of any depth-first walk."""
        seen, out = {0}, []
        stack = [(0, iter(self.successors[0]))]
        while stack:
            block, following = stack[-1]
            for successor in following:
                if successor not in seen:
                    seen.add(successor)
                    stack.append((successor, iter(self.successors[successor])))
                    break
            else:
                out.append(block)
                stack.pop()
        return out

    def _loops(self) -> list[int]:
        """Natural loops, each the bit set of its blocks."""
        blocks = self._reachable()[::-1]
        predecessors: dict[int, list[int]] = {b: [] for b in blocks}
        for b in blocks:
            for s in self.successors[b]:
                predecessors[s].append(b)
        everything = sum(1 << b for b in blocks)
        dominators = dict.fromkeys(blocks, everything)
        dominators[0] = 1
        changed = True
        while changed:
            changed = False
            for b in blocks[1:]:
                new = everything
                for p in predecessors[b]:
                    new &= dominators[p]
                new |= 1 << b
                if new != dominators[b]:
                    dominators[b], changed = new, True
        loops: dict[int, int] = {}
        for b in blocks:
            for header in self.successors[b]:
                if dominators[b] >> header & 1:
                    body, todo = 1 << header, [b]
                    while todo:
                        x = todo.pop()
                        if not body >> x & 1:
                            body |= 1 << x
                            todo += predecessors[x]
                    loops[header] = loops.get(header, 0) | body
        return list(loops.values())

    def _ranks(self) -> dict[int, int]:
        loops = self._loops()

        def shared_loops(a: int, b: int) -> int:
            return sum(body >> a & 1 & (body >> b) for body in loops)

        seen, postorder = {0}, []
        stack = [(0, iter(sorted(self.successors[0], key=lambda s: shared_loops(0, s))))]
        while stack:
            block, following = stack[-1]
            for successor in following:
                if successor not in seen:
                    seen.add(successor)
                    ways = sorted(
                        self.successors[successor],
                        key=lambda s, at=successor: shared_loops(at, s),  # type: ignore[misc]
                    )
                    stack.append((successor, iter(ways)))
                    break
            else:
                postorder.append(block)
                stack.pop()
        return {block: rank for rank, block in enumerate(reversed(postorder))}

    def unassigned(
        self, code: list[Instruction], facts: list[tuple[set[str], set[str]]]
    ) -> set[str]:
        """Registers that some path reads before an unconditional write.

        Args:
            facts: per instruction, (registers read, registers written).
        """
        every = {r for reads, writes in facts for r in reads | writes}
        bit = {r: 1 << i for i, r in enumerate(sorted(every))}
        generated = []
        for start, end in zip(self.leaders, self.ends, strict=True):
            mask = 0
            for i in range(start, end):
                if code[i].guard is None:
                    for r in facts[i][1]:
                        mask |= bit[r]
            generated.append(mask)
        full = sum(bit.values())
        blocks = self._reachable()[::-1]
        incoming = dict.fromkeys(blocks, full)
        incoming[0] = 0
        changed = True
        while changed:
            changed = False
            for b in blocks:
                out = incoming[b] | generated[b]
                for s in self.successors[b]:
                    if incoming[s] & out != incoming[s]:
                        incoming[s] &= out
                        changed = True
        found: set[str] = set()
        for b in blocks:
            have = incoming[b]
            for i in range(self.leaders[b], self.ends[b]):
                reads, writes = facts[i]
                found |= {r for r in reads if not have & bit[r]}
                if code[i].guard is None:
                    for r in writes:
                        have |= bit[r]
        return found


def _targets(program: Program, ins: Instruction) -> list[int]:
    operand = ins.operands[-1]
    if not isinstance(operand, Name):
        raise PtxSyntaxError(f"line {ins.line}: {ins.opcode} without a label")
    labels = program.branch_tables.get(operand.name, (operand.name,))
    for label in labels:
        if label not in program.labels:
            raise PtxSyntaxError(f"line {ins.line}: no label {label!r}")
    return [program.labels[label] for label in labels]
