"""What a PTX module is made of, after parsing.

Source: PTX ISA, "Syntax", "State Spaces, Types, and Variables", "Instruction Operands".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

from kimi_ops.testing.ptx.types import TYPES, ScalarType


@dataclass(frozen=True)
class Name:
    """A register, special register, variable or label; ``negated`` for ``!p``."""

    name: str
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    """A constant: an int, or a float with the bits that ``0f``/``0d`` gave (``bits``, ``size``)."""

    value: int | float
    bits: int | None = None
    size: int = 0


@dataclass(frozen=True)
class Vector:
    """``{a, b, ...}``"""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """``[base + offset]``; ``coords`` are the tensor coordinates of ``[map, {x, y}]``."""

    base: Name | Immediate
    offset: int = 0
    coords: tuple[Operand, ...] = ()


@dataclass(frozen=True)
class Pair:
    """``d|p``: two results."""

    first: Name
    second: Name


Operand: TypeAlias = Name | Immediate | Vector | Address | Pair


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: with all its modifiers, e.g. "ld.global.v4.b32".
        operands: in the order of the text.
        guard: the predicate of ``@p`` or ``@!p``.
        line: in the PTX text, from 1.
        loc: (file, line) of the last ``.loc``, or ("", 0).
    """

    opcode: str
    operands: tuple[Operand, ...]
    guard: Name | None
    line: int
    loc: tuple[str, int]

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The opcode split at its dots."""
        return tuple(self.opcode.split("."))

    @cached_property
    def types(self) -> tuple[ScalarType, ...]:
        """The types among the modifiers, in order."""
        return tuple(TYPES[p] for p in self.parts[1:] if p in TYPES)


@dataclass(frozen=True)
class Variable:
    """A variable in memory or a parameter.

    Attributes:
        name, space: "shared", "global", "const", "local" or "param".
        size: bytes; 0 for ``extern`` arrays of unknown length.
        align: bytes.
        type: of an element.
        data: initial bytes, or None.
        pointers: byte offset -> name of the variable whose address belongs there.
    """

    name: str
    space: str
    size: int
    align: int
    type: ScalarType
    data: bytes | None = None
    pointers: tuple[tuple[int, str], ...] = ()


@dataclass
class Function:
    """An ``.entry`` or ``.func``: its parts, still with the names of the text.

    Attributes:
        params, results: formal parameters in order.
        body: instructions.
        labels: name -> index into ``body``.
        branch_tables: name of a ``.branchtargets`` list -> labels.
        registers: name -> type.
        variables: declared inside.
        required_block: ``.reqntid``, or ().
        max_block: ``.maxntid``, or ().
        max_registers, min_ctas: ``.maxnreg`` and ``.minnctapersm``, or 0.
    """

    name: str
    entry: bool
    params: list[Variable] = field(default_factory=list)
    results: list[Variable] = field(default_factory=list)
    body: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    branch_tables: dict[str, tuple[str, ...]] = field(default_factory=dict)
    registers: dict[str, ScalarType] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    required_block: tuple[int, ...] = ()
    max_block: tuple[int, ...] = ()
    max_registers: int = 0
    min_ctas: int = 0
    defined: bool = False


@dataclass
class Module:
    """A parsed PTX text: version ("8.7"), target ("sm_80"), variables and functions by name."""

    version: str = ""
    target: str = ""
    variables: dict[str, Variable] = field(default_factory=dict)
    functions: dict[str, Function] = field(default_factory=dict)
    files: dict[int, str] = field(default_factory=dict)

    @property
    def entries(self) -> tuple[str, ...]:
        """Names of the kernels."""
        return tuple(f.name for f in self.functions.values() if f.entry and f.defined)
