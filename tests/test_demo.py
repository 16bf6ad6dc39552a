"""What `make demo` runs: it says what it shows, passes, and fails when an op is wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import torch
from command_calls import ROOT
from PIL import Image

from kimi_ops.model.chat_messages import media_in_order
from kimi_ops.tasks import make_sample
from kimi_ops.tasks.sums import is_held_out


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
    assert "trained by examples/train_tiny" in flat
    for question, *_ in demo_module().QUESTIONS:
        assert question in flat
    assert "finish reason: tool_calls" in flat
    assert f"calculator: {384 * 29}" in flat
    assert flat.count("tokens/s") == 7
    # Greedy answers that were right where the demo was written; a near tie may fall otherwise.
    right = int(re.search(r"Answered right: (\d) of 6", flat)[1])
    assert right >= 5
    assert "All within budget" in flat


def test_demo_asks_what_the_model_has_not_seen():
    demo = demo_module()
    for question, medium, thinking, expected in demo.QUESTIONS:
        task = {"digit.png": "digits", "scene.png": "scenes", "photograph.png": "photographs",
                "motion.gif": "clips"}.get(medium)  # fmt: skip
        if task is None:
            a, b = map(int, re.findall(r"\d+", question))
            assert is_held_out(a, b)
            assert thinking
            assert int(expected) == a + b
            continue
        sample = make_sample(task, "held-out", 0)
        assert sample.messages[0]["content"][-1]["text"] == question
        assert sample.answer["content"] == expected
        (item,) = media_in_order(sample.messages)
        frames = getattr(item["source"], "frames", [item["source"]])
        with Image.open(demo.MEDIA / medium) as file:
            assert getattr(file, "n_frames", 1) == len(frames)
            for number, frame in enumerate(frames):
                file.seek(number)
                assert np.array_equal(np.asarray(file.convert("RGB")), np.asarray(frame))


def demo_module():
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import demo
    finally:
        sys.path.pop(0)
    return demo


def test_demo_fails_on_a_wrong_op(monkeypatch, capsys):
    demo = demo_module()
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
