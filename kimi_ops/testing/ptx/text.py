"""What follows from the text of a kernel alone, once for all its launches."""

from __future__ import annotations

from functools import cached_property

from kimi_ops.testing.ptx.counters import tensor_kind
from kimi_ops.testing.ptx.flow import Flow
from kimi_ops.testing.ptx.fusion import Fusion
from kimi_ops.testing.ptx.program import Program
from kimi_ops.testing.ptx.registry import lookup
from kimi_ops.testing.ptx.syntax import Immediate
from kimi_ops.testing.ptx.trace import Static, static_code
from kimi_ops.testing.ptx.types import TYPES
from kimi_ops.testing.ptx.uses import never_needed, register_uses, watched_registers

_SPACES = {"global", "shared", "local", "param", "const"}


class Text:
    """A program with what implements it.

    Attributes:
        program: the text.
        entries: per instruction, what implements it.
        uses: per instruction, (registers read, registers written).
        flow: its blocks.
        watched: registers that some path may read before it writes them.
        granules: least width in bytes of accesses of "shared" and of "global" memory.

    Raises:
        UnsupportedPtx: an instruction that nothing implements; names it and its line.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.entries = [lookup(ins) for ins in program.code]
        self.uses = [
            register_uses(ins, entry, program.registers)
            for ins, entry in zip(program.code, self.entries, strict=True)
        ]
        self.flow = Flow(program)
        unassigned = self.flow.unassigned(program.code, self.uses)
        unassigned -= never_needed(unassigned, program.code, self.uses)
        self.watched = watched_registers(unassigned, self.uses, self.entries)
        self.granules = {space: self._smallest((space,)) for space in ("shared", "global")}

    @cached_property
    def fusion(self) -> Fusion:
        """Which instructions run as one."""
        return Fusion(self.program, self.flow, self.entries, self.uses, self.watched)

    @cached_property
    def code(self) -> tuple[Static, ...]:
        """The instructions as a trace has them."""
        return static_code(self.program, self.entries, self.uses)

    @cached_property
    def kinds(self) -> list[tuple[str, str, str]]:
        """Per instruction: class, opcode without types, and `tensor_kind` if it multiplies."""
        return [
            (
                entry.family,
                ".".join(p for p in ins.parts if p not in TYPES),
                tensor_kind(ins) if entry.family == "matrix" and len(ins.types) > 1 else "",
            )
            for ins, entry in zip(self.program.code, self.entries, strict=True)
        ]

    def _smallest(self, spaces: tuple[str, ...]) -> int:
        """The least width at which the program may touch a space; generic accesses count."""
        widths = [16]
        for ins in self.program.code:
            parts = ins.parts
            named = {p.split("::")[0] for p in parts} & _SPACES
            touches = not named or bool(named & set(spaces))
            if parts[0] in ("ld", "st", "atom", "red") and touches and ins.types:
                vector = max([int(p[1:]) for p in parts if p in ("v2", "v4", "v8")], default=1)
                if parts[0] in ("atom", "red"):
                    vector = 1
                widths.append(ins.types[-1].size * vector)
            elif parts[0] == "mbarrier":
                widths.append(8)
            elif parts[0] == "tensormap":
                widths.append(4)
            elif "bulk" in parts:
                # A tile may end at any element of a tensor; none is seen to have one byte.
                widths.append(16 if "shared" in spaces else 2 if "tensor" in parts else 16)
            elif parts[:2] == ("cp", "async") and len(ins.operands) >= 3:
                size = ins.operands[2]
                widths.append(int(size.value) if isinstance(size, Immediate) else 4)
        return min(widths)
