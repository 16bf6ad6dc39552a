"""Launches a kernel of a PTX module on torch CPU tensors.

    kernel = Kernel(ptx)
    report = kernel.launch(grid=(8,), block=(128,), args=[x, y, n])

Every check is on by default, and what it finds is raised as a `PtxError`. The report counts what
the launch did. The grid runs in batches of CTAs, each batch in lockstep as far as control flow
allows; with a seed, in a random order of CTAs and warps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kimi_ops.testing.devices import device
from kimi_ops.testing.ptx import families
from kimi_ops.testing.ptx.counters import SECTOR_BYTES, Counts
from kimi_ops.testing.ptx.entries import only_entry
from kimi_ops.testing.ptx.errors import Deadlock, LaunchError, Uninitialised, UnsupportedPtx
from kimi_ops.testing.ptx.launch import Argument, Checks, Launch
from kimi_ops.testing.ptx.machine import Machine
from kimi_ops.testing.ptx.parser import parse
from kimi_ops.testing.ptx.program import link
from kimi_ops.testing.ptx.text import Text
from kimi_ops.testing.ptx.trace import Trace
from kimi_ops.testing.ptx.types import WARP, Array
from kimi_ops.testing.ptx.written import Written

families.load()

# Threads that one numpy step serves: enough to hide the cost of a call into numpy, few enough for
# registers and temporaries to stay in the caches.
_BATCH_THREADS = 8192
# Clocks of the race detector take up to sixty times as much.
_BATCH_SHARED_BYTES = 4 << 20
# What a CTA has on every GPU, unasked (CUDA C++ Programming Guide, "Compute Capabilities").
_SHARED_EVERYWHERE = 48 << 10


@dataclass
class Report:
    """What a launch did.

    Attributes:
        total: counts of the launch.
        lines: (file, line) of the source -> counts.
        unique_read_bytes, unique_written_bytes: in sectors of 32 bytes, each counted once.
        ctas, threads: in the grid; per CTA.
        dynamic_shared_bytes, shared_bytes: dynamic, and with the static ones.
        kernel, target: name of the entry, and what its text is for ("sm_80").
        cta_instructions: [ctas] warp instructions of each.
        trace: what the longest CTA executed.
    """

    total: Counts = field(default_factory=Counts)
    lines: dict[tuple[str, int], Counts] = field(default_factory=dict)
    unique_read_bytes: int = 0
    unique_written_bytes: int = 0
    ctas: int = 0
    threads: int = 0
    dynamic_shared_bytes: int = 0
    shared_bytes: int = 0
    kernel: str = ""
    target: str = ""
    cta_instructions: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    trace: Trace | None = None


def _three(sizes: Sequence[int], what: str) -> tuple[int, int, int]:
    padded = (*sizes, 1, 1, 1)[:3]
    if not 1 <= len(sizes) <= 3 or any(n < 1 for n in padded):
        raise LaunchError(f"{what} {tuple(sizes)} must be one to three positive sizes")
    return int(padded[0]), int(padded[1]), int(padded[2])


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
        self.text = Text(link(parse(only_entry(ptx, name) if name else ptx), name))
        self.program = self.text.program

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
        cooperative: bool = False,
        uninitialised: Sequence[torch.Tensor] = (),
        written: Written | None = None,
        checks: Checks | None = None,
        seed: int | None = None,
        step_limit: int = 10_000_000,
        fuse: bool = True,
    ) -> Report:
        """Runs the kernel on its arguments, in place.

        Args:
            grid, block: one to three sizes.
            args: CPU tensors for pointers (views may share storage), ints, floats, bytes for
                structs and `TensorMap` for CUtensorMap, in the order of the parameters.
            dynamic_shared_bytes: of shared memory behind the static one.
            cooperative: all CTAs are resident at once and may wait for each other.
            uninitialised: tensors among ``args`` whose content the kernel must not read before it
                has written it, and of which it must write every element.
            written: which bytes of tensors hold a value after earlier launches; kept up to date.
            checks: default all.
            seed: of a random schedule; None for lockstep in order.
            step_limit: blocks of code that a batch may run before it counts as hung.
            fuse: whether like instructions may run as one (see `fusion`); results, counts and
                reports are the same without, slower.

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
            self.text,
            grid3,
            block3,
            dynamic_shared_bytes,
            checks,
            seed,
            step_limit,
            fuse=fuse,
        )
        self._require_shared(launch.shared_bytes)
        launch.memory.written = written
        launch.bind_params(args, uninitialised)
        warps = -(-threads // WARP)
        count = int(np.prod(grid3))
        batch = max(1, _BATCH_THREADS // (warps * WARP))
        if launch.shared_bytes and not cooperative:
            batch = max(1, min(batch, _BATCH_SHARED_BYTES // launch.shared_bytes))
        batch = count if cooperative else min(batch, count)
        numbers = np.arange(count)
        if launch.random is not None:
            numbers = launch.random.permutation(count)
        machine = Machine(launch, batch)
        with np.errstate(all="ignore"):
            for start in range(0, count, batch):
                try:
                    machine.run(numbers[start : start + batch])
                except Deadlock as error:
                    if count == batch:
                        raise
                    raise Deadlock(
                        f"{error.message}; {batch} of {count} CTAs are resident: where they wait "
                        "for each other, launch with cooperative=True",
                        error.where,
                    ) from None
        self._require_written(launch)
        return self._report(launch, machine, count, threads)

    def _require_shared(self, size: int) -> None:
        if size <= _SHARED_EVERYWHERE:
            return
        target = self.program.target
        try:
            gpu = device(target)
        except ValueError:
            raise LaunchError(f"{self.name}: the shared memory of {target} is not known") from None
        if size > gpu.shared_per_block_bytes:
            raise LaunchError(
                f"{self.name} needs {size} bytes of shared memory; a CTA of {target} has "
                f"{gpu.shared_per_block_bytes}"
            )

    def _require_written(self, launch: Launch) -> None:
        for buffer in launch.memory.buffers:
            if buffer.flags is not None and not buffer.kept:
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
            kernel=self.name,
            target=self.program.target,
            cta_instructions=machine.recorder.issued,
            trace=machine.recorder.trace,
        )
        for run in machine.steps.runs:
            run.run.settle()
        report.total.barriers = machine.barriers.completed
        report.total.mbarrier_phases = machine.async_units.mbarriers.completed
        machine.recorder.trace.executed = machine.issued.tolist()
        issued = machine.issued.tolist()
        for site, kinds, count in zip(machine.sites, self.text.kinds, issued, strict=True):
            if count:
                family, opcode, tensor = kinds
                line = report.lines.get(site.ins.loc)
                if line is None:
                    line = report.lines[site.ins.loc] = Counts()
                for counts in (report.total, line):
                    counts.instructions[family] += count
                    counts.opcodes[opcode] += count
                    if site.traffic.used:
                        counts.add(site.traffic)
                        if site.traffic.multiply_adds:
                            counts.tensor[tensor] += site.traffic.multiply_adds
        for buffer in launch.memory.buffers:
            read, written = buffer.touched.sum(axis=1)
            report.unique_read_bytes += int(read) * SECTOR_BYTES
            report.unique_written_bytes += int(written) * SECTOR_BYTES
        return report


__all__ = ["Argument", "Checks", "Kernel", "LaunchError", "Report", "UnsupportedPtx"]
