"""Which instructions the emulator implements; the families add themselves on import.

To add an instruction: write, in its family's module, a function that takes a `Binder` and returns a
step, and decorate it with `instruction`. Everything that the text may say must be listed (types,
modifiers): what is not listed is an error that names it. The table in the documentation is made
from the same entries (``python -m kimi_ops.testing.ptx.table``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kimi_ops.testing.ptx.errors import UnsupportedPtx
from kimi_ops.testing.ptx.syntax import Instruction
from kimi_ops.testing.ptx.types import TYPES

if TYPE_CHECKING:
    from kimi_ops.testing.ptx.binding import Binder

Build = Callable[["Binder"], Any]


@dataclass(frozen=True)
class Entry:
    """One implemented instruction.

    Attributes:
        opcode: its first dotted parts, e.g. "add" or "cp.async.wait_group".
        family: class for the counters.
        section: title of its section in the PTX ISA; numbers differ between versions.
        types: type modifiers that it takes.
        modifiers: all others.
        results: leading operands that it writes.
        reads_results: whether it reads them too.
        control: whether it decides where threads go on; such a step returns groups.
        order: what it may be moved across, and whether it runs as one with its likes: "pure",
            "lanes", "access", "ordered" or "fixed", as `kimi_ops.testing.ptx.fusion` explains.
        build: makes the step.
        summary: first line of its docstring.
    """

    opcode: str
    family: str
    section: str
    types: frozenset[str]
    modifiers: frozenset[str]
    results: int
    reads_results: bool
    control: bool
    order: str
    build: Build
    summary: str


ENTRIES: list[Entry] = []
_BY_OPCODE: dict[str, list[Entry]] = {}
# Groups of types that entries share.
INTEGERS = "u16 u32 u64 s16 s32 s64"
BIT_TYPES = "b16 b32 b64"
MEMORY_TYPES = "b8 b16 b32 b64 u8 u16 u32 u64 s8 s16 s32 s64 f32 f64"


def instruction(
    opcode: str,
    *,
    family: str,
    section: str,
    types: str = "",
    modifiers: str = "",
    results: int = 1,
    reads_results: bool = False,
    control: bool = False,
    order: str = "fixed",
) -> Callable[[Build], Build]:
    """Registers the function below it for ``opcode``; several names are separated by spaces.

    Unless ``order`` is "ordered" or "fixed", operands may come as [n, lanes], for a run of n
    instructions, and the step must give results of that shape (`Binder.shape`).
    """

    def register(build: Build) -> Build:
        summary = (build.__doc__ or "").strip().splitlines()[0]
        for name in opcode.split():
            entry = Entry(
                name,
                family,
                section,
                frozenset(types.split()),
                frozenset(modifiers.split()),
                results,
                reads_results,
                control,
                order,
                build,
                summary,
            )
            ENTRIES.append(entry)
            _BY_OPCODE.setdefault(name, []).append(entry)
        return build

    return register


def lookup(ins: Instruction) -> Entry:
    """The entry of an instruction.

    Raises:
        UnsupportedPtx: names the opcode, type or modifier that nothing implements, and the line.
    """
    parts = ins.parts
    where = f"PTX line {ins.line}: {ins.opcode}"
    for length in range(len(parts), 0, -1):
        entries = _BY_OPCODE.get(".".join(parts[:length]))
        if entries is None:
            continue
        types = [p for p in parts[length:] if p in TYPES]
        rest = [p for p in parts[length:] if p not in TYPES]
        reasons = []
        for entry in entries:
            wrong = [t for t in types if t not in entry.types]
            wrong += [m for m in rest if m not in entry.modifiers]
            if not wrong:
                return entry
            reasons.append(wrong)
        fewest = min(reasons, key=len)
        raise UnsupportedPtx(
            f"unsupported modifier .{' .'.join(fewest)} of {'.'.join(parts[:length])}", where
        )
    raise UnsupportedPtx(f"unsupported instruction {parts[0]}", where)
