"""What a run found, as JSON and CSV: one row per case and contestant, and the machine it was on."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MEASURED, WRONG, SKIPPED = "measured", "wrong", "skipped"


@dataclass(frozen=True)
class Row:
    """One contestant on one case.

    Attributes:
        op, case: names.
        contestant: "kimi-ops cpu" (a backend of ours), or a peer: "torch eager".
        ours: whether it is a backend of this package.
        threads: of torch; 0 on a GPU.
        status: "measured"; "wrong": its result failed the check and was not timed; "skipped".
        reason: why it was not measured.
        us, p10_us, p90_us: median and percentiles of one call, microseconds.
        samples, calls: samples of how many calls each.
        how: they were timed: "wall clock", "graph", or "launches", which may wait for the host.
        read_bytes, written_bytes, flops: the floor of the case.
        ceiling: what binds that floor: "read", "copy", "clone", or a dtype's "bfloat16 product".
        ceiling_us: the floor at the ceiling's rate, measured in turn with the contestants.
        ratio: median over rounds of this one's time over that of our first backend that ran; 1 for
            it.
        error: of a backend, the largest share of the tolerance (docs/evidence.md); of a peer, the
            relative L2 distance from our result.
        series, size, unit: as `BenchCase` has them.
    """

    op: str
    case: str
    contestant: str
    ours: bool
    threads: int
    status: str
    reason: str = ""
    us: float = 0.0
    p10_us: float = 0.0
    p90_us: float = 0.0
    samples: int = 0
    calls: int = 0
    read_bytes: float = 0.0
    written_bytes: float = 0.0
    flops: float = 0.0
    ceiling: str = ""
    ceiling_us: float = 0.0
    ratio: float = 0.0
    error: float = 0.0
    series: str = ""
    size: int = 0
    unit: str = ""
    how: str = ""

    @property
    def gbps(self) -> float:
        """Gigabytes of the floor per second."""
        return (self.read_bytes + self.written_bytes) / self.us / 1e3 if self.us else 0.0

    @property
    def tflops(self) -> float:
        """Tera-operations of the floor per second."""
        return self.flops / self.us / 1e6 if self.us else 0.0

    @property
    def share(self) -> float:
        """Of the ceiling: 1 is as fast as the machine can be."""
        return self.ceiling_us / self.us if self.us else 0.0


@dataclass
class Run:
    """All rows of one run.

    Attributes:
        command: that made it.
        machine: device, clocks, versions and commit, by name.
        rows: in the order of the run.
        modelled: rows of `kimi_ops.bench.modelled`, as dictionaries; never mixed with the others.
        steps: of `kimi_ops.bench.step`, as dictionaries.
    """

    command: str
    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    modelled: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)

    def write_json(self, path: Path) -> None:
        """Everything; a file of that name is replaced at once or not at all."""
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        partial.replace(path)

    def write_csv(self, path: Path) -> None:
        """The measured rows, with what follows from them."""
        derived = ("gbps", "tflops", "share")
        names = [f.name for f in dataclasses.fields(Row)]
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*names, *derived])
            for row in self.rows:
                writer.writerow([getattr(row, name) for name in (*names, *derived)])


def read_json(path: Path) -> Run:
    """A run as `Run.write_json` left it.

    Raises:
        ValueError: no such file's content; names the path.
    """
    try:
        found = json.loads(path.read_text())
        rows = [Row(**row) for row in found.pop("rows")]
        return Run(rows=rows, **found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no result of kimi-ops bench: {error}") from None


def rows_of(rows: Iterable[Row], op: str, case: str, threads: int) -> list[Row]:
    """Those of one case, ours first."""
    return [r for r in rows if (r.op, r.case, r.threads) == (op, case, threads)]
