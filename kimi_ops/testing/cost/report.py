"""What the model says about one launch, and tables of several. Everything is labelled modelled."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

LABEL = "MODELLED, not measured"


@dataclass(frozen=True)
class Resource:
    """One thing that the launch keeps busy.

    Attributes:
        name, group: `up` adds the two largest groups; "" belongs to none.
        work, unit: of the whole grid; for a resource of an SM, of the SM with the most to do.
        rate: of the same unit per microsecond, at what is resident.
        us: work / rate.
    """

    name: str
    group: str
    work: float
    unit: str
    rate: float

    @property
    def us(self) -> float:
        """Microseconds."""
        return self.work / self.rate


def _table(table: Table) -> str:
    text = io.StringIO()
    Console(file=text, width=200, highlight=False, markup=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


@dataclass(frozen=True)
class Cost:
    """The modelled time of one launch on one GPU.

    Attributes:
        kernel, device: names.
        low_us: all resources overlap perfectly: the largest one. A bound from below, launch
            excluded.
        up_us: nothing of the two largest groups overlaps: their sum, launch excluded.
        bound: the resource that is the largest.
        resources: by name: "dram", "l2", "l2 port", "atomics", "shared", "l1 tags", "load_store",
            "tensor", "issue", "fp32", "int32", "special", "latency"; and "launch", which is in
            neither figure.
        ctas: of the grid; sampled_ctas: of them, those that were executed.
        blocks_per_sm, limited_by: resident at best, and by what.
        waves: rounds of CTAs that an SM runs.
        chain_cycles: of the longest CTA alone.
        instructions: "SASS" or "PTX": what issue slots were counted in.
        unrolled, tensor_check: see `kimi_ops.testing.cost.machine_code`.
        notes: what the figures leave out here, and rates that are assumed.
    """

    kernel: str
    device: str
    low_us: float
    up_us: float
    bound: str
    resources: dict[str, Resource]
    ctas: int
    sampled_ctas: int
    blocks_per_sm: int
    limited_by: str
    waves: int
    chain_cycles: float
    instructions: str
    unrolled: int
    tensor_check: float | None
    notes: tuple[str, ...] = ()

    @property
    def launch_us(self) -> float:
        """From one kernel to the next in a CUDA graph; in neither figure."""
        return self.resources["launch"].us

    def __str__(self) -> str:
        sampled = f", {self.sampled_ctas} of them executed" * (self.sampled_ctas != self.ctas)
        check = "" if self.tensor_check is None else f" (tensor check {self.tensor_check:.2f})"
        head = [
            f"{self.kernel} on {self.device}: {LABEL}",
            f"{self.low_us:.3g} .. {self.up_us:.3g} us, bound by {self.bound}; launch "
            f"+{self.launch_us:.3g} us",
            f"{self.ctas} CTAs{sampled}; {self.blocks_per_sm} per SM by {self.limited_by}, "
            f"{self.waves} waves; one alone {self.chain_cycles:.0f} clocks; instructions of "
            f"{self.instructions}{check}",
        ]
        table = Table("resource", "work", "unit", "us modelled", "% of low")
        for r in sorted(self.resources.values(), key=lambda r: -r.us):
            share = "-" if r.name == "launch" else f"{100 * r.us / self.low_us:.0f}"
            table.add_row(r.name, f"{r.work:.4g}", r.unit, f"{r.us:.3f}", share)
        return "\n".join([*head, _table(table), *(f"note: {note}" for note in self.notes)])


@dataclass
class CostTable:
    """Costs of several kernels, cases and devices.

    Attributes:
        rows: (case, cost), in the order in which they were added.
    """

    rows: list[tuple[str, Cost]] = field(default_factory=list)

    def add(self, case: str, cost: Cost) -> None:
        """Adds a row."""
        self.rows.append((case, cost))

    def __iter__(self) -> Iterator[tuple[str, Cost]]:
        return iter(self.rows)

    def total_us(self, cases: Iterable[str] | None = None) -> tuple[float, float]:
        """(low, up) of the kernels of some cases, one after the other with their launches.

        Raises:
            KeyError: a case that is not in the table.
        """
        wanted = {case for case, _ in self.rows} if cases is None else set(cases)
        if missing := wanted - {case for case, _ in self.rows}:
            raise KeyError(f"no case {sorted(missing)[0]!r}")
        costs = [cost for case, cost in self.rows if case in wanted]
        if len({cost.device for cost in costs}) > 1:
            raise ValueError("a sum over several devices")
        launches = sum(cost.launch_us for cost in costs)
        return sum(c.low_us for c in costs) + launches, sum(c.up_us for c in costs) + launches

    def __str__(self) -> str:
        groups = ("dram", "l2", "shared", "tensor", "issue", "latency")
        table = Table(
            *("case", "kernel", "device", "low us", "up us", "bound by"),
            *(f"{name} us" for name in groups),
            *("CTA/SM", "counted in"),
            title=f"Kernel times: {LABEL}",
            title_justify="left",
        )
        for case, cost in self.rows:
            table.add_row(
                case,
                cost.kernel,
                cost.device,
                f"{cost.low_us:.3g}",
                f"{cost.up_us:.3g}",
                cost.bound,
                *(f"{cost.resources[name].us:.3g}" for name in groups),
                str(cost.blocks_per_sm),
                cost.instructions,
            )
        notes = dict.fromkeys(f"{c.device}: {note}" for _, c in self.rows for note in c.notes)
        return "\n".join([_table(table), *(f"note: {note}" for note in notes)])
