"""Results as text: tables for the terminal and for documents, and two runs side by side."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from kimi_ops.bench.cells import (
    DASH,
    NOTES,
    Contest,
    ceiling_text,
    ceilings,
    contests,
    error_text,
    facts,
    is_product,
    number,
    ops_of,
    percent,
    rate_text,
    ratio_text,
    reasons,
    share_text,
    spread_text,
    threads_text,
    time_text,
)
from kimi_ops.bench.record import MEASURED, SKIPPED, WRONG, Row, Run
from kimi_ops.testing.cost.report import LABEL

_APART = 1.1  # medians of two runs that differ by more do not agree
_PASSING = ("time", "clock")  # facts of a run that say nothing about whether it can be compared
_Cells = tuple[str, ...]
_HEADINGS = ("", "median", f"p10{DASH}p90", "rate", "ceiling", "ratio", "error")


def _cells(row: Row) -> _Cells:
    if row.status != MEASURED:
        return (f"  {row.contestant}", row.status, *("",) * (len(_HEADINGS) - 2))
    return (
        f"  {row.contestant}",
        time_text(row.us),
        spread_text(row),
        rate_text(row),
        percent(row),
        ratio_text(row),
        error_text(row),
    )


def _op_table(op: str, found: Sequence[Contest]) -> RenderableType:
    """Lines between which the columns of all cases are equally wide."""
    shown = [c for c in found if any(r.status != SKIPPED for r in c.rows)]
    rows = {c: [r for r in c.rows if r.status != SKIPPED] for c in shown}
    texts = [_HEADINGS, *(_cells(r) for mine in rows.values() for r in mine)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]

    def grid(lines: Iterable[tuple[_Cells, str]]) -> Table:
        table = Table.grid(padding=(0, 1))
        table.add_column(min_width=min(widths[0], 16), max_width=widths[0], overflow="fold")
        for width in widths[1:]:
            table.add_column(justify="right", no_wrap=True, min_width=width)
        for cells, style in lines:
            table.add_row(*(Text(cell, style) for cell in cells))
        return table

    def style_of(row: Row) -> str:
        return "red" if row.status == WRONG else "cyan" if row.ours else ""

    parts: list[RenderableType] = [Text(op, "bold underline")]
    parts += [grid([(_HEADINGS, "dim")])] if shown else []
    for contest in shown:
        bound = next((f": {r.ceiling} is its ceiling" for r in contest.measured if r.ceiling), "")
        parts.append(Text.assemble((str(contest), "bold"), (bound, "dim")))
        parts.append(grid((_cells(row), style_of(row)) for row in rows[contest]))
    parts += [Text(f"{who}: {why}", "dim") for who, why in reasons(found)]
    return Group(*parts, Text(""))


def terminal(run: Run) -> RenderableType:
    """A table for each op: ours first in each case, and below it who was not measured and why."""
    found = contests(run.rows)
    if not found:
        return Text("no rows")
    tables = [_op_table(op, [c for c in found if c.op == op]) for op in ops_of(run.rows)]
    return Group(*tables, Text(NOTES, "dim"))


def _cell(text: str) -> str:
    return re.sub(r"([|<>&*_`\\\[\]])", r"\\\1", text)


def markdown(run: Run, ops: Sequence[str] | None = None) -> str:
    """A Markdown table: a row for each case, with ours and the best peer.

    Args:
        run: whose rows.
        ops: only these.
    """
    lines = [
        "| op | case | kimi-ops | share of ceiling | best peer | its time | ratio |",
        "|---|---|--:|--:|---|--:|--:|",
    ]
    for contest in contests(run.rows):
        if ops is not None and contest.op not in ops:
            continue
        ours, peer = contest.ours, contest.best_peer
        cells = [f"`{contest.op}`", _cell(str(contest))]
        if ours:
            cells += [time_text(ours.us), _cell(share_text(ours))]
        else:
            cells += [contest.rows[0].status if contest.rows[0].ours else DASH, DASH]
        if peer:
            cells += [_cell(peer.contestant), time_text(peer.us), ratio_text(peer)]
        else:
            cells += [DASH] * 3
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def modelled_markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table of `kimi_ops.bench.modelled` rows, without those that only say why not."""
    lines = [
        f"Times of GPUs: {LABEL}. Microseconds of a call's kernels, launches not included.",
        "",
        "| op | case | kernel of | GPU | floor | low | up | launches | bound by |",
        "|---|---|---|---|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        if row["reason"]:
            continue
        bounds = dict.fromkeys(kernel["bound"] for kernel in row["kernels"])
        cells = [
            f"`{row['op']}`",
            _cell(row["case"]),
            row["backend"],
            row["device"],
            *(number(row[name]) for name in ("floor_us", "low_us", "up_us")),
            str(row["launches"]),
            ", ".join(bounds),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def report(run: Run) -> str:
    """Everything of a run that was measured, and apart from it what was modelled."""
    parts = [markdown(run)] if run.rows else []
    return "\n".join([*parts, *([modelled_markdown(run.modelled)] if run.modelled else [])])


def _machine_lines(old: Run, new: Run) -> list[str]:
    """Facts that differ, and ceilings that differ by more than the medians may."""
    then, now = facts(old.machine), facts(new.machine)
    lines = [
        f"{name}: {then.get(name, DASH)} then, {now.get(name, DASH)} now"
        for name in dict.fromkeys((*then, *now))
        if name not in _PASSING and then.get(name) != now.get(name)
    ]
    lines = lines or ["the same machine, versions and commit"]
    for threads in sorted({row.threads for row in new.rows}):
        before, after = ceilings(old, threads), ceilings(new, threads)
        for name in before.keys() & after.keys():
            a, b = before[name], after[name]
            if max(a, b) > _APART * min(a, b):
                rates = f"{ceiling_text(name, a)} then, {ceiling_text(name, b)} now"
                at = f" at {threads_text(threads)}" * bool(threads)
                lines.append(f"the ceiling itself, {name}{at}: {rates}")
    return lines


def _by_key(run: Run) -> dict[tuple[str, str, str, int], Row]:
    return {(r.op, r.case, r.contestant, r.threads): r for r in run.rows}


def _side_by_side(pairs: Sequence[tuple[Row, Row]]) -> str:
    table = Table("op", "case", "contestant", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("threads", "median then", "median now", "now / then"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for a, b in pairs:
        named = (b.op, b.case, b.contestant, str(b.threads or DASH))
        times = (time_text(a.us), time_text(b.us), f"{b.us / a.us:.2f}")
        table.add_row(*map(Text, (*named, *times, "apart" * (not _agree(a, b)))))
    text = io.StringIO()
    Console(file=text, width=200, highlight=False, markup=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _agree(a: Row, b: Row) -> bool:
    return max(a.us, b.us) <= _APART * min(a.us, b.us)


def compared(old: Run, new: Run) -> tuple[str, bool]:
    """Two runs side by side, and whether they agree.

    They agree if there is something to compare, no median differs by more than 10 %, and no
    contestant is wrong in one of them alone.
    """
    before, after = _by_key(old), _by_key(new)
    common = [(before[key], after[key]) for key in after if key in before]
    pairs = [(a, b) for a, b in common if a.status == b.status == MEASURED]
    wrong = [(a, b) for a, b in common if (a.status == WRONG) != (b.status == WRONG)]
    lines = _machine_lines(old, new)
    if pairs:
        lines.append(_side_by_side(pairs))
    for run, mine, other in (("then", before, after), ("now", after, before)):
        alone = [key for key, row in mine.items() if row.status == MEASURED]
        alone = [k for k in alone if k not in other or other[k].status != MEASURED]
        lines += [f"measured {run} alone: {_named(mine[key])}" for key in alone]
    lines += [f"{_named(b)}: {a.status} then, {b.status} now" for a, b in wrong]
    apart = [(a, b) for a, b in pairs if not _agree(a, b)]
    for kind, product in (("compute-bound", True), ("memory-bound", False)):
        bound = [(a, b) for a, b in pairs if is_product(b) == product]
        if not bound:
            continue
        differ = [(a, b) for a, b in bound if (a, b) in apart]
        lines.append(f"{kind}: {len(differ)} of {len(bound)} differ by more than {_APART - 1:.0%}")
        for a, b in differ:
            lines.append(f"  {_named(b)}: {time_text(a.us)} then, {time_text(b.us)} now")
    agree = bool(pairs) and not apart and not wrong
    verdict = "The runs agree." if agree else "The runs do NOT agree."
    lines.append(verdict if pairs else "The runs have nothing in common that was measured.")
    return "\n".join(lines) + "\n", agree


def _named(row: Row) -> str:
    place = Contest(row.op, row.case, row.threads, ())
    return f"{row.op}, {place}, {row.contestant}"
