"""The plots of a run, each one SVG: ratios to peers, rates against size, and the roofline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from xml.etree.ElementTree import Element

from kimi_ops.bench.cells import (
    Contest,
    ceiling_text,
    ceilings,
    contests,
    is_product,
    number,
    ops_of,
    ratio_text,
    share_text,
    spread_text,
    threads_text,
    time_text,
)
from kimi_ops.bench.markup import tag
from kimi_ops.bench.record import MEASURED, Row, Run
from kimi_ops.bench.style import COLOURS
from kimi_ops.bench.svg import (
    Box,
    Point,
    Scale,
    apart,
    axes,
    dot,
    drawing,
    fitted,
    label,
    line,
    padded,
    placed,
    text_width,
    tick_text,
)

CARD = 460  # width of the small plots, which a phone shows whole
WIDE = 900


def colours(run: Run) -> dict[str, str]:
    """Class of each contestant, the same all over a page: c0 of our first backend alone, and of
    others one that nobody else has in the same ops, as long as there are enough."""
    rows = sorted((r for r in run.rows if r.status == MEASURED), key=lambda r: not r.ours)
    found: dict[str, str] = {}
    for name in dict.fromkeys(r.contestant for r in rows):
        ops = {r.op for r in rows if r.contestant == name}
        taken = {found.get(r.contestant) for r in rows if r.op in ops}
        free = [f"c{i}" for i in range(1, COLOURS) if f"c{i}" not in taken]
        first = not found and rows[0].ours
        found[name] = "c0" if first else free[0] if free else f"c{1 + len(found) % (COLOURS - 1)}"
    return found


def _tooltip(row: Row) -> str:
    place = Contest(row.op, row.case, row.threads, ())
    facts = [f"{time_text(row.us)} ({spread_text(row)})", f"{number(row.gbps)} GB/s"]
    if row.flops:
        facts.append(f"{number(row.tflops)} TFLOP/s")
    facts += [share_text(row), f"{ratio_text(row)} the time of ours" * (not row.ours)]
    return f"{row.contestant}\n{row.op}, {place}\n" + "\n".join(fact for fact in facts if fact)


def _at(threads: int) -> str:
    return f" at {threads_text(threads)}" * bool(threads)


def ratio_bars(found: Sequence[Contest], classes: dict[str, str]) -> Element | None:
    """Of cases of one op at one number of threads: time of the best peer over ours, others as dots.

    Nothing where no peer was measured.
    """
    found = [c for c in found if c.ratio]
    if not found:
        return None
    peers = [[r for r in c.measured if not r.ours] for c in found]
    ratios = [r.ratio for rows in peers for r in rows]
    height, top = 38, 8
    bottom = top + height * len(found)
    x = Scale(min(0.8, *ratios) / 1.1, max(2.0, *ratios) * 1.1, 2, CARD - 2, log=True)
    svg = drawing(
        f"{found[0].op}{_at(found[0].threads)}: time of peers over ours",
        "Bars to the right of 1x: ours is faster than the best peer. Dots: the other peers.",
        CARD,
        bottom + 44,
    )
    for value in x.ticks():
        label(svg, x(value), bottom + 16, f"{tick_text(value)}x", "soft middle")
    label(svg, CARD / 2, bottom + 36, "time of a peer / time of ours (log)", "soft middle")
    for i, (contest, rows) in enumerate(zip(found, peers, strict=True)):
        peer = contest.best_peer
        assert peer is not None
        base = top + height * i
        for tick in x.ticks():
            line(svg, [(x(tick), base + 18), (x(tick), base + 32)], "grid")
        name = fitted(f"{ratio_text(peer)} {peer.contestant}", CARD * 0.52)
        label(svg, CARD - 2, base + 14, name, f"end own strong {classes[peer.contestant]}")
        label(svg, 2, base + 14, contest.case, room=CARD - 14 - text_width(name, bold=True))
        left, right = sorted((x(1), x(peer.ratio)))
        box = {"x": left, "y": base + 20, "width": max(right - left, 1.0), "height": 10}
        told = tag("title", _tooltip(peer))
        svg.append(tag("rect", told, class_=f"bar {classes[peer.contestant]}", **box))
        for row in rows:
            if row is not peer:
                tint = f"ring {classes[row.contestant]}"
                dot(svg, x(row.ratio), base + 25, _tooltip(row), tint)
        line(svg, [(x(1), base + 16), (x(1), base + 34)], "axis")
    return svg


def _rate(row: Row, products: bool, us: float) -> float:
    if products:
        return row.flops / us / 1e6
    return (row.read_bytes + row.written_bytes) / us / 1e3


def against_size(
    rows: Sequence[Row], limits: dict[str, float], classes: dict[str, str], products: bool
) -> Element | None:
    """Bandwidth, or FLOP/s, against the size of the cases of a series at one number of threads.

    Nothing where fewer than two sizes were measured, or there are no products.

    Args:
        rows: of the series, measured.
        limits: the ceilings.
        classes: as `colours` has them.
        products: whether to show FLOP/s.
    """
    rows = [r for r in rows if r.size > 0 and _rate(r, products, 1.0)]
    sizes = sorted({r.size for r in rows})
    if len(sizes) < 2:
        return None
    what, unit = ("FLOP/s", "TFLOP/s") if products else ("Bandwidth", "GB/s")
    names = dict.fromkeys(r.contestant for r in sorted(rows, key=lambda r: not r.ours))
    bound = dict.fromkeys(r.ceiling for r in rows if is_product(r) == products)
    roofs = {n: limits[n] / (1e12 if products else 1e9) for n in bound if n in limits}
    room = min(176.0, max(map(text_width, names)) + 6)
    x = Scale(sizes[0], sizes[-1], 46, CARD - room - 14, log=True)
    fastest = [_rate(r, products, r.p10_us or r.us) for r in rows]
    y = Scale(0, max([*fastest, *roofs.values()]) * 1.08, 236, 34)
    title = f"{what} of {rows[0].op}, {rows[0].series}{_at(rows[0].threads)}"
    shown = (
        "Lines: medians of each contestant; whiskers: 10th to 90th percentile; dashed: ceilings."
    )
    svg = drawing(title, shown, CARD, 280)
    axes(svg, x, y, (f"{rows[0].unit or 'size'} (log)", unit), sizes)
    for roof in roofs.values():
        line(svg, [(x.start, y(roof)), (x.end, y(roof))], "ceiling")
    ends: list[Point] = []
    for name in reversed(names):
        mine = sorted((r for r in rows if r.contestant == name), key=lambda r: r.size)
        points = [(x(r.size), y(_rate(r, products, r.us))) for r in mine]
        line(svg, points, f"curve {classes[name]}")
        for row, (at, height) in zip(mine, points, strict=True):
            ends_at = [(at, y(_rate(row, products, us))) for us in (row.p90_us, row.p10_us) if us]
            line(svg, ends_at, f"whisker {classes[name]}")
            dot(svg, at, height, _tooltip(row), f"dot {classes[name]}")
        ends.append(points[-1])
    heights = apart([height for _, height in ends], 15, y.end - 8, y.start)
    for name, (at, was), height in zip(reversed(names), ends, heights, strict=True):
        line(svg, [(at + 5, was), (x.end + 9, height)], "lead")
        label(svg, x.end + 12, height + 4, name, f"own {classes[name]}", room)
    heights = apart([y(roof) - 5 for roof in roofs.values()], 15, 0, y.start)
    for (name, roof), height in zip(roofs.items(), heights, strict=True):
        label(svg, x.start + 6, height, f"{name} {number(roof)}", "strong halo")
    return svg


def roofline(run: Run, threads: int) -> Element | None:
    """FLOP/s of all cases with products against their intensity, below the measured ceilings.

    Nothing where there is no such case.
    """
    limits = ceilings(run, threads)
    rows = [r for r in run.rows if r.status == MEASURED and r.threads == threads and r.flops]
    rows = [r for r in rows if r.read_bytes + r.written_bytes]
    if not any(r.ours for r in rows):
        return None
    flat = {n: v / 1e12 for n, v in limits.items() if n.endswith("product")}
    slopes = {n: v / 1e12 for n, v in limits.items() if n not in flat}
    points = {id(r): (r.flops / (r.read_bytes + r.written_bytes), r.tflops) for r in rows}
    where, heights = zip(*points.values(), strict=True)
    top = max([*heights, *flat.values()])
    ridges = [top / slope for slope in slopes.values()]
    # Room at the lower left for the names of the slopes.
    x = Scale(min(*where, *ridges) / 5, max(*where, *ridges) * 2, 52, WIDE - 20, log=True)
    y = Scale(min(*heights, *flat.values()) / 2.5, top * 1.3, 400, 34, log=True)
    words = "Dots: ours; rings: peers; lines: what the machine can do at best, measured."
    svg = drawing(f"Roofline{_at(threads)}", words, WIDE, 444)
    axes(svg, x, y, ("operations per byte that a call needs at least (log)", "TFLOP/s (log)"))
    taken: list[Box] = []
    steepest = max(slopes.values(), default=0.0)
    for name, slope in slopes.items():
        first, last = max(x.low, y.low / slope), min(x.high, top / slope)
        if first < last:
            ends = [(x(v), y(slope * v)) for v in (first, last)]
            line(svg, ends, "ceiling")
            text = f"{name} {ceiling_text(name, limits[name])}"
            svg.append(_along(ends, text, 6 if slope == steepest else -15))
            taken += _around(ends)
            taken += _around([(x + 12, y + 12) for x, y in ends]) if slope != steepest else []
    levels = apart([y(roof) - 6 for roof in flat.values()], 15, 0, y.start)
    for (name, roof), height in zip(flat.items(), levels, strict=True):
        ridge = max(x.low, roof / steepest) if steepest else x.low
        ends = [(x(ridge), y(roof)), (x.end, y(roof))]
        line(svg, ends, "ceiling")
        text = f"{name} {ceiling_text(name, limits[name])}"
        label(svg, x.end, height, text, "end strong halo")
        wide = text_width(text, bold=True)
        taken += [*_around(ends), (x.end - wide, height - 12, x.end, height + 3)]
    classes = {op: f"c{i % COLOURS}" for i, op in enumerate(ops_of(rows))}
    spots = {key: (x(at), y(height)) for key, (at, height) in points.items()}
    taken += [(at - 5, height - 5, at + 5, height + 5) for at, height in spots.values()]
    anchors = {op: [spots[id(r)] for r in rows if r.op == op and r.ours] for op in classes}
    named = [op for op in classes if anchors[op]]
    frame = (x.start, y.end, x.end, y.start)
    places = placed(named, [anchors[op] for op in named], taken, frame)
    for op, (left, base) in zip(named, places, strict=True):
        label(svg, left, base, op, f"own strong {classes[op]}")
    for row in sorted(rows, key=lambda r: r.ours):
        tint = f"{'dot' if row.ours else 'ring'} {classes[row.op]}"
        dot(svg, *spots[id(row)], _tooltip(row), tint, 4.5 if row.ours else 3.0)
    return svg


def _along(ends: Sequence[Point], text: str, above: float) -> Element:
    """A text along a rising line, near its lower end."""
    (a, b), (c, d) = ends
    angle = math.atan2(d - b, c - a)
    x = a + 12 * math.cos(angle) + above * math.sin(angle)
    y = b + 12 * math.sin(angle) - above * math.cos(angle)
    spin = f"rotate({math.degrees(angle):.1f} {x:.1f} {y:.1f})"
    return tag("text", text, x=x, y=y, transform=spin, class_="strong halo")


def _around(ends: Sequence[Point]) -> list[Box]:
    """Small boxes all along a line."""
    (a, b), (c, d) = ends
    places = [(a + i / 60 * (c - a), b + i / 60 * (d - b)) for i in range(61)]
    return [(x - 3, y - 3, x + 3, y + 3) for x, y in places]


def streams(run: Run, threads: int) -> Element | None:
    """Bandwidth of all cases without products, a row for each op, beside the ceilings.

    Nothing where there is no such case.
    """
    rows = [r for r in run.rows if r.status == MEASURED and r.threads == threads]
    rows = [r for r in rows if not r.flops and r.gbps]
    if not any(r.ours for r in rows):
        return None
    limits = {n: v / 1e9 for n, v in ceilings(run, threads).items() if not n.endswith("product")}
    ops = ops_of(r for r in rows if r.ours)
    left = max(map(text_width, ops)) + 16
    x = padded([*(r.gbps for r in rows), *limits.values()], left, WIDE - 20)
    top = 16 * len(limits) + 14
    bottom = top + 26 * len(ops)
    words = "Dots: ours; rings: peers; dashed lines: what the machine can do at best, measured."
    svg = drawing(f"Bandwidth where memory alone decides{_at(threads)}", words, WIDE, bottom + 44)
    for value in x.ticks():
        line(svg, [(x(value), top), (x(value), bottom)], "grid")
        label(svg, x(value), bottom + 16, tick_text(value), "soft middle")
    label(svg, (x.start + x.end) / 2, bottom + 36, "GB/s (log)", "soft middle")
    # The lowest ceiling has the lowest name: none stands in the way of another's line.
    for i, (name, value) in enumerate(sorted(limits.items(), key=lambda item: -item[1])):
        line(svg, [(x(value), 16 * i + 4), (x(value), bottom)], "ceiling")
        label(svg, x(value) - 6, 16 * i + 14, f"{name} {number(value)}", "end strong")
    for i, op in enumerate(ops):
        base = top + 26 * i + 13
        label(svg, left - 14, base + 4, op, "end")
        for row in sorted((r for r in rows if r.op == op), key=lambda r: r.ours):
            tint = "dot c0" if row.ours else "ring c5"
            dot(svg, x(row.gbps), base, _tooltip(row), tint, 4.5 if row.ours else 3.0)
    return svg


def best_ratios(run: Run) -> list[tuple[str, list[Contest]]]:
    """Of each op its cases with a measured peer, at the most threads that it was measured with."""
    found = []
    for op in ops_of(run.rows):
        mine = [c for c in contests(run.rows) if c.op == op and c.ratio]
        most = max((c.threads for c in mine), default=0)
        if mine:
            found.append((op, [c for c in mine if c.threads == most]))
    return found


def ratios_by_op(run: Run, width: int = WIDE) -> Element | None:
    """Time of the best peer over ours: a row for each op, a dot for each case, a bar to the median.

    Nothing where no peer was measured.
    """
    found = best_ratios(run)
    if not found:
        return None
    values = {op: [c.ratio for c in mine] for op, mine in found}
    left = max(text_width(op) for op in values) + 16
    every = [v for mine in values.values() for v in mine]
    x = Scale(min(0.8, *every) / 1.1, max(2.0, *every) * 1.1, left, width - 70, log=True)
    bottom = 30 + 28 * len(found)
    threads = {c.threads for _, mine in found for c in mine}
    at = _at(threads.pop()) if len(threads) == 1 else ""
    words = "A dot for each case, a bar to their median; right of 1x kimi-ops is faster."
    svg = drawing(f"Time of the best peer over ours{at}", words, width, bottom + 44)
    for value in x.ticks():
        line(svg, [(x(value), 26), (x(value), bottom)], "grid")
        label(svg, x(value), bottom + 16, f"{tick_text(value)}x", "soft middle")
    name = "time of the best peer / time of kimi-ops (log); dots: cases; bars, numbers: medians"
    label(svg, (x.start + x.end) / 2, bottom + 36, name, "soft middle")
    label(svg, x(1) + 6, 18, "kimi-ops is faster →", "own strong c0")
    label(svg, x(1) - 6, 18, "← slower", "own strong c1 end", x(1) - 6)
    for i, (op, mine) in enumerate(found):
        base = 30 + 28 * i + 14
        middle = statistics.median(values[op])
        tint = "c0" if middle >= 1 else "c1"
        start, end = sorted((x(1), x(middle)))
        label(svg, left - 14, base + 4, op, "end")
        svg.append(tag("rect", x=start, y=base - 6, width=max(end - start, 1.0), height=12,
                       class_=f"bar {tint}", opacity=0.35))  # fmt: skip
        for contest in mine:
            peer = contest.best_peer
            assert peer is not None
            sign = "c0" if peer.ratio >= 1 else "c1"
            dot(svg, x(peer.ratio), base, _tooltip(peer), f"dot {sign}")
        label(svg, width - 4, base + 4, f"{number(middle)}x", f"end own strong {tint}")
    line(svg, [(x(1), 26), (x(1), bottom)], "axis")
    return svg
