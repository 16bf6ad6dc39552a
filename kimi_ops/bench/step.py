"""One step of the whole model: what it launches, what that must do at least, what it may take.

A row is a call of one part of the model (`kimi_ops.bench.step_calls`): how often a step makes it,
its launches, bytes and operations, and per GPU its floor and its modelled time
(`kimi_ops.bench.modelled`).

One GPU stands for the whole model here, whatever memory it has: 595 GB of weights fit none of
them. A floor is bytes over bandwidth or operations over the tensor cores' rate, whichever is more,
call by call; bytes are each argument and each result once, as if nothing stayed in L2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from kimi_ops.bench.record import MEASURED, Row, Run
from kimi_ops.bench.step_calls import (
    STEPS,
    Call,
    StepCase,
    calls_of,
    floor_notes,
    floor_us,
    launches_of,
)
from kimi_ops.testing.cost import RATES, Rates, rates_of
from kimi_ops.testing.cost.model import LAUNCH_US
from kimi_ops.testing.cost.report import LABEL

TOTAL = "total"
_NEAR = 0.05  # part by which the work of a measured case may differ from that of a call


def _measured(call: Call, rows: Iterable[Row]) -> Row | None:
    """The fastest of ours that was measured on such a call: the same op with as much work."""

    def near(found: float, wanted: float) -> bool:
        return abs(found - wanted) <= _NEAR * wanted

    mine = (r for r in rows if r.ours and r.status == MEASURED and r.op == call.op)
    work = call.work
    same = [
        r for r in mine if near(r.read_bytes + r.written_bytes, work.bytes)
        and near(r.flops, work.flops)
    ]  # fmt: skip
    return min(same, key=lambda r: r.us, default=None)


def _row(case: StepCase, call: Call, rates: Rates, found: Mapping[str, Any] | None,
         measured: Row | None) -> dict[str, Any]:  # fmt: skip
    floor = floor_us(call.work, rates)
    launches = found["launches"] if found else launches_of(call, rates)
    low, up = (found["low_us"], found["up_us"]) if found else (floor, floor)
    return {
        "step": case.title,
        "device": rates.name,
        "part": call.part,
        "op": call.op,
        "shapes": call.shapes,
        "calls": call.count,
        "launches": call.count * launches,
        "bytes": call.count * call.work.bytes,
        "flops": call.count * call.work.flops,
        "floor_us": call.count * floor,
        "low_us": call.count * low,
        "up_us": call.count * up,
        "source": "modelled" if found else "floor",
        "measured_us": call.count * measured.us if measured else None,
        "measured_by": f"{measured.contestant}, {measured.threads} threads" if measured else "",
    }


_SUMMED = ("calls", "launches", "bytes", "flops", "floor_us", "low_us", "up_us")


def _total(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    measured = [row["measured_us"] for row in rows if row["measured_us"] is not None]
    modelled = sum(row["source"] == "modelled" for row in rows)
    return (
        rows[0]
        | {name: sum(row[name] for row in rows) for name in _SUMMED}
        | {
            "part": "all",
            "op": TOTAL,
            "shapes": {},
            "source": f"{modelled} of {len(rows)} rows modelled",
            "measured_us": sum(measured) if measured else None,
            "measured_by": f"{len(measured)} of {len(rows)} rows" if measured else "",
        }
    )


def step_rows(
    run: Run | None = None,
    devices: Sequence[str] | None = None,
    *,
    backend: str = "triton",
    steps: Sequence[StepCase] = STEPS,
) -> Iterator[dict[str, Any]]:
    """Rows of some steps on some GPUs, each GPU's closed by their total.

    Args:
        run: its modelled rows are the figures, for a call as large; a call without one has its
            floor instead, and ``source`` says so. Both are without launches, which add about
            `LAUNCH_US` each. Its measured rows of the CPU are in ``measured_us``, for the same op
            with as much work; a total has the sum of those that there are, and says how many.
        devices: names of `kimi_ops.testing.cost.RATES`; all by default.
        backend: whose modelled rows.
        steps: which.

    Raises:
        ValueError: an unknown GPU; at once, and lists those that there are.
    """
    chosen = [rates_of(name) for name in (RATES if devices is None else devices)]
    return _rows(run or Run("", {}), chosen, backend, steps)


def _rows(
    run: Run, devices: Sequence[Rates], backend: str, steps: Sequence[StepCase]
) -> Iterator[dict[str, Any]]:
    modelled = [m for m in run.modelled if m["backend"] == backend and not m["reason"]]
    for case in steps:
        for rates in devices:
            rows = []
            for call in calls_of(case):
                mine = (m for m in modelled if (m["op"], m["device"]) == (call.op, rates.name))
                found = next((m for m in mine if m["shapes"] == call.shapes), None)
                rows.append(_row(case, call, rates, found, _measured(call, run.rows)))
            yield from rows
            yield _total(rows)


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "part": lambda r: r["part"],
    "op": lambda r: r["op"],
    "shapes": lambda r: ", ".join("x".join(map(str, s)) for s in list(r["shapes"].values())[:2]),
    "calls": lambda r: f"{r['calls']:,}",
    "launches": lambda r: f"{r['launches']:,}",
    "MB": lambda r: f"{r['bytes'] / 1e6:,.1f}",
    "GFLOP": lambda r: f"{r['flops'] / 1e9:,.1f}",
    "floor us": lambda r: f"{r['floor_us']:,.1f}",
    "low us": lambda r: f"{r['low_us']:,.1f}",
    "up us": lambda r: f"{r['up_us']:,.1f}",
    "which is": lambda r: r["source"],
    "measured us": lambda r: "" if r["measured_us"] is None else f"{r['measured_us']:,.0f}",
}
_TEXTS = ("part", "op", "shapes", "which is")


def print_steps(
    rows: Iterable[dict[str, Any]],
    detail: Sequence[str] = ("H100",),
    console: Console | None = None,
) -> None:
    """Prints the totals of each step, and before them its rows on the GPUs named in ``detail``, or
    on the first one where none of those is there."""
    tables: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        tables.setdefault(row["step"], {}).setdefault(row["device"], []).append(row)
    console = console or Console(width=180, highlight=False)
    for step, devices in tables.items():
        for device in [name for name in devices if name in detail] or list(devices)[:1]:
            table = Table(title=f"{step}, {device}: {LABEL}", title_justify="left")
            for name in _COLUMNS:
                justify: Any = "left" if name in _TEXTS else "right"
                table.add_column(name, justify=justify, no_wrap=name != "which is")
            for row in devices[device]:
                if row["op"] == TOTAL:
                    table.add_section()
                table.add_row(*(text(row) for text in _COLUMNS.values()))
            console.print(table)
        console.print(_totals(step, [found[-1] for found in devices.values()]))
    for note in floor_notes(name for devices in tables.values() for name in devices):
        console.print(f"note: {note}")


def _totals(step: str, totals: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"{step}: {LABEL}; one GPU for the whole model", title_justify="left")
    for name in ("GPU", "floor ms", "low ms", "up ms", "over the floor", "launches", "adding ms"):
        table.add_column(name, justify="left" if name == "GPU" else "right")
    table.add_column("which are")
    for row in totals:
        floor, low, up = (row[name] / 1e3 for name in ("floor_us", "low_us", "up_us"))
        table.add_row(
            row["device"],
            *(f"{ms:,.2f}" for ms in (floor, low, up)),
            f"{low / floor:.2f} .. {up / floor:.2f}",
            f"{row['launches']:,}",
            f"{row['launches'] * LAUNCH_US / 1e3:,.2f}",
            row["source"],
        )
    return table
