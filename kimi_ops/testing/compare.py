"""`kimi-ops verify --compare`: all backends of an op on the same hostile inputs, in one table.

The inputs are those of an ordinary run that every backend of the op takes: none leaves them out for
size or declines them. The kernels of a GPU run as PTX for sm_80, in the emulator. Errors are shares
of the budget, against the reference in float64, as the tests hold them (`kimi_ops.testing.oracle`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kimi_ops._backends import has_kernel
from kimi_ops._dispatch import Op, get_op, op_names
from kimi_ops.testing.check import RELATIVE, copied, guarded_run, reference_results
from kimi_ops.testing.inputs import Case, cases
from kimi_ops.testing.latent_fp8 import is_written_fp8
from kimi_ops.testing.oracle import assert_close_to_oracle, budget_of
from kimi_ops.testing.ptx import PtxError
from kimi_ops.testing.ways import WAYS, with_way

_WAYS = {way.name: way for way in WAYS if way.name in ("triton[sm_80]", "cuda[sm_80]")}
_BACKENDS = {"reference": "reference", "cpu": "cpu"} | {w.name: w.backend for w in _WAYS.values()}
_APART = tuple(_WAYS)  # the two that are also compared with each other
_COLUMNS = ("op", "cases", *_BACKENDS, " - ".join(reversed(_APART)))


@dataclass
class Compared:
    """What the backends of one op did on the cases that all of them take.

    Attributes:
        op: name.
        cases: how many.
        worst: backend, or two of them as `_COLUMNS` has them, to the largest share of a budget;
            None where results are integers, which are equal or wrong.
        failed: what went wrong.
    """

    op: str
    cases: int = 0
    worst: dict[str, float | None] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def add(self, name: str, share: float | None) -> None:
        """Counts one result."""
        known = self.worst.get(name)
        self.worst[name] = known if share is None else max(share, known or 0.0)

    def row(self) -> tuple[str, ...]:
        """The cells of `_COLUMNS`."""
        cells = []
        for column in _COLUMNS[2:]:
            if column in self.worst:
                share = self.worst[column]
                cells.append("equal" if share is None else f"{share:.2f}")
            else:
                missing = not has_kernel(self.op, _BACKENDS.get(column, "reference"))
                cells.append("no kernel yet" if missing else "")
        wrong = f", {len(self.failed)} FAILED" * bool(self.failed)
        return (self.op, f"{self.cases}{wrong}", *cells)


def _share(found: Tensor, other: Tensor, baseline: Tensor, oracle: Tensor, relative: bool) -> float:
    """The largest difference of two results, as a share of the budget of either."""
    finite = oracle.to(found.dtype).isfinite() & baseline.isfinite()
    exact, naive = (torch.where(finite, x.double(), 0) for x in (oracle, baseline))
    budget = budget_of(naive - exact, exact, found.dtype, relative=relative)
    apart = torch.where(finite, found.double() - other.double(), 0).abs()
    return float((apart / budget).max())


def _compare_case(op: Op, case: Case, backends: Sequence[str], outcome: Compared) -> None:
    args, relative = case.args(), op.name in RELATIVE
    oracle = reference_results(op, copied(args, "cpu", exact=True))
    baseline = reference_results(op, copied(args, "cpu"))
    found = {}
    for name in backends:
        try:
            found[name] = guarded_run(op, args, name, "cpu")
            for number, tensors in enumerate(zip(found[name], baseline, oracle, strict=True)):
                title = f"{op.name} output {number}"
                one = assert_close_to_oracle(title, *tensors, relative=relative)
                outcome.add(name, one.ratio if one.budget else None)
        except (AssertionError, PtxError, RuntimeError) as error:
            outcome.failed.append(f"{op.name}, {name}, {case.name}: {' '.join(str(error).split())}")
    if all(name in found for name in _APART):
        pairs = zip(*(found[name] for name in _APART), baseline, oracle, strict=True)
        for number, (one, other, plain, exact) in enumerate(pairs):
            if one.is_floating_point() and one.numel():
                outcome.add(_COLUMNS[-1], _share(one, other, plain, exact, relative))
            elif torch.equal(one, other):
                outcome.add(_COLUMNS[-1], None)
            else:
                outcome.failed.append(f"{op.name}, {case.name}: output {number} differs")


def compare(name: str) -> Compared:
    """Runs every backend of an op once on each case that all of them take."""
    op, outcome = get_op(name), Compared(name)
    with contextlib.ExitStack() as stack:
        backends = []
        for column, backend in _BACKENDS.items():
            if not has_kernel(name, backend):
                continue
            if column in _WAYS:
                stack.enter_context(with_way(name, _WAYS[column]))
            if op.why_not(column, None) is None:
                backends.append(column)
        for case in cases(name):
            args = case.args()
            # What is written in 8 bits is compared by rules of its own, which the tests apply.
            small = all(_WAYS[n].takes(case, full=False) for n in backends if n in _WAYS)
            if not small or is_written_fp8(op, args):
                continue
            if all(op.why_not(n, args) is None for n in backends):
                outcome.cases += 1
                _compare_case(op, case, backends, outcome)
    return outcome


def run(ops: Sequence[str]) -> int:
    """Prints the table in Markdown, line by line.

    Args:
        ops: names of ops; all of them if empty.

    Returns:
        0 all went through, 1 a case went wrong, 2 an unknown op.
    """
    if unknown := sorted(set(ops) - set(op_names())):
        print(f"kimi-ops verify: unknown op {unknown[0]!r}", file=sys.stderr)
        return 2
    print(f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|", sep="\n", flush=True)
    failed = []
    for name in ops or op_names():
        outcome = compare(name)
        print(f"| {' | '.join(outcome.row())} |", flush=True)
        failed += outcome.failed
    if failed:
        print("", "Failed:", *(f"- {text}" for text in failed), sep="\n")
    return 1 if failed else 0
