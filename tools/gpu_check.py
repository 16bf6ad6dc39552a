"""Everything that a first machine with a GPU has to be asked, in one command; see docs/gpu-day.md.

    make gpu-check          or          python tools/gpu_check.py [--out FOLDER] [--only STEP ...]

Each step is a command of its own with a time limit. What it printed is in FOLDER, and FOLDER holds
a report in Markdown of what passed, what failed, and what could not be asked because a tool is not
there. Exit code 1 if a step failed; a step that could not be run counts as one.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import kimi_ops
from kimi_ops._version import __version__

ROOT = Path(__file__).parents[1]
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
# `Case.work` of the largest case that compute-sanitizer sees, two or more of every op: it makes a
# kernel a hundred times slower, and what it looks for shows in a few thread blocks.
SANITIZED_WORK = 1 << 16
# Each of torch's allocations becomes one of the driver's, whose bounds memcheck knows.
UNCACHED = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1")


@dataclass(frozen=True)
class Step:
    """One question.

    Attributes:
        name: of its log.
        command: what is run, in the checkout.
        shows: what its success means, for the report.
        minutes: after which it is stopped.
        needs: a program that must be in the path.
    """

    name: str
    command: Sequence[str]
    shows: str
    minutes: int
    needs: str | None = None


def steps() -> list[Step]:
    """All steps, those first whose failure explains the others."""
    python = sys.executable
    command = [python, "-m", "kimi_ops.cli"]
    pytest = [python, "-m", "pytest", "--device", "cuda"]
    common_body = [f"tests/test_{op}.py::test_matches_oracle" for op in kimi_ops.op_names()]
    sanitizer = [*UNCACHED, "compute-sanitizer", "--error-exitcode", "9", "--tool"]
    sanitized = [*pytest, "--work-limit", str(SANITIZED_WORK), *common_body]
    return [
        Step("doctor", [*command, "doctor", "--json"], "versions, and who would run each op", 5),
        Step(
            "verify",
            [*command, "verify", "--device", "cuda"],
            "every kernel right on hostile inputs, bit for bit equal when repeated",
            60,
        ),
        Step("tests", [*pytest, "tests"], "the test suite, its common body on the GPU", 120),
        *(
            Step(
                f"sanitizer-{tool}",
                [*sanitizer, tool, *sanitized],
                f"no error of compute-sanitizer's {tool}",
                120,
                needs="compute-sanitizer",
            )
            for tool in SANITIZERS
        ),
        Step(
            "benchmarks",
            [python, "-m", "pytest", "bench", "--benchmark-only", "--benchmark-json=bench.json"],
            "measured times",
            120,
        ),
    ]


@dataclass(frozen=True)
class Result:
    """What became of a step: ``passed``, ``failed``, ``stopped`` or ``not run``, and how long."""

    step: Step
    outcome: str
    seconds: float
    last_lines: str


def run(step: Step, folder: Path) -> Result:
    """Runs one step; its output goes to ``<name>.log`` in the folder."""
    if step.needs and shutil.which(step.needs) is None:
        return Result(step, "not run", 0.0, f"{step.needs} is not in the path")
    log = folder / f"{step.name}.log"
    start = time.monotonic()
    with log.open("w") as file:
        try:
            code = subprocess.run(
                list(step.command),
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=60 * step.minutes,
            ).returncode
            outcome = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            outcome = "stopped"
    lines = log.read_text(errors="replace").strip().splitlines()
    return Result(step, outcome, time.monotonic() - start, "\n".join(lines[-15:]))


def report(results: Sequence[Result]) -> str:
    """The page to send back."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines = [
        "# A day with a GPU",
        "",
        f"kimi-ops {__version__}, commit {commit.stdout.strip() or 'unknown'}, "
        f"torch {torch.__version__}, {', '.join(names)}",
        "",
        "| step | outcome | seconds | what it shows |",
        "|---|---|---|---|",
        *(f"| {r.step.name} | {r.outcome} | {r.seconds:.0f} | {r.step.shows} |" for r in results),
    ]
    for result in results:
        if result.outcome != "passed":
            lines += ["", f"## {result.step.name}: {result.outcome}", "```"]
            lines += [result.last_lines, "```"]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the steps; 0 if all passed, 1 if not, 2 if nothing could be asked."""
    names = [step.name for step in steps()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", metavar="FOLDER")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STEP")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device here", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    results = []
    for step in steps():
        if step.name in options.only:
            print(f"{step.name} ...", end=" ", flush=True)
            results.append(run(step, options.out))
            print(f"{results[-1].outcome}, {results[-1].seconds:.0f} s", flush=True)
            (options.out / "report.md").write_text(report(results))
    print(f"report: {options.out / 'report.md'}")
    return 0 if all(result.outcome == "passed" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
