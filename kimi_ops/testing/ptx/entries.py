"""Leaves out the other kernels of a module before it is parsed: a source may have dozens of them.

Source: PTX ISA, "Kernel Function Directives: .entry", "Comments".
"""

from __future__ import annotations

import re

_ENTRY = re.compile(r"^[ \t]*(?:\.(?:visible|weak|extern)[ \t]+)?\.entry\s+([\w$%]+)", re.M)
# What may hold a brace that is none, and what begins and ends a body, or stands for one.
_BOUND = re.compile(r'"[^"]*"|//[^\n]*|/\*.*?\*/|[{};]', re.S)


def _end_of(ptx: str, start: int) -> int:
    """Behind the body of a kernel, or behind the semicolon of one without, from its name on."""
    depth = 0
    for bound in _BOUND.finditer(ptx, start):
        if bound[0] in "{}":
            depth += 1 if bound[0] == "{" else -1
        if bound[0] in "};" and depth == 0:
            return bound.end()
    return len(ptx)


def only_entry(ptx: str, name: str) -> str:
    """The module without its other kernels; lines keep their numbers."""
    parts: list[str] = []
    done = 0
    entries = list(_ENTRY.finditer(ptx))
    if all(entry[1] != name for entry in entries):
        return ptx
    for entry in entries:
        if entry[1] == name or entry.start() < done:
            continue
        end = _end_of(ptx, entry.end())
        parts += [ptx[done : entry.start()], "\n" * ptx.count("\n", entry.start(), end)]
        done = end
    return "".join([*parts, ptx[done:]])
