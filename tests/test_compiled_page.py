"""`docs/compiled-kernels.md`: one command writes it and leaves alone what it did not compile."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections import Counter
from pathlib import Path

import pytest

from kimi_ops.testing.static import command, compile_case, static_cases_of
from kimi_ops.testing.static.page import (
    problems,
    section,
    tensor_instructions,
    updated,
    widest_load_bits,
)

ROOT = Path(__file__).parents[1]
PAGE, README = ROOT / "docs/compiled-kernels.md", ROOT / "README.md"


@pytest.fixture(scope="module")
def report():
    """The first case of a kernel without matrix products."""
    return compile_case(static_cases_of("vision_rope")[0], "sm_80")


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_one_command_writes_a_section_and_leaves_the_others(tmp_path, monkeypatch, capsys):
    cases = static_cases_of("vision_rope")[:2]
    monkeypatch.setattr(command, "static_cases_of", lambda op: cases)
    page = tmp_path / "page.md"
    page.write_text("# By hand\n\nprose\n\n## silu_mul\nold\n\n## vision_rope\nold too\n")
    assert command.run(["sm_80"], ["vision_rope"], False, str(page)) == 0
    assert capsys.readouterr().out == f"2 reports written to {page}\n"
    text = page.read_text()
    assert text.startswith("# By hand\n\nprose\n\n## silu_mul\nold\n\n## vision_rope\nkimi-ops ")
    assert "old too" not in text
    assert re.search(r"Triton [\d.]+, ptxas [\d.]+ \(sm_100a and sm_120: [\d.]+\)\.\n", text)
    reports = [compile_case(case, "sm_80") for case in cases]
    row = cells(text.strip().splitlines()[-1])
    assert row[:3] == ["`vision_rope_kernel`", "sm_80", "2"]
    assert row[3] == str(max(r.registers for r in reports))
    assert row[4] == "0"
    assert row[-3:] == ["none", "128", "pass"]


def test_page_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "static_cases_of", lambda op: [])
    assert command.run(["sm_80"], ["vision_rope"], False, str(tmp_path)) == 2
    assert "kimi-ops compile: " in capsys.readouterr().err


def test_worst_case_of_a_kernel_counts_and_failures_are_named(report):
    mix = dataclasses.replace(
        report.mix,
        opcodes={"HMMA.16816.F32.BF16": 2, "HGMMA.64x8x16": 1, "HFMA2.MMA": 4, "UTCHMMA": 1},
        memory={"global load 32": 1, "global bulk load": 1, "shared load 256": 1},
    )
    worse = dataclasses.replace(
        report, registers=255, spill_load_bytes=8, dynamic_shared_bytes=1 << 20, mix=mix
    )
    assert problems(report) == []
    assert problems(worse) == ["spills", "shared memory"]
    assert tensor_instructions(worse) == ["HGMMA", "HMMA", "UTCHMMA"]
    assert widest_load_bits(worse) == 128
    narrow = dataclasses.replace(report.mix, memory={"global load 32": 1, "shared load 128": 1})
    assert widest_load_bits(dataclasses.replace(report, mix=narrow)) == 32
    row = cells(section("vision_rope", [report, worse, report], "x").strip().splitlines()[-1])
    assert row[2:5] == ["3", "255", "8"]
    assert row[5].startswith(f"{worse.shared_bytes:,} (")
    assert row[-3] == "HGMMA + HMMA + UTCHMMA in 1 of 3; none in 2 of 3"
    assert row[-1] == "shared memory in 1 of 3; spills in 1 of 3"


def test_a_new_op_finds_its_place():
    text = updated("# T\n\n## silu_mul\nb\n", {"moe_sort": "## moe_sort\na\n"})
    assert text == "# T\n\n## moe_sort\na\n\n## silu_mul\nb\n"
    assert updated(text, {}) == text


def _called(*rungs: str) -> list[str]:
    """Ops that the README's status table says have reached one of the rungs with Triton."""
    table = [cells(line) for line in README.read_text().splitlines() if line.startswith("| `")]
    rows = [row for row in table if len(row) == 5]
    assert rows
    return [op for row in rows if row[3] in rungs for op in re.findall(r"`(\w+)`", row[0])]


@pytest.mark.parametrize("op", _called("compiled", "counted"))
def test_the_page_has_passed_rows_of_what_the_readme_calls_compiled(op):
    """Every kernel at every case of today, for every architecture that the rung names."""
    wanted = Counter(
        (case.kernel.__name__, arch)
        for case in importlib.import_module(f"kimi_ops.kernels.{op}").static_cases()
        for arch in ("sm_80", "sm_90a", "sm_100a", "sm_120", "gfx942")
        if arch in case.arches
    )
    of_op = re.search(rf"^## {op}$(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
    assert of_op, f"{op} has no section"
    rows = [cells(line) for line in of_op[1].splitlines() if line.startswith("| `")]
    found = {(row[0].strip("`"), row[1]): row for row in rows}
    for (kernel, arch), count in wanted.items():
        row = found.get((kernel, arch))
        assert row, f"{kernel} on {arch} is not in the page"
        assert (row[2], row[-1]) == (str(count), "pass"), f"{kernel} on {arch}: {count} cases"


def test_the_page_of_the_project_is_one_that_the_command_writes():
    """Its figures are as old as each section says."""
    text = PAGE.read_text()
    assert updated(text, {}) == text
    assert re.search(r"^## \w+\nkimi-ops ", text, re.M)
