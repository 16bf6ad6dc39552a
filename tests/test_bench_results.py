"""What the README quotes of benchmarks is what the results in the repository say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kimi_ops.bench.command import write_all
from kimi_ops.bench.record import MEASURED, WRONG, read_json
from kimi_ops.bench.table import markdown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results"
RUNS = sorted(RESULTS.glob("*/bench.json"))
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.parent.name)
def test_files_of_a_run_belong_together(path, tmp_path):
    run = read_json(path)
    assert run.command.startswith("kimi-ops bench")
    assert run.machine["commit"].startswith("commit ")
    assert run.modelled or any(row.status == MEASURED for row in run.rows)
    assert not any(row.status == WRONG and row.ours for row in run.rows)
    write_all(run, tmp_path)
    assert {p.name for p in path.parent.iterdir()} == {p.name for p in tmp_path.iterdir()}
    for made in tmp_path.iterdir():
        # Else make them again: kimi_ops.bench.command.write_all(read_json(path), path.parent)
        assert (path.parent / made.name).read_text() == made.read_text()


def test_the_readme_quotes_one_run():
    (plot,) = re.findall(r"\]\((bench/results/[^)]*)/ratios\.svg\)", README)
    run = read_json(ROOT / plot / "bench.json")
    known = markdown(run).splitlines()
    section = README.partition("## Benchmarks")[2].partition("\n## ")[0]
    quoted = [line for line in section.splitlines() if line.startswith("| `")]
    assert len(quoted) >= 8
    assert all(line in known for line in quoted)
    assert run.command in section
    assert run.machine["name"] in section
    assert run.machine["commit"].removeprefix("commit ").split()[0] in section
