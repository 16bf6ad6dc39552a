"""Functions of a cubin as lists of instructions, read from what ``nvdisasm -c`` prints."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kimi_ops.testing.static.instructions import Instruction
from kimi_ops.testing.static.opcodes import access, classify

# From sm_70 on every instruction is one 128-bit word.
INSTRUCTION_BYTES = 16

_SECTION = re.compile(r'\s*\.section\s+"?(\.[^",\s]+)"?')
_LABEL = re.compile(r"([^\s:/]+):\s*$")
_ADDRESS = re.compile(r"\s*/\*([0-9a-f]{4,})\*/")
_INSTRUCTION = re.compile(
    r"\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+"
    r"(?:@(?P<guard>!?U?P(?:T|\d+))\s+)?"
    r"(?P<opcode>[A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)"
    r"(?P<operands>(?:\s.*?)?)\s*;?\s*$"
)
_TARGET = re.compile(r"`\(([^)]*)\)")
_TABLE_TARGETS = re.compile(r'\(\*"BRANCH_TARGETS ([^"]*)"\*\)')


class DisassemblyError(ValueError):
    """The disassembly has a line, or a label, that this reader does not understand."""


@dataclass(frozen=True)
class Function:
    """One kernel's code.

    Attributes:
        name: of the kernel, mangled as in the cubin.
        instructions: in the order of their addresses, padding included.
        labels: names defined inside, among them functions that the kernel calls.
        unresolved: addresses of indirect jumps whose targets the disassembler does not know.
    """

    name: str
    instructions: tuple[Instruction, ...]
    labels: frozenset[str]
    unresolved: tuple[int, ...]

    @property
    def code_bytes(self) -> int:
        """Size in the cubin, padding included."""
        return len(self.instructions) * INSTRUCTION_BYTES


def _jump(match: re.Match[str], labels: dict[str, int]) -> tuple[tuple[int, ...], bool, bool]:
    """Targets, whether execution may fall through, and whether the targets are known."""
    base = match["opcode"].partition(".")[0]
    operands = match["operands"].strip()
    conditional = match["guard"] not in (None, "PT", "UPT")
    if base in ("EXIT", "RET", "KILL"):
        return (), conditional, True
    if base in ("BRX", "BRXU", "JMX", "JMXU"):
        table = _TABLE_TARGETS.search(operands)
        names = table[1].split(",") if table else []
    elif base in ("BRA", "JMP"):
        names = _TARGET.findall(operands)
        # BRA.U !UP0, `(.L_x_1): a predicate among the operands.
        conditional = conditional or not operands.startswith("`")
    else:
        return (), True, True
    unknown = [name for name in names if name not in labels]
    if unknown:
        raise DisassemblyError(f"jump to an unknown label {unknown[0]!r}: {match[0].strip()}")
    return tuple(labels[name] for name in names), conditional, bool(names)


def _function(name: str, lines: list[str]) -> Function:
    labels: dict[str, int] = {}
    matches: list[re.Match[str]] = []
    for line in lines:
        if label := _LABEL.match(line):
            labels[label[1]] = len(matches) * INSTRUCTION_BYTES
        elif _ADDRESS.match(line):
            match = _INSTRUCTION.match(line)
            if match is None:
                raise DisassemblyError(f"{name}: not understood: {line.strip()}")
            if int(match["address"], 16) != len(matches) * INSTRUCTION_BYTES:
                raise DisassemblyError(f"{name}: address out of sequence: {line.strip()}")
            matches.append(match)
    instructions = []
    unresolved = []
    for match in matches:
        opcode, operands = match["opcode"], match["operands"].strip()
        address = int(match["address"], 16)
        if match["guard"] in ("!PT", "!UPT"):
            # Never executed; ptxas puts such loads before an LDGSTS.
            instructions.append(Instruction(address, opcode, "nop"))
            continue
        targets, falls_through, known = _jump(match, labels)
        if not known:
            unresolved.append(address)
        kind = classify(opcode, operands)
        moved = access(opcode, operands)
        instructions.append(Instruction(address, opcode, kind, moved, targets, falls_through))
    return Function(name, tuple(instructions), frozenset(labels), tuple(unresolved))


def read_sass(text: str, only: str | None = None) -> dict[str, Function]:
    """Kernels by name.

    Args:
        text: all that ``nvdisasm -c`` printed for one cubin.
        only: name of the one kernel that is wanted; the others take their time.

    Raises:
        DisassemblyError: a line that cannot be an instruction, or a jump to nowhere.
    """
    sections: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in text.splitlines():
        if section := _SECTION.match(line):
            name = section[1].removeprefix(".text.")
            is_wanted = name != section[1] and only in (None, name)
            current = sections.setdefault(name, []) if is_wanted else None
        elif current is not None:
            current.append(line)
    return {name: _function(name, lines) for name, lines in sections.items()}
