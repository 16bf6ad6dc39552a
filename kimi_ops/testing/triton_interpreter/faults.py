"""What the interpreter reports: faults by name, and the record of what ran."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

FAULTS = {
    "out of bounds": "an address outside the tensor that it was computed from",
    "misaligned": "an address that is no multiple of the element's size",
    "freed": "an address in memory that torch has given back",
    "wild": "an address that no tensor ever had",
    "uninitialised": "a load of bytes that nobody has written",
    "overlapping store": "two lanes of one store write the same address",
    "race": "two programs of a launch use an address, one of them writes, nothing orders them",
    "unsynchronised": "two lanes of a program use an address, one writes, without a barrier",
    "integer overflow": "an address computed from 32-bit (or narrower) arithmetic that overflowed",
    "false hint": "tl.multiple_of, tl.max_contiguous or tl.assume says what is not so",
    "failed assertion": "a tl.device_assert of the kernel",
    "waits forever": "a program spins on a value that only a later program could change",
}


class UnsupportedByInterpreter(NotImplementedError):  # noqa: N818, it says what it is
    """A kernel uses something that this interpreter cannot execute faithfully; names it."""


@dataclass(frozen=True)
class Place:
    """Where in a launch something happened.

    Attributes:
        kernel: name of the kernel.
        program: its (x, y, z) in the grid.
        function: the jit'd function, the kernel or one that it calls.
        file, line: source position of the operation.
    """

    kernel: str
    program: tuple[int, int, int]
    function: str
    file: str
    line: int

    def __str__(self) -> str:
        inside = "" if self.function == self.kernel else f" in {self.function}"
        return f"{self.kernel}{self.program} at {self.file}:{self.line}{inside}"


class KernelFault(AssertionError):  # noqa: N818, a fault is its name
    """A kernel did what would be wrong on a GPU.

    Attributes:
        kind: a key of `FAULTS`.
        where: the operation that was caught.
        other: the earlier operation that it conflicts with, for those that have one.
        detail: the rest of the message.
    """

    def __init__(self, kind: str, detail: str, where: Place, other: Place | None = None) -> None:
        if kind not in FAULTS:
            raise ValueError(f"unknown kind of fault {kind!r}")
        against = f"; against {other}" if other else ""
        super().__init__(f"{kind}: {where}: {detail}{against}")
        self.kind = kind
        self.where = where
        self.other = other
        self.detail = detail


@dataclass
class Launch:
    """What one launch did.

    Attributes:
        kernel: name of the kernel.
        grid: programs in (x, y, z).
        loaded_bytes, stored_bytes: of active lanes, repeats counted.
        atomics: atomic operations of active lanes.
        dots: calls of ``tl.dot`` over all programs.
    """

    kernel: str
    grid: tuple[int, int, int]
    loaded_bytes: int = 0
    stored_bytes: int = 0
    atomics: int = 0
    dots: int = 0


@dataclass
class Report:
    """Everything that happened inside one ``with interpreted(...)`` block.

    Attributes:
        launches: in order.
        faults: what was found; more than one only with ``keep_going=True``.
        unwritten: bytes of a tensor that counted as uninitialised and that nothing has written
            since; 0 for any other tensor.
    """

    launches: list[Launch] = field(default_factory=list)
    faults: list[KernelFault] = field(default_factory=list)
    unwritten: Callable[[Tensor], int] = field(default=lambda _: 0, repr=False)

    def kinds(self) -> Sequence[str]:
        """The kinds of the faults found, each once, in order of appearance."""
        return list(dict.fromkeys(fault.kind for fault in self.faults))

    def add(self, fault: KernelFault) -> bool:
        """Keeps a fault unless the same two lines already gave one of its kind."""

        def key(f: KernelFault) -> tuple[object, ...]:
            other = (f.other.file, f.other.line) if f.other else None
            return f.kind, f.where.file, f.where.line, other

        if key(fault) in {key(f) for f in self.faults}:
            return False
        self.faults.append(fault)
        return True
