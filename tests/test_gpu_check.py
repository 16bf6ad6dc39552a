"""`make gpu-check`, as far as it can be tried without a GPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

import kimi_ops
from kimi_ops.cli import main as kimi_ops_main
from kimi_ops.testing import cases

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "tools/gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_so(gpu_check, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # where there is one, too
    assert gpu_check.main([]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_outcomes_of_steps(gpu_check, tmp_path):
    def outcome(code, minutes=1, needs=None):
        step = gpu_check.Step("step", [sys.executable, "-c", code], "", minutes, needs)
        return gpu_check.run(step, tmp_path)

    assert outcome("print('fine')").outcome == "passed"
    failed = outcome("print('worst element'); raise SystemExit(3)")
    assert (failed.outcome, failed.last_lines) == ("failed", "worst element")
    assert (tmp_path / "step.log").read_text() == "worst element\n"
    assert outcome("import time; time.sleep(60)", minutes=0.01).outcome == "stopped"
    absent = outcome("", needs="no-such-tool")
    assert (absent.outcome, absent.last_lines) == ("not run", "no-such-tool is not in the path")
    page = gpu_check.report([failed, absent])
    assert "| step | failed |" in page
    assert "## step: failed\n```\nworst element\n```" in page
    assert "## step: not run" in page


def test_steps_are_commands_that_exist(gpu_check, capsys):
    """Those of this package, at least, parse their arguments."""
    for step in gpu_check.steps():
        if "kimi_ops.cli" in step.command:
            arguments = list(step.command[step.command.index("kimi_ops.cli") + 1 :])
            with pytest.raises(SystemExit) as exit_:
                kimi_ops_main([arguments[0], "--help"])
            assert exit_.value.code == 0
            shown = capsys.readouterr().out
            assert all(word in shown for word in arguments[1:] if word.startswith("--"))
    assert {s.name for s in gpu_check.steps()} >= {
        "verify",
        "tests",
        "sanitizer-memcheck",
        "sanitizer-racecheck",
        "sanitizer-synccheck",
        "sanitizer-initcheck",
        "benchmarks",
    }


def test_the_sanitizers_see_small_cases_of_every_op(gpu_check):
    (step,) = (step for step in gpu_check.steps() if step.name == "sanitizer-racecheck")
    assert step.needs in step.command
    at = step.command.index("--work-limit")
    for op in kimi_ops.op_names():
        assert f"tests/test_{op}.py::test_matches_oracle" in step.command
        assert sum(case.work <= int(step.command[at + 1]) for case in cases(op)) >= 2, op
    assert "-k" not in step.command[at:]


def test_every_step_is_in_the_page(gpu_check):
    page = (ROOT / "docs/gpu-day.md").read_text()
    for step in gpu_check.steps():
        name = "sanitizer-*" if step.name.startswith("sanitizer") else step.name
        assert f"| `{name}` |" in page
