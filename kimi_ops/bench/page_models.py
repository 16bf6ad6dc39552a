"""The part of the page that a model computed, and the steps of the whole model, drawn as shares.

Rows are the dictionaries of `kimi_ops.bench.modelled` and `kimi_ops.bench.step`; what one lacks is
shown as a dash.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from kimi_ops.bench.cells import DASH, number, time_text
from kimi_ops.bench.markup import Cell, figure, table, table_row, tag
from kimi_ops.bench.plots import WIDE
from kimi_ops.bench.record import Run
from kimi_ops.bench.svg import drawing, label, text_width
from kimi_ops.testing.cost.report import LABEL

_TOTAL = "total"  # the op of rows that sum a step up, as `kimi_ops.bench.step` has it
_OTHERS = "all others"
_TINTS = ("c0", "c1", "c2", "c3", "c4", "c6")  # not c5, which is as grey as all others
_WORDS = (
    "Times that a model computes from the kernels' compiled code and from published rates of GPUs; "
    "no GPU ran them. Low: everything overlaps. Up: nothing of the two largest parts does. Floor: "
    "what must be read, written and multiplied at least, at the GPU's own rates."
)
_Figures = Mapping[str, Any]


def _value(row: _Figures, name: str) -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else None


def _text(row: _Figures, name: str) -> str:
    value = row.get(name)
    if isinstance(value, int | float):
        return number(value) if isinstance(value, float) else f"{value:,}"
    return DASH if value is None or value == "" else str(value)


def _of_steps(rows: Sequence[_Figures]) -> Iterator[tuple[str, list[_Figures]]]:
    """Rows of each step on each device, without their totals."""
    found: dict[str, list[_Figures]] = {}
    for row in rows:
        if row.get("op") != _TOTAL:
            named = (str(row[name]) for name in ("step", "device") if row.get(name))
            found.setdefault(", ".join(named), []).append(row)
    yield from found.items()


def _sums(rows: Sequence[_Figures], name: str) -> dict[str, float]:
    """Of each op the sum of a figure over all parts of the model."""
    sums: dict[str, float] = {}
    for row in rows:
        if value := _value(row, name):
            sums[_text(row, "op")] = sums.get(_text(row, "op"), 0.0) + value
    return sums


def step_bars(rows: Sequence[_Figures], name: str, title: str) -> Element | None:
    """What share of each step every op takes: stacked bars, the largest ops coloured.

    Nothing where no row has the figure.

    Args:
        rows: of `kimi_ops.bench.step`.
        name: of the figure: "low_us", "measured_us".
        title: of the plot.
    """
    steps = {step: _sums(mine, name) for step, mine in _of_steps(rows)}
    steps = {step: sums for step, sums in steps.items() if sums}
    if not steps:
        return None
    shares: dict[str, float] = {}
    for sums in steps.values():
        for op, value in sums.items():
            shares[op] = max(shares.get(op, 0.0), value / sum(sums.values()))
    order = sorted(shares, key=lambda op: -shares[op])
    classes = dict(zip(order, _TINTS, strict=False))
    names = [*classes, *([_OTHERS] if len(order) > len(classes) else [])]
    height = 58
    words = "Each bar is a step, each part of it an op; the table below has the numbers."
    svg = drawing(title, words, WIDE, height * len(steps) + 24)
    for i, (step, sums) in enumerate(steps.items()):
        base, total = height * i, sum(sums.values())
        label(svg, 0, base + 14, step, "strong", WIDE - 120)
        label(svg, WIDE, base + 14, time_text(total), "end strong")
        parts = [(op, sums[op], tint) for op, tint in classes.items() if op in sums]
        rest = total - sum(value for _, value, _ in parts)
        parts += [(_OTHERS, rest, "rest")] if rest > 1e-6 * total else []
        left = 0.0
        for op, value, tint in parts:
            wide = value / total * WIDE
            told = tag("title", f"{op}: {time_text(value)}, {value / total:.1%} of {step}")
            box = {"x": left, "y": base + 22, "width": max(wide - 1.5, 0.5), "height": 26}
            svg.append(tag("rect", told, class_=f"bar {tint}", **box))
            for text in (f"{op} {value / total:.0%}", f"{value / total:.0%}"):
                if text_width(text, bold=True) < wide - 10:
                    label(svg, left + 7, base + 39, text, "inside strong")
                    break
            left += wide
    left, base = 0.0, height * len(steps) + 14
    for op in names:
        if left and left + text_width(op) + 18 > WIDE:
            left, base = 0.0, base + 20
        box = {"x": left, "y": base - 10, "width": 11, "height": 11}
        svg.append(tag("rect", class_=f"bar {classes.get(op, 'rest')}", **box))
        label(svg, left + 17, base, op, "soft")
        left += text_width(op) + 40
    svg.set("height", f"{base + 10:.0f}")
    svg.set("viewBox", f"0 0 {WIDE} {base + 10:.0f}")
    return svg


def measured_steps(run: Run) -> list[Element]:
    """Shares of steps as far as this run measured their calls; nothing where it measured none."""
    devices = [row.get("device") for row in run.steps]
    # What was measured is the same in the rows of every GPU.
    rows = [{**row, "device": ""} for row in run.steps if row.get("device") == devices[0]]
    rows = [row for row in rows if row.get("op") != _TOTAL]
    known = [row for row in rows if _value(row, "measured_us") is not None]
    if not known:
        return []
    title = "Calls of a step of the whole model, as far as they were measured"
    note = f"{len(known)} of {len(rows)} kinds of calls were; shares are of these alone."
    names = ("op", "part", "step", "measured_by", "calls", "measured_us")
    lines = [table_row([_text(row, name) for name in names], 4) for row in known]
    headings = ("op", "part", "step", "measured", "calls", "all calls, µs")
    numbers = table(title, headings, [tag("tbody", *lines)], 4)
    return [
        *figure(title, note, step_bars(rows, "measured_us", title)),
        _folded("Their times", numbers),
    ]


def modelled_section(run: Run) -> list[Element]:
    """All that a model says, where nobody can take it for a measurement."""
    if not run.modelled and not run.steps:
        return []
    parts: list[Element] = []
    title = f"Shares of a step of the whole model, {LABEL}"
    note = "The low figures, launches not included; calls that have no model at their floor."
    parts += figure(title, note, step_bars(run.steps, "low_us", title))
    parts += [_step_table(step, mine) for step, mine in _of_steps(run.steps)]
    if run.modelled:
        parts.append(tag("h3", f"Single calls, {LABEL}"))
    parts += [_op_table(op, run.modelled) for op in _ops(run.modelled)]
    if notes := _notes(run.modelled):
        items = [tag("li", note) for note in notes]
        parts.append(_folded("What the figures leave out", tag("ul", *items, class_="reasons")))
    heading = tag("h2", LABEL, id="modelled")
    return [tag("section", heading, tag("p", _WORDS), *parts, class_="modelled")]


def _notes(rows: Sequence[_Figures]) -> list[str]:
    """Of all kernels, by device."""
    return list(
        dict.fromkeys(
            f"{_text(row, 'device')}: {note}"
            for row in rows
            for kernel in row.get("kernels") or ()
            for note in kernel.get("notes") or ()
        )
    )


def _ops(rows: Sequence[_Figures]) -> list[str]:
    return list(dict.fromkeys(_text(row, "op") for row in rows))


def _folded(name: str, shown: Element) -> Element:
    return tag("details", tag("summary", name), shown)


def _step_table(step: str, rows: Sequence[_Figures]) -> Element:
    texts, figures = ("op", "part", "source"), ("calls", "launches", "floor_us", "low_us", "up_us")
    total = {name: sum(_value(row, name) or 0.0 for row in rows) for name in figures}
    lines = []
    for row in sorted(rows, key=lambda row: -(_value(row, "low_us") or 0.0)):
        low = _value(row, "low_us")
        share = DASH if low is None or not total["low_us"] else f"{low / total['low_us']:.1%}"
        lines.append(table_row([*(_text(row, name) for name in (*texts, *figures)), share], 3))
    sums = [number(total[name]) for name in figures]
    lines.append(table_row([_TOTAL, "", "", *sums, ""], 3, class_="sum"))
    names = ("op", "part", "figures are", "calls", "launches", "floor µs", "low µs", "up µs")
    body = tag("tbody", *lines)
    return _folded(step, table(f"{step}: {LABEL}", [*names, "share of low"], [body], 3))


def _op_table(op: str, rows: Sequence[_Figures]) -> Element:
    lines = [_row(row) for row in rows if _text(row, "op") == op]
    headings = ("case", "backend", "device", "bound by", "kernels", "floor µs", "low µs", "up µs")
    return _folded(op, table(f"{op}: {LABEL}", headings, [tag("tbody", *lines)], 5))


def _row(row: _Figures) -> Element:
    names = [_text(row, name) for name in ("case", "backend", "device")]
    if row.get("reason"):
        cells = [tag("th", names[0], scope="row"), *(tag("td", name) for name in names[1:])]
        why = f"{_text(row, 'reason')} (floor {_text(row, 'floor_us')} µs)"
        return tag("tr", *cells, tag("td", why, colspan=5, class_="reason"))
    kernels = [k for k in row.get("kernels") or () if isinstance(k, Mapping)]
    longest = max(kernels, key=lambda k: _value(k, "low_us") or 0.0, default={})
    figures = [_text(row, name) for name in ("floor_us", "low_us", "up_us")]
    return table_row([*names, _text(longest, "bound"), _kernels(kernels), *figures], 5)


def _kernels(kernels: Sequence[_Figures]) -> Cell:
    if not kernels:
        return DASH
    items = []
    for kernel in kernels:
        times = f"{_text(kernel, 'low_us')} to {_text(kernel, 'up_us')} µs"
        items.append(tag("li", f"{_text(kernel, 'name')}: {times}, by {_text(kernel, 'bound')}"))
    return tag("details", tag("summary", str(len(kernels))), tag("ul", *items))
