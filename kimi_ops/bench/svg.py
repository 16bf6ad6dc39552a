"""SVG by hand: scales, axes, labels and marks; classes of `kimi_ops.bench.style` colour them.

Lengths are pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from kimi_ops.bench.markup import attribute, tag


def drawing(title: str, description: str, width: float, height: float) -> Element:
    """An empty ``svg`` with what it shows, in words."""
    size: dict[str, object] = {"viewBox": f"0 0 {width:.0f} {height:.0f}"}
    size |= {"width": f"{width:.0f}", "height": f"{height:.0f}", "role": "img"}
    words = (tag("title", title), tag("desc", description))
    return tag("svg", *words, **size, aria_label=f"{title}. {description}")


def text_width(text: str, bold: bool = False) -> float:
    """About, in a wide sans serif."""
    narrow, wide = sum(text.count(c) for c in "ijlt.,:;|!'()[] "), sum(map(text.count, "mwMW@%"))
    return (13.2 if bold else 12) * (0.6 * (len(text) - narrow - wide) + 0.36 * narrow + 0.9 * wide)


def fitted(text: str, room: float) -> str:
    """Cut off where it would not fit, with an ellipsis."""
    if text_width(text) <= room:
        return text
    while text and text_width(text + "…") > room:
        text = text[:-1]
    return text.rstrip(" ,") + "…"


def label(svg: Element, x: float, y: float, text: str, classes: str = "", room: float = 0) -> None:
    """A text; one that had to be cut off to fit into ``room`` is whole in its tooltip."""
    shown = fitted(text, room) if room else text
    made = tag("text", shown, x=x, y=y, class_=classes)
    if shown != text:
        made.append(tag("title", text))
    svg.append(made)


def line(svg: Element, points: Sequence[tuple[float, float]], classes: str) -> None:
    """A polyline."""
    text = " ".join(f"{attribute(float(x))},{attribute(float(y))}" for x, y in points)
    svg.append(tag("polyline", points=text, class_=classes))


def dot(svg: Element, x: float, y: float, tooltip: str, classes: str, radius: float = 4) -> None:
    """A point with its tooltip."""
    svg.append(tag("circle", tag("title", tooltip), cx=x, cy=y, r=radius, class_=classes))


def tick_text(value: float) -> str:
    """As short as can be: ``0.01``, ``2.5``, ``32,768``."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class Scale:
    """From values to pixels.

    Attributes:
        low, high: values.
        start, end: their pixels.
        log: whether equal ratios are equally far apart.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values: four or so, on a logarithmic scale 1, 2, 5 or powers of ten."""
        if not self.log:
            rough = (self.high - self.low) / 4
            unit = 10.0 ** math.floor(math.log10(rough))
            step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= rough * 0.99)
            first = math.ceil(self.low / step - 1e-9)
            return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        decades = math.log10(self.high / self.low)
        places = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        digits = (1, 2, 5) if decades < 2.5 else (1,)
        found = [d * 10.0**p for p in places for d in digits]
        return [v for v in found if self.low * 0.999 <= v <= self.high * 1.001]


def padded(values: Sequence[float], start: float, end: float, by: float = 1.5) -> Scale:
    """A logarithmic scale that leaves a margin around values."""
    return Scale(min(values) / by, max(values) * by, start, end, log=True)


def axes(
    svg: Element, x: Scale, y: Scale, names: tuple[str, str], sizes: Sequence[float] = ()
) -> None:
    """Grid, ticks and the names of both axes; ``sizes`` are the ticks of the horizontal one."""
    for value in y.ticks():
        line(svg, [(x.start, y(value)), (x.end, y(value))], "grid")
        label(svg, x.start - 7, y(value) + 4, tick_text(value), "soft end")
    line(svg, [(x.start, y.start), (x.end, y.start)], "axis")
    taken = -math.inf
    for value in sizes or x.ticks():
        text = tick_text(value)
        line(svg, [(x(value), y.start), (x(value), y.start + 4)], "axis")
        if x(value) - text_width(text) / 2 > taken + 6:
            label(svg, x(value), y.start + 18, text, "soft middle")
            taken = x(value) + text_width(text) / 2
    label(svg, (x.start + x.end) / 2, y.start + 36, names[0], "soft middle")
    label(svg, 0, y.end - 14, names[1], "soft")


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Heights for labels near where they want to be, none closer than a gap where there is room."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    found = list(wanted)
    floor = low
    for i in order:
        found[i] = max(found[i], floor)
        floor = found[i] + gap
    ceiling = high
    for i in reversed(order):
        found[i] = min(found[i], ceiling)
        ceiling = found[i] - gap
    return found


Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom


def overlap(a: Box, b: Box) -> float:
    """Area that two boxes share."""
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return wide * high if wide > 0 and high > 0 else 0.0


def placed(
    texts: Sequence[str], anchors: Sequence[Sequence[Point]], taken: list[Box], frame: Box
) -> list[Point]:
    """Where bold labels begin, each beside one of its anchors where least is in the way.

    Args:
        texts: the labels.
        anchors: of each, the points it may name.
        taken: what is there already; the labels are added.
        frame: that they should not leave.
    """
    spots = []
    for text, points in zip(texts, anchors, strict=True):
        wide, best = text_width(text, bold=True), (math.inf, (0.0, 0.0))
        for x, y in points:
            beside = ((x + 8, y + 4), (x - wide - 8, y + 4), (x + 6, y - 7), (x + 6, y + 16))
            for left, base in (*beside, (x - wide / 2, y - 9), (x - wide / 2, y + 18)):
                box = (left, base - 11, left + wide, base + 3)
                cost = sum(overlap(box, other) for other in taken)
                cost += 14 * wide - overlap(box, frame)
                best = min(best, (cost, (left, base)))
        left, base = best[1]
        taken.append((left, base - 11, left + wide, base + 3))
        spots.append((left, base))
    return spots
