"""What tables and plots share: which rows belong together, and how numbers are written."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kimi_ops.bench.record import MEASURED, WRONG, Row, Run

DASH = "\N{EN DASH}"
NOTES = (
    "Times are medians of one call with the 10th and 90th percentile. Rates count the bytes and "
    "operations that a call needs at least. The ceiling is what binds that floor, measured in turn "
    "with the call. Ratios are to our first backend: above 1, the other takes longer. The error of "
    "a backend of ours is its largest share of the tolerance, that of a peer the relative L2 "
    "distance from our result."
)


@dataclass(frozen=True)
class Contest:
    """The contestants of one case, at one number of threads.

    Attributes:
        op, case, threads: as in their rows.
        rows: ours first, otherwise in the order of the run.
    """

    op: str
    case: str
    threads: int
    rows: tuple[Row, ...]

    @property
    def measured(self) -> list[Row]:
        """Those that were timed."""
        return [r for r in self.rows if r.status == MEASURED]

    @property
    def ours(self) -> Row | None:
        """The backend of ours that ratios are to."""
        return next((r for r in self.measured if r.ours), None)

    @property
    def best_peer(self) -> Row | None:
        """The fastest peer, by its ratio where there is one."""
        peers = [r for r in self.measured if not r.ours]
        return min(peers, key=lambda r: (r.ratio, r.us), default=None)

    @property
    def ratio(self) -> float:
        """Time of the best peer over ours; 0 where one of them was not measured."""
        return self.best_peer.ratio if self.ours and self.best_peer else 0.0

    def __str__(self) -> str:
        return self.case + (f", {threads_text(self.threads)}" if self.threads else "")


def contests(rows: Iterable[Row]) -> list[Contest]:
    """Rows by op, case and threads; each of the three in the order in which it first appears."""
    found: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row.op, row.case, row.threads), []).append(row)
    keys = list(found)
    ops, cases = ([key[:n] for key in keys] for n in (1, 2))
    keys.sort(key=lambda key: (ops.index(key[:1]), cases.index(key[:2])))
    return [Contest(*key, tuple(sorted(found[key], key=lambda r: not r.ours))) for key in keys]


def ops_of(rows: Iterable[Row]) -> list[str]:
    """Names of ops, in the order in which they first appear."""
    return list(dict.fromkeys(row.op for row in rows))


def threads_text(threads: int) -> str:
    """``2 threads``; nothing on a GPU."""
    return f"{threads} thread{'s' * (threads != 1)}" if threads else ""


def number(value: float) -> str:
    """Three significant digits, or all of an integer's: ``0.123``, ``12.0``, ``12,345``."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".") if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def _time_unit(us: float) -> tuple[float, str]:
    return next((u for u in ((1e6, "s"), (1e3, "ms")) if us >= u[0]), (1.0, "µs"))


def time_text(us: float) -> str:
    """With the unit that suits it: ``12.3 µs``, ``1.23 ms``."""
    scale, unit = _time_unit(us)
    return f"{number(us / scale)} {unit}"


def spread_text(row: Row) -> str:
    """The 10th to the 90th percentile, in the unit of the second."""
    scale, unit = _time_unit(row.p90_us)
    return f"{number(row.p10_us / scale)}{DASH}{number(row.p90_us / scale)} {unit}"


def is_product(row: Row) -> bool:
    """Whether matrix products bind the case, not memory."""
    return row.ceiling.endswith("product")


def rate_text(row: Row) -> str:
    """GB/s, or TFLOP/s where products bind the case."""
    rate, unit = (row.tflops, "TFLOP/s") if is_product(row) else (row.gbps, "GB/s")
    return f"{number(rate)} {unit}" if rate else DASH


def percent(row: Row) -> str:
    """Of the ceiling: ``87 %``, ``0.4 %``."""
    if not row.ceiling or not row.us:
        return DASH
    return f"{100 * row.share:.{0 if row.share > 0.095 else 1}f} %"


def share_text(row: Row) -> str:
    """Percent of the ceiling, by its name."""
    share = percent(row)
    return share if share == DASH else f"{share} of {row.ceiling}"


def ratio_text(row: Row) -> str:
    """``2.34x``"""
    return f"{number(row.ratio)}x" if row.ratio else DASH


def error_text(row: Row) -> str:
    """``31 % tol.`` for ours, ``4.8e-03`` for a peer."""
    return f"{100 * row.error:.0f} % tol." if row.ours else f"{row.error:.1e}"


def facts(machine: Mapping[str, Any]) -> dict[str, str]:
    """What `kimi_ops.bench.machine` says, by name, without the ceilings; versions one by one."""
    found: dict[str, str] = {}
    for name, value in machine.items():
        if name == "ceilings":
            continue
        if isinstance(value, dict):
            found |= {str(key): str(part) for key, part in value.items()}
        elif name.endswith("_bytes") and isinstance(value, int | float):
            found[name.removesuffix("_bytes")] = f"{number(value / 2**20)} MiB"
        else:
            found[name] = str(value)
    return found


def amount(row: Row) -> float:
    """The floor of a case in the unit of what binds it: operations, or bytes."""
    return row.flops if is_product(row) else row.read_bytes + row.written_bytes


def ceilings(run: Run, threads: int) -> dict[str, float]:
    """Rates at so many threads, by name, bytes or operations per second.

    The median over the cases that a ceiling binds, which were measured in turn with it; of one
    that binds none, what the run found when it began.
    """
    first = run.machine.get("ceilings", {}).get(str(threads), {})
    found: dict[str, list[float]] = {name: [] for name in first}
    for row in run.rows:
        if row.status == MEASURED and row.ours and row.threads == threads and row.ceiling_us:
            found.setdefault(row.ceiling, []).append(1e6 * amount(row) / row.ceiling_us)
    return {n: statistics.median(v) if v else float(first[n]) for n, v in found.items()}


def ceiling_text(name: str, rate: float) -> str:
    """``84.2 GB/s``, of a product ``1.13 TFLOP/s``."""
    product = name.endswith("product")
    return f"{number(rate / 1e12)} TFLOP/s" if product else f"{number(rate / 1e9)} GB/s"


def reasons(found: Sequence[Contest]) -> list[tuple[str, str]]:
    """Who was not measured and why: ("wrong: FlashMLA (case A)", reason), equal ones together.

    The cases of a peer that had the same fate in all of them are not named.
    """
    rows = [(row, str(contest)) for contest in found for row in contest.rows]
    where: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row, case in rows:
        if row.status != MEASURED:
            names = where.setdefault((row.status, row.reason), {})
            names.setdefault(row.contestant, []).append(case)
    every = Counter(row.contestant for row, _ in rows if not row.ours)
    lines = []
    for (status, reason), names in sorted(where.items(), key=lambda item: item[0][0] != WRONG):
        whole = [name for name, cases in names.items() if len(cases) == every[name]]
        parts = [f"{n} ({'; '.join(cases)})" for n, cases in names.items() if n not in whole]
        lines.append((f"{status}: {', '.join([*whole, *parts])}", reason or "no reason given"))
    return lines
