"""The table of supported instructions, as Markdown: ``python -m kimi_ops.testing.ptx.table``."""

from __future__ import annotations

import re

from kimi_ops.testing.ptx import families
from kimi_ops.testing.ptx.registry import ENTRIES, Entry

_SHAPE = re.compile(r"m64n(\d+)k(\d+)")


def _row(entry: Entry, opcodes: list[str]) -> str:
    def listed(words: frozenset[str]) -> str:
        # The many shapes of wgmma take one word, with the values of N.
        widths: dict[str, list[int]] = {}
        rest = []
        for word in sorted(words):
            shape = _SHAPE.fullmatch(word)
            if shape:
                widths.setdefault(shape[2], []).append(int(shape[1]))
            else:
                rest.append(f"`.{word}`")
        for k, found in widths.items():
            every = sorted(found) == [*range(8, 257, 8)]
            which = "8 to 256 by 8" if every else ", ".join(str(n) for n in sorted(found))
            rest.append(f"`.m64nNk{k}` (N {which})")
        return " ".join(rest) or "-"

    names = " ".join(f"`{name}`" for name in opcodes)
    cells = (names, listed(entry.types), listed(entry.modifiers), entry.section, entry.summary)
    # A bar in a summary would end the cell.
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def supported() -> str:
    """One Markdown table per instruction family; what is not in them is an error that names it."""
    families.load()
    together: dict[int, tuple[Entry, list[str]]] = {}
    for entry in ENTRIES:
        together.setdefault(id(entry.build), (entry, []))[1].append(entry.opcode)
    sections: dict[str, list[str]] = {}
    for entry, opcodes in together.values():
        sections.setdefault(entry.family, []).append(_row(entry, opcodes))
    text = []
    for family, rows in sections.items():
        text += [f"## {family.capitalize()}", ""]
        text += [
            "| opcode | types | modifiers | section of the PTX ISA | meaning |",
            "|---|---|---|---|---|",
        ]
        text += [*sorted(rows), ""]
    return "\n".join(text)


if __name__ == "__main__":
    print(supported())
