"""`kimi-ops verify`: every op's kernels on the hostile cases, in every way that there is here.

On the CPU the kernels of a GPU run in the ways of `kimi_ops.testing.ways`; on a CUDA device they
run on it. Each case goes through the body that the tests use, `check_op`: outputs poisoned and
guarded, results within the budget, bit for bit equal when repeated, strided arguments.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch

from kimi_ops._backends import GPU_BACKENDS, has_kernel
from kimi_ops._dispatch import get_op, op_names
from kimi_ops._target import too_old
from kimi_ops._version import __version__
from kimi_ops.testing import runner
from kimi_ops.testing.check import check_op
from kimi_ops.testing.inputs import Case, cases
from kimi_ops.testing.oracle import Comparison
from kimi_ops.testing.ptx import PtxError
from kimi_ops.testing.static import CudaCompileError
from kimi_ops.testing.ways import WAYS, Way, ways_of, with_way

_NATIVE = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}  # device: backends that run on it
_COLUMNS = (
    "op", "way", "kernels", "specialisations", "cases", "left out", "declined",
    "worst error / budget", "at",
)  # fmt: skip


@dataclass
class Outcome:
    """What one op did in one way.

    Attributes:
        op, way: names.
        kernels: names of the kernels that were launched.
        texts: the PTX texts that were executed, one per specialisation.
        passed: cases that went through.
        left_out: cases too large for the way.
        declined: cases that the kernel declares it cannot run, with its reason.
        failed: cases that went wrong, with what was said.
        cannot_run: why no case was run at all.
        worst: the element that used most of its budget, and its case.
    """

    op: str
    way: str
    kernels: set[str] = field(default_factory=set)
    texts: set[str] = field(default_factory=set)
    passed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    declined: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    cannot_run: str | None = None
    worst: tuple[str, Comparison] | None = None

    def add(self, case: Case, comparisons: Sequence[Comparison]) -> None:
        """Counts a case that went through."""
        self.passed.append(case.name)
        for one in comparisons:
            if one.elements and (self.worst is None or one.ratio > self.worst[1].ratio):
                self.worst = case.name, one

    def row(self) -> tuple[str, ...]:
        """The cells of `_COLUMNS`."""
        share, at = "", ""
        if self.worst is not None:
            case, one = self.worst
            # Integers have no budget: they are equal or wrong.
            share = f"{one.ratio:.2f}" if one.budget else "equal"
            at = f"{case}: {one.name.removeprefix(self.op).strip()}" if one.budget else ""
        ran = f"{len(self.passed)}" + f", {len(self.failed)} FAILED" * bool(self.failed)
        if self.cannot_run:
            ran = f"cannot run: {self.cannot_run}"
        return (
            self.op, self.way, str(len(self.kernels) or ""), str(len(self.texts) or ""), ran,
            str(len(self.left_out) or ""), str(len(self.declined) or ""), share, at,
        )  # fmt: skip


def _recording(way: Way, outcome: Outcome) -> Way:
    """The way, with a note of what each of its blocks launched."""

    @contextlib.contextmanager
    def context(outputs: Sequence[torch.Tensor], number: int) -> Iterator[Any]:
        compile_triton = runner.compile_triton

        def compiled(*args: Any, **named: Any) -> runner.Compiled:
            found = compile_triton(*args, **named)
            outcome.texts.add(found.ptx)
            return found

        with (
            mock.patch.object(runner, "compile_triton", compiled),
            way.context(outputs, number) as record,
        ):
            yield record
        for launch in record.launches:
            outcome.kernels.add(launch[0] if isinstance(launch, tuple) else launch.kernel)

    return replace(way, context=context)


def _failures() -> tuple[type[Exception], ...]:
    """What a wrong kernel raises: a check, the emulator, a compiler, the driver at the launch.

    RuntimeError is what torch, CuPy's driver and `kimi_ops._nvrtc` raise; Triton has its own.
    """
    found: list[type[Exception]] = [AssertionError, PtxError, RuntimeError, CudaCompileError]
    if importlib.util.find_spec("triton") is not None:
        found.append(importlib.import_module("triton.errors").TritonError)
    return tuple(found)


def _run_cases(outcome: Outcome, chosen: Sequence[Case], backend: str, device: str) -> Outcome:
    op, failures = get_op(outcome.op), _failures()
    for case in chosen:
        try:
            args = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in case.args())
            if reason := op.why_not(backend, args):
                outcome.declined[case.name] = reason
                continue
            outcome.add(case, check_op(op.name, case.args(), backend, device=device))
        except failures as error:
            outcome.failed[case.name] = f"{type(error).__name__}: {error}"
    return outcome


def verify_way(op: str, way: Way, *, full: bool = False) -> Outcome:
    """Runs an op's cases in a way; without ``full`` those that are small enough for it.

    Raises:
        RuntimeError: the backend cannot run here; says why.
    """
    outcome = Outcome(op, way.name)
    chosen = []
    for case in cases(op, full=full):
        if way.takes(case, full=full):
            chosen.append(case)
        else:
            outcome.left_out.append(case.name)
    with with_way(op, _recording(way, outcome)) as backend:
        return _run_cases(outcome, chosen, backend, "cpu")


def verify_backend(op: str, backend: str, device: str, *, full: bool = False) -> Outcome:
    """Runs an op's cases on a device itself; `Outcome.cannot_run` where nothing could be run."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    outcome = Outcome(op, f"{backend} on {name}")
    outcome.cannot_run = get_op(op).why_not(backend, None)
    if backend in GPU_BACKENDS:
        outcome.cannot_run = outcome.cannot_run or too_old(torch.device(device))
    if outcome.cannot_run is not None:
        return outcome
    return _run_cases(outcome, cases(op, full=full), backend, device)


def _outcomes(
    ops: Sequence[str], ways: Sequence[str], device: str, full: bool, quick: bool
) -> Iterator[Outcome]:
    for op in ops:
        for backend in _NATIVE[device.split(":")[0]]:
            if ways or not has_kernel(op, backend):
                continue
            # The CPU library may be absent; on a GPU what does not run was not verified.
            if device != "cpu" or get_op(op).why_not(backend, None) is None:
                yield verify_backend(op, backend, device, full=full)
        for way in ways_of(op) if device == "cpu" and not quick else ():
            if not ways or {way.name, way.name.partition("[")[2].rstrip("]")} & set(ways):
                yield verify_way(op, way, full=full)


def _problem(ops: Sequence[str], ways: Sequence[str], device: str, quick: bool) -> str | None:
    """Why a request cannot be carried out."""
    if unknown := sorted(set(ops) - set(op_names())):
        return f"unknown op {unknown[0]!r}; there are {', '.join(op_names())}"
    known = {name for w in WAYS for name in (w.name, w.name.partition("[")[2].rstrip("]"))}
    if unknown := sorted(set(ways) - known):
        return f"unknown way {unknown[0]!r}; there are {', '.join(w.name for w in WAYS)}"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        return f"the device must be cpu, cuda or cuda:N, got {device!r}"
    if device != "cpu" and ways:
        return "ways are for kernels that run without a GPU; leave out --way or --device"
    if device != "cpu" and not torch.cuda.is_available():
        return "there is no CUDA device here; without one the kernels run in ways: --device cpu"
    if device != "cpu" and (torch.device(device).index or -1) >= torch.cuda.device_count():
        return f"there is no {device} here; there are {torch.cuda.device_count()} CUDA devices"
    if device == "cpu" and quick:
        missing = [get_op(op).why_not("cpu", None) for op in ops or op_names()]
        return f"nothing runs here: {missing[0]}" if all(missing) else None
    if device == "cpu" and importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'triton>=3.4'"
    there = {way.name for op in ops or op_names() for way in ways_of(op)}
    if ways and not any(name in there or f"[{name}]" in " ".join(there) for name in ways):
        return f"{', '.join(ops)} cannot run that way; there are {', '.join(sorted(there))}"
    return None


def run(
    ops: Sequence[str], ways: Sequence[str], device: str, *, full: bool = False, quick: bool = False
) -> int:
    """Runs and prints a table in Markdown, line by line as the outcomes come.

    Args:
        ops: names of ops; all of them if empty.
        ways: names of `WAYS`, or what stands in their brackets; all of them if empty.
        device: "cpu", "cuda" or "cuda:N".
        full: the large cases too.
        quick: only what runs on the device itself; on the CPU its own kernels, without the ways.

    Returns:
        0 all went through, 1 a case went wrong or a backend cannot run at all, 2 the request could
        not be carried out.
    """
    if problem := _problem(ops, ways, device, quick):
        print(f"kimi-ops verify: {problem}", file=sys.stderr)
        return 2
    versions = [f"kimi-ops {__version__}", f"torch {torch.__version__}"]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions.append(f"triton {importlib.metadata.version('triton')}")
    print(", ".join(versions), "", sep="\n")
    print(f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|", sep="\n", flush=True)
    wrong: list[str] = []
    declined: list[str] = []
    passed = 0
    for outcome in _outcomes(ops or op_names(), ways, device, full, quick):
        print(f"| {' | '.join(outcome.row())} |", flush=True)
        passed += len(outcome.passed)
        if outcome.cannot_run:
            wrong.append(f"- {outcome.op}, {outcome.way}: cannot run: {outcome.cannot_run}")
        for found, target in ((outcome.failed, wrong), (outcome.declined, declined)):
            target += [
                f"- {outcome.op}, {outcome.way}, {name}: {' '.join(text.split())}"
                for name, text in found.items()
            ]
    for title, lines in (("Declined", declined), ("Failed", wrong)):
        if lines:
            print("", f"{title}:", *lines, sep="\n")
    print("", f"{passed} cases passed, {len(wrong)} failed, {len(declined)} declined.", sep="\n")
    return 1 if wrong else 0
