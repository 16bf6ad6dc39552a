"""`make triton-versions` in part: the page keeps what was not compiled again."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import kimi_ops

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/triton-versions.md"
OPS = ["moe_sort", "rms_norm"]
BEFORE = """# Title

prose

## Kernels
| op | kernel | 3.4.0 | 3.9.0 |
|---|---|---|---|
| `moe_sort` | `sort_kernel` | yes | spills: sm_80 |
| `rms_norm` | `norm_kernel` | refused: sm_80 | yes |

## What is wrong
- 3.9.0, `moe_sort`, `sort_kernel`, sm_80 (first): spills
- 3.4.0, `rms_norm`, `norm_kernel`, sm_80 (first): no such thing
"""


@pytest.fixture(scope="module")
def tool():
    path = ROOT / "tools/triton_versions.py"
    spec = importlib.util.spec_from_file_location("triton_versions", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(kernel, arch="sm_80", *wrong):
    return {"kernel": kernel, "case": "first", "arch": arch, "wrong": list(wrong)}


def test_nothing_new_changes_nothing(tool):
    assert tool.updated(BEFORE, {}, OPS) == BEFORE


def test_a_new_version_is_a_column_in_its_place(tool):
    found = {"3.6.0": {"rms_norm": [row("norm_kernel"), row("norm_kernel", "gfx942", "spills")]}}
    assert tool.updated(BEFORE, found, OPS) == BEFORE.replace(
        "| 3.4.0 | 3.9.0 |\n|---", "| 3.4.0 | 3.6.0 | 3.9.0 |\n|---|---"
    ).replace("yes | spills: sm_80", "yes | not compiled | spills: sm_80").replace(
        "refused: sm_80 | yes", "refused: sm_80 | spills: gfx942 | yes"
    ) + ("- 3.6.0, `rms_norm`, `norm_kernel`, gfx942 (first): spills\n")


def test_an_op_compiled_again_replaces_its_cells_and_remarks(tool):
    found = {"3.9.0": {"moe_sort": [row("other_kernel")]}}
    assert tool.updated(BEFORE, found, OPS) == BEFORE.replace(
        "yes | spills: sm_80 |",
        "yes | not used |\n| `moe_sort` | `other_kernel` | not used | yes |",
    ).replace("- 3.9.0, `moe_sort`, `sort_kernel`, sm_80 (first): spills\n", "")


def test_a_kernel_that_no_version_has_any_more_goes(tool):
    found = {v: {"moe_sort": [row("new_kernel")]} for v in ("3.4.0", "3.9.0")}
    text = tool.updated(BEFORE, found, OPS)
    assert "sort_kernel" not in text
    assert "| `moe_sort` | `new_kernel` | yes | yes |" in text


def test_the_page_of_the_project_is_one_that_the_command_writes(tool):
    text = PAGE.read_text()
    assert tool.updated(text, {}, kimi_ops.op_names()) == text


def test_every_op_has_a_kernel_that_compiles_with_every_version(tool):
    table = PAGE.read_text().partition(tool.KERNELS)[2].partition("\n\n")[0]
    head, rows = tool._table(table.splitlines())
    assert {"3.4.0", "3.6.0", "3.8.0", "3.9.0"} <= set(head[2:])
    for op in kimi_ops.op_names():
        cells = [row[2:] for row in rows if row[0] == f"`{op}`"]
        for version, *of_kernels in zip(head[2:], *cells, strict=True):
            used = set(of_kernels) - {tool.NOT_USED}
            assert used, f"{op} has no kernel with Triton {version}"
            assert not any(c == tool.NOT_COMPILED or "refused" in c for c in used), (op, version)
