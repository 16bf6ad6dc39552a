"""The table of supported instructions, as Markdown: ``python -m kimi_ops.testing.ptx.table``."""

from __future__ import annotations

from kimi_ops.testing.ptx import families
from kimi_ops.testing.ptx.registry import ENTRIES, Entry


def _row(entry: Entry, opcodes: list[str]) -> str:
    def listed(words: frozenset[str]) -> str:
        return " ".join(f"`.{word}`" for word in sorted(words)) or "-"

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
        text += ["| opcode | types | modifiers | PTX ISA 8.7 | meaning |", "|---|---|---|---|---|"]
        text += [*sorted(rows), ""]
    return "\n".join(text)


if __name__ == "__main__":
    print(supported())
