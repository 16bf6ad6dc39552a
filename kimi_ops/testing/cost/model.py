"""The modelled time of a launch: two figures from counts, occupancy and rates.

    report = Kernel(compiled.artifacts["ptx"], compiled.kernel).launch(...)
    print(cost(report, compiled, "H100"))

Every resource has a time: work over rate. ``low`` is the largest of them, as if everything
overlapped. ``up`` is the sum of the two largest groups of resources, as if the two worst did not
overlap at all. Measured kernels were between the two or up to 40 % outside (docs/evidence.md).

Assumptions:
- DRAM moves each sector that the launch touches once in each direction, whatever the size of L2.
- L2 serves every sector that a CTA touches for the first time, and all of stores, atomics and loads
  past L1: an L1 of unlimited size within a CTA, empty between CTAs.
- An atomic keeps L2 as busy as 64 bytes per sector, a read and a write; atomics that meet at one
  address cost no more.
- Work of an SM is that of the busiest one when CTAs go, in order, to the SM that has had the least:
  the tail of the last wave. Warps of one CTA are spread over the 4 partitions; with fewer warps
  resident than partitions, the units of the others idle.
- Latency is the chain of the longest CTA (`latency`) times the number of waves at full occupancy.
- Clocks are fixed; no clock drop under power, no contention between the resources, no cold
  instruction cache.
"""

from __future__ import annotations

import heapq
from functools import lru_cache

import numpy as np

from kimi_ops.testing.cost.devices import ASSUMED, Latencies, Rates, rates_of
from kimi_ops.testing.cost.latency import CostError, chain_cycles
from kimi_ops.testing.cost.machine_code import MachineCode, machine_code
from kimi_ops.testing.cost.report import Cost, Resource
from kimi_ops.testing.devices import device as static_device
from kimi_ops.testing.ptx.counters import SECTOR_BYTES
from kimi_ops.testing.ptx.kernel import Kernel, Report
from kimi_ops.testing.ptx.types import WARP, Array
from kimi_ops.testing.static.occupancy import Occupancy, occupancy
from kimi_ops.testing.static.report import KernelReport

# One kernel after the other in a CUDA graph: the rest of four published timings of a router kernel
# over its modelled time was 0.2 to 1.2 us (SGLang issue 25835).
LAUNCH_US = 1.0
_ATOMIC_BYTES = 2 * SECTOR_BYTES
# Matrix instructions estimated from the machine code against exact ones: beyond this the estimate
# of all others is not to be trusted either. It is 1.00 for most kernels, 0.74 to 0.83 was seen.
_CHECK = (0.7, 1.3)


def cost(
    report: Report,
    compiled: KernelReport,
    device: str | Rates,
    *,
    ctas: int | None = None,
    dram_bytes: float | None = None,
    chain: float | None = None,
    latencies: Latencies | None = None,
) -> Cost:
    """The modelled time of a launch.

    Args:
        report: of the emulator.
        compiled: static report of the same PTX.
        device: a name of `RATES`, or rates of your own.
        ctas: of the real grid, where the report is of a sample of it; every CTA is then taken to
            be like those executed. Needs ``dram_bytes``.
        dram_bytes: that DRAM has to move, of the whole grid; by default all sectors that the
            launch reads or writes, each once. Give less where the caller knows that something is
            in L2 already.
        chain: clocks of one CTA alone, for kernels whose chain is not modelled.
        latencies: of the instructions; default `Latencies`.

    Raises:
        CostError: the report, the compiled kernel and the device do not belong together, or
            something that the model needs is missing.
        ValueError: an unknown device.
    """
    rates = rates_of(device)
    _belong_together(report, compiled, rates)
    if ctas is not None and ctas != report.ctas and dram_bytes is None:
        raise CostError("a grid larger than what was executed needs dram_bytes")
    grid = report.ctas if ctas is None else ctas
    if grid < 1:
        raise CostError(f"{grid} CTAs")
    residents = occupancy(
        static_device(rates.arch),
        threads_per_block=report.threads,
        registers=compiled.registers,
        shared_bytes=report.dynamic_shared_bytes + compiled.static_shared_bytes,
        tensor_memory_columns=compiled.tensor_memory_columns,
    )
    if not residents.blocks:
        raise CostError(f"{report.kernel} cannot run on {rates.name}: {residents.limited_by}")
    code = machine_code(report, compiled)
    if chain is None:
        assert report.trace is not None
        chain = chain_cycles(report.trace, rates, latencies or Latencies(), code.expansion)
    if dram_bytes is None:
        dram_bytes = report.unique_read_bytes + report.unique_written_bytes
    sms = int(rates.sms.value)
    waves = -(-grid // (sms * residents.blocks))
    counted = _Counted(report, rates, grid, residents, code)
    resources = {r.name: r for r in counted.resources(dram_bytes)}
    resources["latency"] = Resource(
        "latency", "latency", waves * chain, "clocks", rates.clock.value / 1e6
    )
    groups: dict[str, float] = {}
    for resource in resources.values():
        groups[resource.group] = max(groups.get(resource.group, 0), resource.us)
    bound = max(resources.values(), key=lambda r: r.us)
    resources["launch"] = Resource("launch", "", 1, "launch", 1 / LAUNCH_US)
    return Cost(
        kernel=report.kernel,
        device=rates.name,
        low_us=bound.us,
        up_us=sum(sorted(groups.values())[-2:]),
        bound=bound.name,
        resources=resources,
        ctas=grid,
        sampled_ctas=report.ctas,
        blocks_per_sm=residents.blocks,
        limited_by=residents.limited_by,
        waves=waves,
        chain_cycles=chain,
        instructions=code.source,
        unrolled=code.unrolled,
        tensor_check=code.tensor_check,
        notes=_notes(report, compiled, rates, code),
    )


@lru_cache(maxsize=16)
def _opcodes(ptx: str, kernel: str) -> tuple[str, ...]:
    return tuple(ins.opcode for ins in Kernel(ptx, kernel).program.code)


def _belong_together(report: Report, compiled: KernelReport, rates: Rates) -> None:
    if report.trace is None or not report.ctas or not report.threads:
        raise CostError("the report is of no launch")
    if report.kernel != compiled.kernel:
        raise CostError(f"the report is of {report.kernel}, compiled is {compiled.kernel}")
    target = static_device(report.target.partition(",")[0]).arch
    if not target == compiled.arch == rates.arch:
        raise CostError(
            f"the report is of PTX for {target}, compiled is for {compiled.arch}, "
            f"{rates.name} is {rates.arch}"
        )
    ptx = compiled.artifacts.get("ptx")
    if not isinstance(ptx, str):
        raise CostError("the compiled kernel comes without its PTX")
    if _opcodes(ptx, compiled.kernel) != tuple(s.opcode for s in report.trace.code):
        raise CostError(
            f"the report is of another {report.kernel} than the compiled one: other "
            "specialisation, constants or options"
        )


def _notes(
    report: Report, compiled: KernelReport, rates: Rates, code: MachineCode
) -> tuple[str, ...]:
    notes = [
        f"{name} is assumed: {figure.source}"
        for name, figure in rates.figures().items()
        if figure.kind == ASSUMED
    ]
    if code.source == "PTX":
        notes.append("no line table in the cubin: issue is counted in PTX instructions")
    if code.tensor_check is not None and not _CHECK[0] <= code.tensor_check <= _CHECK[1]:
        notes.append(
            f"machine instructions are badly estimated: {code.tensor_check:.2f} times the "
            "matrix instructions that there are"
        )
    if spilled := compiled.spill_store_bytes + compiled.spill_load_bytes:
        notes.append(f"{spilled} B per thread of spills are not in the memory figures")
    return tuple(notes)


def busiest_share(work: Array, sms: int) -> float:
    """Part of all work that the busiest SM does; CTAs in order go to who has had the least.

    Args:
        work: [CTAs] of any unit.
    """
    loads = [0.0] * min(sms, len(work))
    for amount in work.tolist():
        heapq.heapreplace(loads, loads[0] + amount)
    return max(loads) / float(work.sum())


class _Counted:
    """Resources from the counts of a launch, for a grid of CTAs like those counted."""

    def __init__(
        self, report: Report, rates: Rates, grid: int, residents: Occupancy, code: MachineCode
    ) -> None:
        self.report, self.rates, self.code = report, rates, code
        self.scale = grid / report.ctas
        sms = int(rates.sms.value)
        self.share = busiest_share(np.resize(report.cta_instructions, grid), sms)
        resident = min(residents.blocks, -(-grid // sms)) * -(-report.threads // WARP)
        self.active = min(1.0, resident / rates.issue.value)

    def _chip(self, name: str, group: str, amount: float, per_second: float) -> Resource:
        return Resource(name, group, amount * self.scale, "bytes", per_second / 1e6)

    def _sm(self, name: str, group: str, amount: float, unit: str, per_clock: float) -> Resource:
        work = amount * self.scale * self.share
        return Resource(name, group, work, unit, per_clock * self.rates.clock.value / 1e6)

    def resources(self, dram_bytes: float) -> list[Resource]:
        """All but latency and launch."""
        total, rates, active = self.report.total, self.rates, self.active
        l2_bytes = SECTOR_BYTES * total.l2_sectors
        found = [
            Resource("dram", "memory", dram_bytes, "bytes", rates.dram.value / 1e6),
            self._chip("l2", "memory", l2_bytes, rates.l2.value),
            self._sm("l2 port", "memory", l2_bytes, "bytes", rates.l2_port.value),
            self._chip("atomics", "memory", _ATOMIC_BYTES * total.atomic_sectors, rates.l2.value),
            self._sm(
                "shared",
                "shared",
                total.shared_wavefronts + total.matrix_shared_wavefronts + total.l1_wavefronts,
                "wavefronts",
                rates.shared.value,
            ),
            self._sm("l1 tags", "shared", total.l1_lines, "lines", rates.l1_tags.value),
            self._tensor(),
            self._sm(
                "issue", "issue", self.code.issued, "instructions", rates.issue.value * active
            ),
        ]
        for pipe, lanes, group, width in (
            ("load_store", rates.load_store.value, "shared", 1.0),
            ("fp32", rates.fp32.value, "issue", active),
            ("int32", rates.int32.value, "issue", active),
            ("special", rates.special.value, "issue", active),
        ):
            issued = self.code.pipes.get(pipe, 0)
            found.append(self._sm(pipe, group, issued, "instructions", lanes / WARP * width))
        return found

    def _tensor(self) -> Resource:
        """Multiply-adds of all kinds as clocks, since each kind has a rate of its own."""
        clocks = 0.0
        for kind, amount in self.report.total.tensor.items():
            if kind not in self.rates.tensor:
                raise CostError(f"{self.rates.name} has no published rate of {kind}")
            clocks += amount / self.rates.tensor[kind].value
        return self._sm("tensor", "tensor", clocks, "clocks", self.active)
