"""What `make demo` runs: it says what it shows, passes, and fails when an op is wrong."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from command_calls import ROOT


def test_demo_runs_and_says_what_it_shows():
    # One thread: on a busy machine the threads of two processes slow each other down manyfold.
    result = subprocess.run(
        [sys.executable, "examples/demo.py"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    flat = " ".join(result.stdout.split())
    assert "Its weights are random, so the text below is noise" in flat
    for title in ("Instant mode", "Thinking mode", "a tool that may be called"):
        assert title in flat
    assert "(216 of them vision)" in flat
    assert "(168 of them vision)" in flat
    assert flat.count("tokens/s") == 3
    assert "All within budget" in flat


def test_demo_fails_on_a_wrong_op(monkeypatch, capsys):
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import demo
    finally:
        sys.path.pop(0)
    row, correct = demo.verify("silu_mul", "reference")
    assert correct
    count = len(demo.cases("silu_mul"))
    assert row[2] == f"{count} of {count}"
    reference = demo.get_op("silu_mul").load("reference")
    original = reference.launch

    def wrong(outputs: torch.Tensor, gate_up: torch.Tensor) -> None:
        original(outputs, gate_up)
        if outputs.dtype != torch.float64:  # the oracle stays right
            outputs.fill_(torch.nan)

    monkeypatch.setattr(reference, "launch", wrong)
    monkeypatch.setattr(demo, "converse", lambda console: None)
    monkeypatch.setattr(demo, "op_names", lambda: ("silu_mul",))
    row, correct = demo.verify("silu_mul", "reference")
    assert not correct
    assert "NaN misplaced" in row[-1]
    assert demo.main() == 1
    assert "Wrong: 1 of 2 rows" in capsys.readouterr().out


def test_demo_tells_what_a_backend_declines(monkeypatch):
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import demo
    finally:
        sys.path.pop(0)
    reference = demo.get_op("silu_mul").load("reference")
    monkeypatch.setattr(reference, "unsupported", lambda *args: "not on a [0] day")
    row, correct = demo.verify("silu_mul", "reference")
    assert correct
    assert row[2].startswith("0 of ")
    assert row[3] == "-"
    assert "not run: not on a " in row[-1]
