"""Elements of a page: those of `xml.etree`, which escapes whatever a name contains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element

Cell = str | Element


def attribute(value: object) -> str:
    """As it is written; a number to hundredths."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def tag(name: str, /, *content: Element | str, **attributes: object) -> Element:
    """An element. In names of attributes ``_`` is ``-``, at their end it is dropped: ``class_``."""
    named = {k.rstrip("_").replace("_", "-"): attribute(v) for k, v in attributes.items()}
    made = Element(name, named)
    for part in content:
        if not isinstance(part, str):
            made.append(part)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + part
        else:
            made.text = (made.text or "") + part
    return made


def table(
    caption: str, headings: Sequence[str], bodies: Iterable[Element], texts: int = 1
) -> Element:
    """A table that scrolls by itself; the first ``texts`` columns are not numbers."""
    heads = [_head(name, i >= texts) for i, name in enumerate(headings)]
    made = tag("table", tag("caption", caption), tag("thead", tag("tr", *heads)), *bodies)
    return tag("div", made, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _head(name: str, numeric: bool) -> Element:
    return tag("th", name, scope="col", class_="n" if numeric else "t")


def table_row(cells: Sequence[Cell], texts: int = 1, **attributes: str) -> Element:
    """A row of `table`: its header, its texts, its numbers."""
    parts = [tag("th", cells[0], scope="row")]
    for i, cell in enumerate(cells[1:], 1):
        parts.append(tag("td", cell, class_="n" if i >= texts else "t"))
    return tag("tr", *parts, **attributes)


def figure(title: str, note: str, svg: Element | None, kind: str = "wide") -> list[Element]:
    """A plot with its caption and a smaller note, "wide" or a "card"; nothing without a plot."""
    if svg is None:
        return []
    caption = tag("figcaption", title, tag("small", note))
    return [tag("figure", caption, tag("div", svg, class_="scroll"), class_=kind)]
