"""How many machine instructions a launch issues, by pipe, from what the emulator executed as PTX.

Every machine instruction carries the source line that it is from (the line table of the cubin), and
so does every PTX instruction. Machine instructions of a line are taken to run as often as the PTX
instructions of that line do on average: matrix and memory instructions as often as those of their
own kind, the others as often as the rest. Those of lines without executed PTX run once per warp.
Where ptxas has unrolled loops once more, lines that run often have several copies of everything;
the number of copies is that of matrix instructions, or else of memory instructions, over PTX's, and
each copy runs that much less often. What sets registers to zero and is in no loop runs once per
warp, whatever its line: that of accumulators has the line of the loop that follows.

Matrix instructions survive ptxas one to one, so what this estimates for them over the exact count
of the emulator is the check; it is part of the result. Without a line table PTX itself is counted.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import PurePosixPath

from kimi_ops.testing.cost.latency import FREE, SPECIAL, CostError
from kimi_ops.testing.ptx.kernel import Report
from kimi_ops.testing.ptx.trace import Trace
from kimi_ops.testing.static.disassembly import read_sass
from kimi_ops.testing.static.loops import in_loops
from kimi_ops.testing.static.opcodes import classify
from kimi_ops.testing.static.report import KernelReport
from kimi_ops.testing.static.toolchain import run_tool

Line = tuple[str, int]
# Pipe of each class of `kimi_ops.testing.static.instructions`; the others only take issue slots.
_PIPES = {
    "tensor": "tensor",
    "special": "special",
    "fp32": "fp32",
    "fp16": "fp32",
    "integer": "int32",
    "convert": "int32",
    **dict.fromkeys(
        ["global", "generic", "shared", "local", "atomic", "texture", "shuffle"], "load_store"
    ),
    "shared matrix": "load_store",
    "async copy": "load_store",
}
_FAMILIES = {
    "float": "fp32",
    "integer": "int32",
    "conversion": "int32",
    "memory": "load_store",
    "async copy": "load_store",
    "warp": "load_store",
    "matrix": "tensor",
}
# A line is in a loop if its PTX runs this often per warp: more than once, but for divergence.
_HOT = 1.5

# Waits and fences of asynchronous instructions: barriers for the hardware.
_WAITS = re.compile(r"\.(commit_group|wait_group|wait_all|fence)\b")
_SECTION = re.compile(r'\s*\.section\s+"?\.text\.([^",\s]+)')
_ANY_SECTION = re.compile(r"\s*\.section\s")
_LABEL = re.compile(r"([^\s:/]+):\s*$")
_FILE = re.compile(r'\s*//## File "([^"]*)", line (\d+)')
_ZEROING = re.compile(r"(CS2R\S* +\S+ SRZ|(MOV|IMAD\.MOV\S*) .*RZ *$)")
_INSTRUCTION = re.compile(
    r"\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(!?U?P(?:T|\d+))\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)(.*?);?\s*$"
)


@dataclass(frozen=True)
class MachineCode:
    """Machine instructions of a launch.

    Attributes:
        source: "SASS" or, without a line table, "PTX".
        issued: warp instructions of all pipes.
        pipes: warp instructions by pipe: tensor, special, fp32, int32, load_store; what is issued
            beyond them uses none.
        unrolled: copies of hot code.
        expansion: issued over PTX instructions.
        tensor_check: estimated over exact matrix instructions; None without any.
    """

    source: str
    issued: float
    pipes: dict[str, float]
    unrolled: int
    expansion: float
    tensor_check: float | None


def _pipe(opcode: str, operands: str) -> str | None:
    base = opcode.partition(".")[0]
    if base in ("I2F", "F2I", "F2F", "FRND"):
        return "special"
    if base == "IMAD":
        # Integer multiply-adds run where the float ones do.
        return "fp32"
    if base in ("VOTE", "VOTEU", "ELECT") or base.startswith("U"):
        return None
    return _PIPES.get(classify(opcode, operands))


@dataclass
class _Machine:
    """Machine instructions of one source line, by pipe; "" is no pipe."""

    looped: Counter[str] = field(default_factory=Counter)  # or anything else
    once: Counter[str] = field(default_factory=Counter)  # what sets registers to zero before loops

    @property
    def all(self) -> Counter[str]:
        """Both together."""
        return self.looped + self.once


@lru_cache(maxsize=16)
def _lines(cubin: bytes, kernel: str) -> dict[Line, _Machine]:
    """The instructions of each source line."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = run_tool("nvdisasm", "-g", "-c", file.name)[0]
    functions = read_sass(text, kernel)
    if kernel not in functions:
        raise CostError(f"the cubin has no code of {kernel}")
    looped = in_loops(functions[kernel].instructions)
    lines: dict[Line, _Machine] = {}
    line: Line = ("", 0)
    inside = grouped = False
    label = ""
    for row in text.splitlines():
        if _ANY_SECTION.match(row):
            section = _SECTION.match(row)
            inside = section is not None and section[1] == kernel
        if not inside:
            continue
        if place := _FILE.match(row):
            # The first of a group is the innermost of inlined places, as in the PTX.
            if not grouped:
                line = (PurePosixPath(place[1]).name, int(place[2]))
            grouped = True
            continue
        grouped = False
        if named := _LABEL.match(row):
            label = named[1]
        elif match := _INSTRUCTION.match(row):
            # The jump to itself behind the last instruction never runs.
            idle = match[3].startswith("NOP") or (label and f"`({label})" in match[4])
            if not idle and match[2] not in ("!PT", "!UPT"):
                zeroing = _ZEROING.match(f"{match[3]} {match[4].strip()}") is not None
                mine = lines.setdefault(line, _Machine())
                once = zeroing and int(match["address"], 16) not in looped
                (mine.once if once else mine.looped)[_pipe(match[3], match[4]) or ""] += 1
            label = ""
    return lines


def _kind(family: str) -> str:
    """Kinds that are matched among themselves."""
    if family == "matrix":
        return "tensor"
    return "load_store" if _FAMILIES.get(family) == "load_store" else "rest"


def _counted(opcode: str, family: str) -> bool:
    """Whether a PTX instruction has machine instructions of its own."""
    free = opcode.partition(".")[0] in FREE or opcode.startswith("ld.param")
    return not free and family not in ("control", "barrier") and not _WAITS.search(opcode)


def _from_ptx(report: Report) -> MachineCode:
    pipes: Counter[str] = Counter()
    for family, n in report.total.instructions.items():
        if family in _FAMILIES:
            pipes[_FAMILIES[family]] += n
    special = sum(n for op, n in report.total.opcodes.items() if op.partition(".")[0] in SPECIAL)
    pipes["fp32"] -= special
    pipes["special"] += special
    parameters = sum(n for op, n in report.total.opcodes.items() if op.startswith("ld.param"))
    pipes["load_store"] -= parameters
    free = sum(n for op, n in report.total.opcodes.items() if op.partition(".")[0] in FREE)
    issued = report.total.warp_instructions - free - parameters
    return MachineCode("PTX", issued, dict(pipes), 1, 1, None)


def _short(loc: tuple[str, int]) -> Line:
    return PurePosixPath(loc[0]).name, loc[1]


@dataclass
class _Ptx:
    """PTX instructions of one source line, by kind: in the text, and warps that executed them."""

    static: Counter[str] = field(default_factory=Counter)
    executed: Counter[str] = field(default_factory=Counter)

    def times(self, kind: str) -> float:
        """How often one of a kind runs; of all, where the line has none of the kind."""
        if self.static[kind]:
            return self.executed[kind] / self.static[kind]
        return sum(self.executed.values()) / sum(self.static.values())


def _ptx_lines(trace: Trace) -> dict[Line, _Ptx]:
    found: dict[Line, _Ptx] = {}
    executed = trace.executed
    for ins, n in zip(trace.code, executed, strict=True):
        if _counted(ins.opcode, ins.family):
            line = found.setdefault(_short(ins.loc), _Ptx())
            line.static[_kind(ins.family)] += 1
            line.executed[_kind(ins.family)] += n
    return found


def _copies(lines: dict[Line, _Machine], ptx: dict[Line, _Ptx], hot: set[Line]) -> int:
    """Copies of hot code that ptxas has made."""
    if matrix := sum(line.static["tensor"] for line in ptx.values()):
        return max(1, round(sum(mine.all["tensor"] for mine in lines.values()) / matrix))
    memory = sum(ptx[line].static["load_store"] for line in hot)
    moved = sum(mine.all["load_store"] for line, mine in lines.items() if line in hot)
    return max(1, round(moved / memory)) if memory else 1


def machine_code(report: Report, compiled: KernelReport) -> MachineCode:
    """Machine instructions that the launch of a report issues.

    Args:
        report: of the emulator, with its trace.
        compiled: the same PTX compiled, with its cubin.

    Raises:
        CostError: no trace, no cubin, or no code of the kernel in it.
    """
    trace, cubin = report.trace, compiled.artifacts.get("cubin")
    if trace is None or not isinstance(cubin, bytes):
        raise CostError("the machine code needs the report's trace and the compiled cubin")
    lines = _lines(cubin, compiled.kernel)
    if set(lines) == {("", 0)}:
        return _from_ptx(report)
    warps = report.ctas * trace.warps
    ptx = _ptx_lines(trace)
    hot = {k for k, line in ptx.items() if line.times("") > _HOT * warps}
    unrolled = _copies(lines, ptx, hot)
    pipes: Counter[str] = Counter()
    for line, mine in lines.items():
        for pipe in mine.all:
            kind = pipe if pipe in ("tensor", "load_store") else "rest"
            times = ptx[line].times(kind) if line in ptx else warps
            times /= unrolled if line in hot else 1
            pipes[pipe] += round(mine.looped[pipe] * times + mine.once[pipe] * min(times, warps))
    issued = sum(pipes.values())
    exact = sum(line.executed["tensor"] for line in ptx.values())
    check = pipes["tensor"] / exact if exact else None
    del pipes[""]
    total = sum(sum(line.executed.values()) for line in ptx.values())
    return MachineCode("SASS", issued, dict(pipes), unrolled, issued / max(total, 1), check)
