"""Binds one instruction to the registers of a machine.

A family's builder asks a `Binder` for its operands and gets numpy arrays, one element per lane of
the whole batch (a scalar for an immediate), that alias the register file. What it returns, a step,
does the instruction for the active lanes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from kimi_ops.testing.ptx.counters import Sectors, Traffic, Wavefronts
from kimi_ops.testing.ptx.errors import PtxError, UnsupportedPtx
from kimi_ops.testing.ptx.memory import race_report
from kimi_ops.testing.ptx.registry import Entry
from kimi_ops.testing.ptx.syntax import Address, Immediate, Instruction, Name, Operand, Pair, Vector
from kimi_ops.testing.ptx.types import BITS, TYPES, WARP, Array, ScalarType, f32_to_bf16

if TYPE_CHECKING:
    from kimi_ops.testing.ptx.machine import Machine

Step: TypeAlias = Callable[["Active"], Any]
_OTHER = re.compile(r"at PTX line (\d+)")


class Active:
    """The lanes that execute a step.

    Attributes:
        mask: bool [lanes].
        count: of active lanes.
        full: every lane that is not active has exited: registers may be written without the mask.
    """

    __slots__ = ("_bits", "_lanes", "_warps", "count", "full", "mask")

    def __init__(self, mask: Array, count: int, full: bool) -> None:
        self.mask, self.count, self.full = mask, count, full
        self._lanes: Array | None = None
        self._bits: Array | None = None
        self._warps: Array | None = None

    @property
    def lanes(self) -> Array:
        """Indices of the active lanes."""
        if self._lanes is None:
            self._lanes = np.flatnonzero(self.mask)
        return self._lanes

    @property
    def bits(self) -> Array:
        """Active lanes of each warp of the batch, uint32."""
        if self._bits is None:
            self._bits = np.packbits(self.mask, bitorder="little").view(np.uint32)
        return self._bits

    @property
    def warps(self) -> Array:
        """Indices of the warps of the batch that have an active lane."""
        if self._warps is None:
            self._warps = np.flatnonzero(self.bits)
        return self._warps

    @property
    def whole(self) -> bool:
        """Whether all 32 lanes of each of those warps are active."""
        return len(self.warps) * WARP == self.count


class Site:
    """One instruction of the running kernel: for reports, and what it has done."""

    def __init__(self, machine: Machine, ins: Instruction, index: int) -> None:
        self.machine, self.ins, self.index, self.line = machine, ins, index, ins.line
        self.traffic = Traffic()
        self.sectors = Sectors()
        self.wavefronts = Wavefronts()
        # Whether its accesses of global memory are a bulk copy's, all of one lane.
        self.bulk = "bulk" in ins.parts

    def per_access(self, count: int) -> None:
        """Says how many lanes an instruction accesses with: of interest to a run's site only."""

    def fail(self, kind: type[PtxError], message: str, lane: int) -> PtxError:
        """A report about one lane of the batch; other accesses that it names get source lines."""
        located = _OTHER.sub(self._located, message)
        return kind(located, self.machine.where(self.ins, int(lane)))

    def _located(self, match: re.Match[str]) -> str:
        line = int(match[1])
        loc = next((i.loc for i in self.machine.launch.program.code if i.line == line), ("", 0))
        return f"{match[0]} ({loc[0].rsplit('/', 1)[-1]}:{loc[1]})" if loc[1] else match[0]

    def split(self, count: int) -> list[tuple[Site, slice]]:
        """Which of ``count`` accesses are whose: all its own, unless it stands for several."""
        return [(self, slice(count))]

    def race(self, name: str, lanes: Array, offset: Array) -> Callable[[int, str], Exception]:
        """How a race found by this instruction is reported."""
        return race_report(self, name, lanes, offset)


class Binder:
    """Operands of one instruction as arrays.

    Attributes:
        machine: what runs it.
        ins, entry, site: the instruction, its entry, its place in reports.
        mods: modifiers that are no types.
        types: the type modifiers, in order.
        shape: of a result: (lanes,), or for a run of n instructions (n, lanes).
        tracks: set by a builder whose step itself says which results are known (`flag`).
    """

    tracks = False

    def __init__(self, machine: Machine, ins: Instruction, entry: Entry, site: Site) -> None:
        self.machine, self.ins, self.entry, self.site = machine, ins, entry, site
        self.shape: tuple[int, ...] = (machine.lanes,)
        rest = ins.parts[entry.opcode.count(".") + 1 :]
        self.mods = frozenset(p for p in rest if p not in TYPES)
        self.types = tuple(TYPES[p] for p in rest if p in TYPES)

    @property
    def type(self) -> ScalarType:
        """The last type modifier."""
        return self.types[-1]

    def unsupported(self, what: str) -> UnsupportedPtx:
        """An error that names this instruction."""
        return UnsupportedPtx(
            f"unsupported: {what}", f"PTX line {self.ins.line}: {self.ins.opcode}"
        )

    def has(self, operand: int) -> bool:
        """Whether there is an operand at this index."""
        return operand < len(self.ins.operands)

    def operand(self, number: int) -> Operand:
        """An operand by its place; an instruction that is too short is an error that says so."""
        if number >= len(self.ins.operands):
            raise self.unsupported(f"only {len(self.ins.operands)} operands")
        return self.ins.operands[number]

    def integer(self, operand: int) -> int:
        """An operand that the instruction takes as a constant."""
        value = self.operand(operand)
        if not isinstance(value, Immediate) or not isinstance(value.value, int):
            raise self.unsupported(f"operand {operand} that is no integer constant")
        return value.value

    def flag(self, operand: int) -> Array | None:
        """Which lanes of a register operand hold a value; None where all do."""
        item = self.operand(operand)
        if isinstance(item, Pair):
            item = item.first
        return self.machine.flags.get(item.name) if isinstance(item, Name) else None

    # Sources

    def src(self, operand: int | Operand, scalar: ScalarType, *, wide: bool = False) -> Any:
        """An operand read as ``scalar``: array [lanes] of its dtype, or a scalar of it.

        Args:
            wide: the register may be wider than the type, whose low bits are taken (ld, st, cvt;
                PTX ISA, "Operand Size Exceeding Instruction-Type Size").
        """
        item = self.operand(operand) if isinstance(operand, int) else operand
        if isinstance(item, Immediate):
            return self._constant(item, scalar)
        if not isinstance(item, Name):
            raise self.unsupported(f"operand {item}")
        registers = self.machine.registers
        if item.name in registers:
            return self._read_as(registers[item.name], item.name, scalar, wide)
        special = self.machine.special(item.name)
        if special is not None:
            if special.itemsize == scalar.size:
                return special.view(scalar.dtype)
            return special.astype(BITS[scalar.size]).view(scalar.dtype)
        if item.name == "WARP_SZ":
            return scalar.dtype.type(WARP)
        address = self.machine.address_of(item.name)
        if address is None:
            raise self.unsupported(f"operand {item.name}")
        return np.asarray(address).astype(BITS[scalar.size]).view(scalar.dtype)[()]

    def _read_as(self, held: Array, name: str, scalar: ScalarType, wide: bool) -> Array:
        """A register's bits [..., lanes] as ``scalar``."""
        if scalar.kind == "p" or held.dtype == np.bool_:
            if scalar.kind != "p" or held.dtype != np.bool_:
                raise self.unsupported(f"operand {name} of another type")
            return held
        if held.itemsize == scalar.size:
            return held.view(scalar.dtype)
        if wide and held.itemsize > scalar.size:
            return held.view(scalar.dtype)[..., :: held.itemsize // scalar.size]
        raise self.unsupported(f"{8 * held.itemsize}-bit register {name}")

    def _constant(self, item: Immediate, scalar: ScalarType) -> Any:
        if scalar.kind == "p":
            return np.bool_(item.value != 0)
        if isinstance(item.value, int):
            if scalar.kind in "f" and scalar.name in ("f32", "f64"):
                raise self.unsupported("integer constant in a float instruction")
            bits = item.value & ((1 << 8 * scalar.size) - 1)
            return BITS[scalar.size].type(bits).view(scalar.dtype)
        if item.size == scalar.size and item.bits is not None:
            return BITS[scalar.size].type(item.bits).view(scalar.dtype)
        if scalar.name == "bf16":
            return f32_to_bf16(np.float32(item.value))[()]
        return np.asarray(item.value, np.float64).astype(scalar.dtype)[()]

    def predicate(self, operand: int | Operand) -> Callable[[], Any]:
        """A predicate operand, read anew at each call since it may be negated."""
        item = self.operand(operand) if isinstance(operand, int) else operand
        held = self.src(item, TYPES["pred"])
        if isinstance(item, Name) and item.negated:
            return lambda: ~held
        return lambda: held

    def items(self, operand: int) -> tuple[Operand, ...]:
        """The elements of a vector operand, or the operand alone."""
        item = self.operand(operand)
        return item.items if isinstance(item, Vector) else (item,)

    def sources(self, operand: int, scalar: ScalarType, *, wide: bool = False) -> list[Any]:
        """The elements of a vector operand as `src` gives them."""
        return [self.src(item, scalar, wide=wide) for item in self.items(operand)]

    # Results

    def dst(self, operand: int | Operand, scalar: ScalarType, *, wide: bool = False) -> Array:
        """The register of a result as an array [lanes] to write into.

        With ``wide``, a wider register gives an integer array of its own width, signed if the
        type is, so that assignment extends as the ISA has it; `put` does that.
        """
        item = self.operand(operand) if isinstance(operand, int) else operand
        if isinstance(item, Pair):
            item = item.first
        if not isinstance(item, Name):
            raise self.unsupported(f"result {item}")
        if item.name == "_":
            return np.empty(self.machine.lanes, scalar.dtype)
        held = self.machine.registers.get(item.name)
        if held is None:
            raise self.unsupported(f"result {item.name}, which is no register")
        return self._write_as(held, item.name, scalar, wide)

    def _write_as(self, held: Array, name: str, scalar: ScalarType, wide: bool) -> Array:
        """A register's bits [..., lanes] as an array to write a ``scalar`` into."""
        if scalar.kind == "p" or held.dtype == np.bool_:
            if scalar.kind != "p" or held.dtype != np.bool_:
                raise self.unsupported(f"result {name} of another type")
            return held
        if held.itemsize == scalar.size:
            return held.view(scalar.dtype)
        if wide and held.itemsize > scalar.size:
            return held.view(f"i{held.itemsize}") if scalar.kind == "s" else held
        raise self.unsupported(f"{8 * held.itemsize}-bit register {name} for the result")

    def results(self, operand: int, scalar: ScalarType, *, wide: bool = False) -> list[Array]:
        """The elements of a vector result."""
        return [self.dst(item, scalar, wide=wide) for item in self.items(operand)]

    def second(self, operand: int) -> Array | None:
        """The ``q`` of a result ``p|q``, a predicate; None without one."""
        item = self.operand(operand)
        return self.dst(item.second, TYPES["pred"]) if isinstance(item, Pair) else None

    def require_apart(self, lanes: Array, addresses: Array, *, shared: bool) -> None:
        """Says that a run of stores can only be one where no two write the same place."""

    def require_one_buffer(self, addresses: Array) -> None:
        """Says that a run of accesses of global memory can only be one in one buffer."""

    def require_alike(self, flags: Array) -> None:
        """Says that a run can only be one where all of its lanes do the same."""

    def lanes_of(self, active: Active) -> Array:
        """The active lanes, for a run once per instruction."""
        return active.lanes if len(self.shape) == 1 else np.tile(active.lanes, self.shape[0])

    # Steps

    @staticmethod
    def ufunc(function: Any, result: Array, *sources: Any) -> Step:
        """A step that is one numpy ufunc whose result has the register's dtype."""

        def step(active: Active) -> None:
            if active.full:
                function(*sources, out=result)
            else:
                function(*sources, out=result, where=active.mask)

        return step

    @staticmethod
    def compute(function: Callable[..., Any], result: Array, *sources: Any) -> Step:
        """A step that is any function of arrays; it computes for all lanes and keeps the active."""

        def step(active: Active) -> None:
            put(result, function(*sources), active)

        return step

    def address(self, operand: int) -> Callable[[Active], Array]:
        """The addresses [active lanes] of ``[base + offset]``, int64."""
        item = self.operand(operand)
        if not isinstance(item, Address):
            raise self.unsupported(f"address {item}")
        base: Any
        if isinstance(item.base, Immediate):
            base = np.int64(int(item.base.value))
        else:
            held = self.machine.registers.get(item.base.name)
            size = 8 if held is None else held.itemsize
            base = self.src(item.base, TYPES[f"u{8 * size}"])
        offset = np.int64(item.offset)
        lanes = self.machine.lanes

        def addresses(active: Active) -> Array:
            if np.ndim(base) == 0:
                return np.full(active.count, np.int64(base) + offset)
            picked = base if active.count == lanes else base[active.lanes]
            moved: Array = picked.astype(np.int64) + offset
            return moved

        return addresses


def put(result: Array, values: Any, active: Active) -> None:
    """Writes values (of all lanes) to the active lanes of a register."""
    values = np.asarray(values)
    if values.dtype != result.dtype:
        if values.dtype.itemsize == result.dtype.itemsize and values.dtype != np.bool_:
            values = values.view(result.dtype)
        elif values.dtype.kind not in "iu":
            values = values.view(BITS[values.dtype.itemsize])
    if active.full:
        result[...] = values
    else:
        np.copyto(result, values, where=active.mask, casting="unsafe")


def put_lanes(result: Array, values: Array, active: Active) -> None:
    """Writes values [..., active lanes] to the active lanes of a register."""
    if values.dtype.itemsize == result.dtype.itemsize:
        values = values.view(result.dtype)
    elif values.dtype.kind not in "iu":
        values = values.view(BITS[values.dtype.itemsize])
    if active.count == result.shape[-1]:
        result[...] = values
    else:
        result[..., active.lanes] = values
