"""One machine instruction as the reports count it, whatever the vendor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

CLASSES = (
    "tensor",  # matrix products: HMMA, IMMA, HGMMA, UTCHMMA, v_mfma
    "tensor memory",  # to, from and within sm_100's tensor memory
    "fp64",
    "fp32",
    "fp16",  # also bf16
    "special",  # reciprocals, exponentials, ...
    "integer",
    "convert",
    "move",
    "predicate",
    "constant",  # loads from constant banks and through the scalar cache
    "global",
    "generic",
    "shared",
    "shared matrix",  # LDSM, STSM
    "local",  # spills, stacks and arrays that registers cannot hold
    "async copy",
    "atomic",
    "texture",
    "barrier",  # barriers, fences and waits
    "shuffle",  # shuffles, votes, reductions across a warp
    "control",
    "nop",  # and what is predicated off for good
    "other",  # not in the tables: counted, and listed by name
)


@dataclass(frozen=True)
class Access:
    """What a memory instruction moves.

    Attributes:
        space: ``global``, ``shared``, ``local``, ``generic``.
        what: ``load``, ``store``, ``async load`` (global to shared, by thread), ``bulk load`` and
            ``bulk store`` (by the copy engine).
        bits: per thread; 0 for bulk copies, whose size is no part of the instruction.
    """

    space: str
    what: str
    bits: int

    def __str__(self) -> str:
        return f"{self.space} {self.what} {self.bits or ''}".rstrip()


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: bytes from the start of the function's section.
        opcode: with its modifiers, without operands: ``LDG.E.128``.
        kind: one of `CLASSES`.
        access: what it moves, or None.
        targets: addresses that it may jump to.
        falls_through: whether execution may go on with the next instruction.
    """

    address: int
    opcode: str
    kind: str
    access: Access | None = None
    targets: tuple[int, ...] = ()
    falls_through: bool = True


@dataclass(frozen=True)
class Mix:
    """Counts of instructions as they stand in the code, not as often as they run.

    Attributes:
        instructions: all but ``nop``.
        classes: by class; those that do not occur are absent.
        opcodes: by opcode with modifiers.
        memory: by space, direction and bits, as in ``global load 128``.
        other: opcodes that no table knows.
    """

    instructions: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    opcodes: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    other: dict[str, int] = field(default_factory=dict)


def count(instructions: Iterable[Instruction]) -> Mix:
    """The mix of some instructions."""
    everything = list(instructions)
    live = [i for i in everything if i.kind != "nop"]
    by_class = Counter(i.kind for i in everything)
    return Mix(
        instructions=len(live),
        classes={name: by_class[name] for name in CLASSES if by_class[name]},
        opcodes=dict(Counter(i.opcode for i in live).most_common()),
        memory=dict(sorted(Counter(str(i.access) for i in live if i.access).items())),
        other=dict(Counter(i.opcode for i in live if i.kind == "other").most_common()),
    )
