"""Launches a kernel of a PTX module on torch CPU tensors.

    kernel = Kernel(ptx)
    report = kernel.launch(grid=(8,), block=(128,), args=[x, y, n])

Every check is on by default, and what it finds is raised as a `PtxError`. The report counts what
the launch did. The grid runs in batches of CTAs, each batch in lockstep as far as control flow
allows; with a seed, in a random order of CTAs and warps.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kimi_ops.testing.ptx import families
from kimi_ops.testing.ptx.counters import SECTOR_BYTES, Counts
from kimi_ops.testing.ptx.errors import LaunchError, Uninitialised, UnsupportedPtx
from kimi_ops.testing.ptx.flow import Flow
from kimi_ops.testing.ptx.global_memory import GlobalMemory
from kimi_ops.testing.ptx.machine import Machine
from kimi_ops.testing.ptx.parser import parse
from kimi_ops.testing.ptx.program import Program, link
from kimi_ops.testing.ptx.registry import Entry, lookup
from kimi_ops.testing.ptx.syntax import Immediate, Variable
from kimi_ops.testing.ptx.types import TYPES, WARP
from kimi_ops.testing.ptx.uses import register_uses, watched_registers

families.load()

Argument = torch.Tensor | int | float | bytes
# Threads that one numpy step serves: enough to hide the cost of a call into numpy, few enough for
# registers and temporaries to stay in the caches.
_BATCH_THREADS = 8192
# Clocks of the race detector take up to sixty times as much.
_BATCH_SHARED_BYTES = 4 << 20
_SPACES = {"global", "shared", "local", "param", "const"}


@dataclass(frozen=True)
class Checks:
    """Which of the optional checks are on. Bounds, alignment and convergence always are.

    Attributes:
        registers: reads of registers never written.
        shared_initialised: reads of shared memory never written.
        shared_races: unordered accesses of shared memory.
        global_races: unordered accesses of global memory by several CTAs.
    """

    registers: bool = True
    shared_initialised: bool = True
    shared_races: bool = True
    global_races: bool = True


@dataclass
class Report:
    """What a launch did.

    Attributes:
        total: counts of the launch.
        lines: (file, line) of the source -> counts.
        unique_read_bytes, unique_written_bytes: in sectors of 32 bytes, each counted once.
        ctas, threads: in the grid; per CTA.
        dynamic_shared_bytes, shared_bytes: dynamic, and with the static ones.
    """

    total: Counts = field(default_factory=Counts)
    lines: dict[tuple[str, int], Counts] = field(default_factory=dict)
    unique_read_bytes: int = 0
    unique_written_bytes: int = 0
    ctas: int = 0
    threads: int = 0
    dynamic_shared_bytes: int = 0
    shared_bytes: int = 0


def _three(sizes: Sequence[int], what: str) -> tuple[int, int, int]:
    padded = (*sizes, 1, 1, 1)[:3]
    if not 1 <= len(sizes) <= 3 or any(n < 1 for n in padded):
        raise LaunchError(f"{what} {tuple(sizes)} must be one to three positive sizes")
    return int(padded[0]), int(padded[1]), int(padded[2])


class Launch:
    """A kernel with its arguments, as machines see it.

    Attributes:
        program, flow, entries: the text.
        uses: per instruction, (registers read, registers written).
        grid, block: three sizes.
        memory: global buffers.
        addresses: variable -> address in its own space.
        params: entry parameters -> bytes.
        watched: registers that some path may read before it writes them.
        granule: bytes per race stamp in shared memory.
        shared_bytes, dynamic_bytes, local_bytes: per CTA, of them dynamic, per thread.
        has_fences: whether the program has memory fences.
        random: None, or the generator of the schedule.
        step_limit: blocks a batch may run.
    """

    def __init__(
        self,
        program: Program,
        flow: Flow,
        entries: list[Entry],
        uses: list[tuple[set[str], set[str]]],
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        dynamic_bytes: int,
        checks: Checks,
        seed: int | None,
        step_limit: int,
    ) -> None:
        self.program, self.flow, self.entries, self.uses = program, flow, entries, uses
        self.grid, self.block = grid, block
        self.checks, self.dynamic_bytes, self.step_limit = checks, dynamic_bytes, step_limit
        self.random = None if seed is None else np.random.default_rng(seed)
        self.memory = GlobalMemory()
        self.memory.check_races = checks.global_races
        self.addresses: dict[str, int] = {}
        self.params: dict[str, bytes] = {}
        self.shared_bytes = self._place("shared")
        dynamic = [v for v in program.variables.values() if v.space == "shared" and not v.size]
        start = -(-self.shared_bytes // 16) * 16 if dynamic else self.shared_bytes
        for variable in dynamic:
            self.addresses[variable.name] = -(-start // variable.align) * variable.align
        self.shared_bytes = max([*(self.addresses[v.name] for v in dynamic), start]) + dynamic_bytes
        self.local_bytes = self._place("local", "param")
        self._place_globals()
        self.has_fences = any(i.parts[0] in ("membar", "fence") for i in program.code)
        self.granule = self._smallest(("shared",))
        self.memory.granule = self._smallest(("global",))
        self.watched: set[str] = set()
        if checks.registers:
            self.watched = watched_registers(flow.unassigned(program.code, uses), uses, entries)

    def _place(self, *spaces: str) -> int:
        end = 0
        for variable in self.program.variables.values():
            if variable.space in spaces and variable.size:
                end = -(-end // variable.align) * variable.align
                self.addresses[variable.name] = end
                end += variable.size
        return end

    def _place_globals(self) -> None:
        variables = [v for v in self.program.variables.values() if v.space in ("global", "const")]
        images = {v.name: np.zeros(max(v.size, 1), np.uint8) for v in variables}
        for v in variables:
            self.addresses[v.name] = self.memory.add_bytes(v.name, images[v.name])
        for v in variables:
            if v.data is not None:
                images[v.name][: len(v.data)] = np.frombuffer(v.data, np.uint8)
            for offset, name in v.pointers:
                address = np.array([self.addresses[name]], np.uint64).view(np.uint8)
                images[v.name][offset : offset + 8] = address

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
            elif parts[:2] == ("cp", "async") and len(ins.operands) >= 3:
                size = ins.operands[2]
                widths.append(int(size.value) if isinstance(size, Immediate) else 4)
        return min(widths)

    def bind_params(self, args: Sequence[Argument], uninitialised: Sequence[torch.Tensor]) -> None:
        """Lays out the arguments as the parameter space has them.

        Raises:
            LaunchError: wrong number, or a value that does not fit its parameter.
        """
        params = self.program.params
        if len(args) != len(params):
            raise LaunchError(f"{self.program.name} takes {len(params)} arguments, got {len(args)}")
        fresh = {id(t) for t in uninitialised}
        if unknown := fresh - {id(a) for a in args}:
            raise LaunchError(f"{len(unknown)} uninitialised tensors are no arguments")
        for position, (param, value) in enumerate(zip(params, args, strict=True)):
            self.params[param.name] = self._encoded(param, value, position, fresh)

    def _encoded(self, param: Variable, value: Argument, position: int, fresh: set[int]) -> bytes:
        what = f"argument {position} of {self.program.name}"
        if isinstance(value, torch.Tensor):
            if value.device.type != "cpu" or param.size != 8:
                raise LaunchError(f"{what}: a tensor must be on the CPU, its parameter a pointer")
            address = self.memory.add_tensor(
                f"argument {position}", value, initialised=id(value) not in fresh
            )
            return address.to_bytes(8, "little")
        if isinstance(value, bytes):
            if len(value) != param.size:
                raise LaunchError(f"{what} has {param.size} bytes, got {len(value)}")
            return value
        scalar = param.type
        if scalar.kind == "f" or isinstance(value, float):
            if param.size not in (4, 8):
                raise LaunchError(f"{what}: a float for a parameter of {param.size} bytes")
            return struct.pack("<f" if param.size == 4 else "<d", value)
        if not -(1 << (8 * param.size - 1)) <= value < 1 << (8 * param.size):
            raise LaunchError(f"{what}: {value} does not fit {param.size} bytes")
        return (int(value) & ((1 << 8 * param.size) - 1)).to_bytes(param.size, "little")


class Kernel:
    """One kernel of a PTX module.

    Args:
        ptx: text of the module.
        name: of the kernel; may be left out where there is one only.

    Raises:
        PtxSyntaxError: text that is no PTX.
        UnsupportedPtx: an instruction that nothing implements; names it and its line.
    """

    def __init__(self, ptx: str, name: str | None = None) -> None:
        self.program = link(parse(ptx), name)
        self.entries = [lookup(ins) for ins in self.program.code]
        self.uses = [
            register_uses(ins, entry, self.program.registers)
            for ins, entry in zip(self.program.code, self.entries, strict=True)
        ]
        self.flow = Flow(self.program)

    @property
    def name(self) -> str:
        """Of the entry."""
        return self.program.name

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Argument],
        *,
        dynamic_shared_bytes: int = 0,
        uninitialised: Sequence[torch.Tensor] = (),
        checks: Checks | None = None,
        seed: int | None = None,
        step_limit: int = 10_000_000,
    ) -> Report:
        """Runs the kernel on its arguments, in place.

        Args:
            grid, block: one to three sizes.
            args: CPU tensors for pointers (views may share storage), ints, floats, and bytes for
                structs, in the order of the parameters.
            dynamic_shared_bytes: of shared memory behind the static one.
            uninitialised: tensors among ``args`` whose content the kernel must not read before it
                has written it, and of which it must write every element.
            checks: default all.
            seed: of a random schedule; None for lockstep in order.
            step_limit: blocks of code that a batch may run before it counts as hung.

        Returns:
            The counts.

        Raises:
            LaunchError: what does not fit the kernel.
            PtxError: what a check found.
        """
        checks = checks or Checks()
        grid3, block3 = _three(grid, "grid"), _three(block, "block")
        threads = int(np.prod(block3))
        required = self.program.required_block
        if required and block3 != _three(required, "block"):
            raise LaunchError(f"{self.name} must be launched with block {required}, got {block3}")
        limit = int(np.prod(self.program.max_block or (1024,)))
        if threads > limit:
            raise LaunchError(f"{self.name} allows {limit} threads, got {threads}")
        launch = Launch(
            self.program,
            self.flow,
            self.entries,
            self.uses,
            grid3,
            block3,
            dynamic_shared_bytes,
            checks,
            seed,
            step_limit,
        )
        launch.bind_params(args, uninitialised)
        warps = -(-threads // WARP)
        count = int(np.prod(grid3))
        batch = max(1, _BATCH_THREADS // (warps * WARP))
        if launch.shared_bytes:
            batch = max(1, min(batch, _BATCH_SHARED_BYTES // launch.shared_bytes))
        batch = min(batch, count)
        numbers = np.arange(count)
        if launch.random is not None:
            numbers = launch.random.permutation(count)
        machine = Machine(launch, batch)
        with np.errstate(all="ignore"):
            for start in range(0, count, batch):
                machine.run(numbers[start : start + batch])
        self._require_written(launch)
        return self._report(launch, machine, count, threads)

    def _require_written(self, launch: Launch) -> None:
        for buffer in launch.memory.buffers:
            if buffer.flags is not None:
                left = np.flatnonzero(buffer.flags[buffer.low : buffer.high] == 0)
                if len(left):
                    raise Uninitialised(
                        f"{buffer.name} + {int(left[0])} was never written "
                        f"({len(left)} of {buffer.high - buffer.low} bytes)",
                        self.name,
                    )

    def _report(self, launch: Launch, machine: Machine, ctas: int, threads: int) -> Report:
        report = Report(
            ctas=ctas,
            threads=threads,
            dynamic_shared_bytes=launch.dynamic_bytes,
            shared_bytes=launch.shared_bytes,
        )
        report.total.barriers = machine.barriers.completed
        for site, entry, issued in zip(machine.sites, self.entries, machine.issued, strict=True):
            if not issued:
                continue
            opcode = ".".join(p for p in site.ins.parts if p not in TYPES)
            line = report.lines.setdefault(site.ins.loc, Counts())
            for counts in (report.total, line):
                counts.add(site.traffic)
                counts.instructions[entry.family] += int(issued)
                counts.opcodes[opcode] += int(issued)
        for buffer in launch.memory.buffers:
            read, written = buffer.touched.sum(axis=1)
            report.unique_read_bytes += int(read) * SECTOR_BYTES
            report.unique_written_bytes += int(written) * SECTOR_BYTES
        return report


__all__ = ["Argument", "Checks", "Kernel", "LaunchError", "Report", "UnsupportedPtx"]
