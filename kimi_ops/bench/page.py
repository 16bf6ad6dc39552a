"""A run as one HTML page that needs nothing else: facts, plots, tables, and apart from them models.

Colours follow the reader's light or dark scheme. Tables hold all that the plots show.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element, tostring

from kimi_ops.bench import plots
from kimi_ops.bench.cells import (
    DASH,
    NOTES,
    Contest,
    ceiling_text,
    ceilings,
    contests,
    error_text,
    facts,
    number,
    ops_of,
    ratio_text,
    reasons,
    share_text,
    spread_text,
    threads_text,
    time_text,
)
from kimi_ops.bench.markup import Cell, figure, table, table_row, tag
from kimi_ops.bench.page_models import measured_steps, modelled_section
from kimi_ops.bench.record import MEASURED, SKIPPED, WRONG, Row, Run
from kimi_ops.bench.style import DARK, LIGHT, PAGE, PLOTS, fixed
from kimi_ops.bench.svg import drawing, fitted
from kimi_ops.testing.cost.report import LABEL


def page(run: Run) -> str:
    """The whole page."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"kimi-ops bench, {run.machine.get('name', 'unknown machine')}"),
        tag("style", PAGE + PLOTS),
    )
    main = tag("main", _overview(run), *_ops(run), *modelled_section(run))
    body = tag("body", _header(run), main, tag("footer", tag("p", NOTES)))
    html = tag("html", head, body, lang="en")
    return "<!doctype html>\n" + tostring(html, encoding="unicode", method="html") + "\n"


def readme_plot(run: Run) -> str:
    """A stand-alone SVG file for a README: per op the time of the best peer over ours.

    It brings its own background, so that it can be read whatever it is shown on.
    """
    svg = plots.ratios_by_op(run, 760) or _nothing("no peer was measured")
    wide, high, pad = int(svg.attrib["width"]), int(svg.attrib["height"]) + 20, 16
    threads = {c.threads for _, mine in plots.best_ratios(run) for c in mine}
    machine = facts(run.machine)
    where = [machine.get("name", ""), *map(threads_text, threads), machine.get("commit", "")]
    words = ", ".join(filter(None, where))
    svg.append(tag("text", fitted(words, wide), x=wide, y=high, class_="soft end"))
    svg.set("viewBox", f"{-pad} {-pad} {wide + 2 * pad} {high + 2 * pad}")
    svg.set("width", str(wide + 2 * pad))
    svg.set("height", str(high + 2 * pad))
    svg.set("xmlns", "http://www.w3.org/2000/svg")
    dark = f"@media (prefers-color-scheme: dark) {{{fixed(PLOTS, DARK)}}}"
    corner = {"x": 0.5 - pad, "y": 0.5 - pad, "rx": 8}
    size = {"width": wide + 2 * pad - 1, "height": high + 2 * pad - 1}
    svg.insert(2, tag("style", fixed(PLOTS, LIGHT) + dark))
    svg.insert(3, tag("rect", class_="back", **corner, **size))
    return tostring(svg, encoding="unicode") + "\n"


def _nothing(text: str) -> Element:
    svg = drawing(text, text, 760, 40)
    svg.append(tag("text", text, x=0, y=24))
    return svg


def _header(run: Run) -> Element:
    found = facts(run.machine)
    name = found.pop("name", "unknown machine")
    rows = [r for r in run.rows if r.status == MEASURED]
    counts = [f"{len(contests(rows))} cases of {len(ops_of(rows))} ops, {len(rows)} measurements"]
    for status in (WRONG, SKIPPED):
        many = sum(r.status == status for r in run.rows)
        counts += [f"{many} {status}"] if many else []
    terms = [
        tag("div", tag("dt", key), tag("dd", value), class_="long" if len(value) > 40 else "short")
        for key, value in found.items()
    ]
    links = [tag("a", op, href=f"#op-{i}") for i, op in enumerate(ops_of(run.rows))]
    if run.modelled:
        links.append(tag("a", LABEL, href="#modelled"))
    return tag(
        "header",
        tag("h1", "kimi-ops bench"),
        tag("p", f"{name}: {', '.join(counts)}.", class_="lead"),
        tag("dl", *terms),
        tag("pre", tag("code", run.command)),
        tag("nav", *links, aria_label="ops"),
    )


def _overview(run: Run) -> Element:
    ratios = [c.ratio for _, mine in plots.best_ratios(run) for c in mine]
    faster = sum(ratio >= 1 for ratio in ratios)
    words = f"kimi-ops is at least as fast as the best peer in {faster} of {len(ratios)} cases, "
    words += "each op at the most threads that it was measured with."
    threads = sorted({r.threads for r in run.rows if r.status == MEASURED}, reverse=True)
    shown = figure("Time of the best peer over ours", words, plots.ratios_by_op(run))
    marks = "Dots: ours; rings: peers."
    for n in threads:
        at = f", {threads_text(n)}" * bool(n)
        note = f"Cases with matrix products, below what the machine can do. {marks}"
        shown += figure(f"Roofline{at}", note, plots.roofline(run, n))
        note = f"Cases without matrix products, beside what the memory can do. {marks}"
        shown += figure(f"Bandwidth where memory alone decides{at}", note, plots.streams(run, n))
    shown += measured_steps(run)
    if not shown:
        shown = [tag("p", "No case was measured.")]
    return tag("section", tag("h2", "At a glance"), _ceilings(run), *shown)


def _ceilings(run: Run) -> Element:
    threads = sorted({r.threads for r in run.rows}, reverse=True)
    found = {n: ceilings(run, n) for n in threads}
    names = list(dict.fromkeys(name for limits in found.values() for name in limits))
    if not names:
        return tag("p", "No ceiling was measured.")
    rows = []
    for n, limits in found.items():
        cells = [ceiling_text(k, limits[k]) if k in limits else DASH for k in names]
        rows.append(table_row([threads_text(n) or "GPU", *cells]))
    return table("What the machine can do, measured", ["", *names], [tag("tbody", *rows)])


def _ops(run: Run) -> list[Element]:
    found = contests(run.rows)
    classes = plots.colours(run)
    return [
        _op(run, f"op-{i}", [c for c in found if c.op == op], classes)
        for i, op in enumerate(ops_of(run.rows))
    ]


def _op(run: Run, anchor: str, found: Sequence[Contest], classes: dict[str, str]) -> Element:
    cards: list[Element] = []
    for threads in dict.fromkeys(c.threads for c in found):
        mine = [c for c in found if c.threads == threads]
        at = threads_text(threads)
        bars = plots.ratio_bars(mine, classes)
        note = "; ".join(filter(None, (at, "rings are the other peers")))
        cards += figure("Time of the best peer over ours", note, bars, "card")
        limits = ceilings(run, threads)
        rows = [r for c in mine for r in c.measured]
        for series in dict.fromkeys((r.series, r.unit) for r in rows if r.series):
            those = [r for r in rows if (r.series, r.unit) == series]
            for products in (False, True):
                svg = plots.against_size(those, limits, classes, products)
                title = f"{'FLOP/s' if products else 'Bandwidth'} against {series[1]}"
                cards += figure(title, ", ".join(filter(None, (series[0], at))), svg, "card")
    parts = [tag("h2", found[0].op, id=anchor)]
    parts += [tag("div", *cards, class_="cards")] if cards else []
    bodies = [_body(c) for c in found if any(r.status != SKIPPED for r in c.rows)]
    if bodies:
        columns = (f"p10{DASH}p90", "GB/s", "TFLOP/s", "share of ceiling", "ratio", "error")
        parts.append(table("Measured", ["contestant", "median", *columns], bodies))
    if lines := reasons(found):
        items = [tag("li", f"{who}: {why}") for who, why in lines]
        summary = tag("summary", "Not measured")
        parts.append(tag("details", summary, tag("ul", *items, class_="reasons"), open="open"))
    return tag("section", *parts)


def _body(contest: Contest) -> Element:
    title = tag("th", str(contest), colspan=8, scope="rowgroup")
    rows = [tag("tr", title, class_="case")]
    for row in contest.rows:
        ours = "ours" if row.ours else "peer"
        if row.status == WRONG:
            why = tag("td", f"{WRONG}: {row.reason}", colspan=7, class_="wrong")
            name = tag("th", row.contestant, scope="row")
            rows.append(tag("tr", name, why, class_=ours))
        elif row.status == MEASURED:
            rows.append(table_row(_cells(row), class_=ours))
    return tag("tbody", *rows)


def _cells(row: Row) -> list[Cell]:
    return [
        row.contestant,
        time_text(row.us),
        spread_text(row),
        number(row.gbps) if row.gbps else DASH,
        number(row.tflops) if row.tflops else DASH,
        share_text(row),
        ratio_text(row),
        error_text(row),
    ]
