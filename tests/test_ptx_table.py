"""The registry of instructions and the table made from it."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import pytest
from ptx_text import kernel_text

from kimi_ops.testing.ptx import Kernel, UnsupportedPtx, families
from kimi_ops.testing.ptx.registry import ENTRIES, instruction, lookup
from kimi_ops.testing.ptx.syntax import Instruction
from kimi_ops.testing.ptx.table import supported
from kimi_ops.testing.ptx.types import TYPES


def test_every_family_is_loaded():
    modules = {module.name for module in pkgutil.iter_modules(families.__path__)}
    assert modules == set(families.FAMILIES)


def test_every_entry_is_complete():
    assert len(ENTRIES) > 100
    for entry in ENTRIES:
        # "Logic and Shift Instructions: shl": a chapter of the ISA, and who the section is about.
        chapter, names = entry.section.split(": ")
        assert re.fullmatch(r"[A-Z][A-Za-z-]+( [A-Za-z-]+)* [Ii]nstructions?", chapter), (
            entry.opcode
        )
        about = {name.split(".")[0] for name in names.split(", ")}
        # Other hints to the caches stand with prefetch.
        about |= {"applypriority", "createpolicy"} if "prefetchu" in about else set()
        assert entry.opcode.split(".")[0] in about, entry.opcode
        assert entry.summary.endswith((".", ")")), entry.opcode
        assert entry.types <= set(TYPES), entry.opcode
        assert not entry.modifiers & set(TYPES), entry.opcode


def test_the_table_names_every_instruction():
    table = supported()
    for entry in ENTRIES:
        assert f"`{entry.opcode}`" in table
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 6 for row in rows)


def test_what_a_family_adds_is_found_and_only_that():
    before = len(ENTRIES)
    with pytest.raises(UnsupportedPtx, match="unsupported instruction frobnicate"):
        Kernel(kernel_text("frobnicate.b32 %r1, %r0;"))

    @instruction("frobnicate", family="integer", section="Integer: none", types="b32")
    def frobnicate(binder):
        """Swaps halves."""

    try:
        ins = Instruction("frobnicate.b32", (), None, 1, ("", 0))
        assert lookup(ins).build is frobnicate
        with pytest.raises(UnsupportedPtx, match=r"modifier \.b64 of frobnicate"):
            lookup(Instruction("frobnicate.b64", (), None, 1, ("", 0)))
    finally:
        del ENTRIES[before:]


def test_the_page_in_the_docs_is_current():
    page = Path(__file__).parents[1] / "docs/ptx-instructions.md"
    assert page.read_text().rstrip().endswith(supported().rstrip())
