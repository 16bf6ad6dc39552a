"""Mutations of the CUDA C++ kernels, and what is said of each.

A mutation changes one text of `csrc/cuda/`, in a copy of that folder. NVRTC compiles the copy, and
the emulator executes it in the body of the tests (`check_op`), on one small call. The table:

    python tests/cuda_mutations.py docs/results/mutations.md
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import cuda_mutations_large
import cuda_mutations_sm90
import cuda_mutations_small
import torch
from cuda_mutations_base import Mutation

from kimi_ops._batch_invariant import batch_invariant
from kimi_ops.cuda import _launcher
from kimi_ops.testing import cases, check_op
from kimi_ops.testing.checkout import commit_of
from kimi_ops.testing.inputs import int4, mla, moe, vision
from kimi_ops.testing.ptx import PtxError
from kimi_ops.testing.ways import WAYS, with_way

SOURCES = _launcher.SOURCES
WAY_OF = {way.arch: way for way in WAYS if way.backend == "cuda"}
MUTATIONS = [
    *cuda_mutations_small.MUTATIONS,
    *cuda_mutations_large.MUTATIONS,
    *cuda_mutations_sm90.MUTATIONS,
]


def _cut(args: tuple[Any, ...], rows: int) -> tuple[Any, ...]:
    """The same with fewer rows than its grid announces."""
    return (args[0][:rows].clone(), *args[1:])


CALLS: dict[tuple[str, str], Callable[[torch.Generator], tuple[Any, ...]]] = {
    ("moe_route", "65 tokens"): lambda g: moe.moe_route(g, 65, 320, 48, 4),
    ("moe_route", "3 tokens"): lambda g: moe.moe_route(g, 3, 320, 48, 4),
    ("moe_route", "many steps"): lambda g: moe.moe_route(g, 65, 8 * 4 * 64, 24, 4),
    ("patch_merge", "announced"): lambda g: _cut(vision.patch_merge(g, ((2, 4, 4),), d=40), 29),
    ("vision_rope", "announced"): lambda g: _cut(vision.vision_rope(g, ((2, 4, 4),), 2, 8), 29),
    ("mla_decode", "wide rows"): lambda g: mla.mla_decode(g, (300, 3), 20),
    ("int4_linear", "40 rows"): lambda g: int4.int4_linear(g, (40, 512), 72),
    ("mla_decode", "two chunks"): lambda g: mla.mla_decode(g, (600,), 2, 1, 64, (256, 16)),
    ("mla_decode", "100 tokens"): lambda g: mla.mla_decode(g, (100, 7), 20, 1, 16, (32, 16)),
    ("mla_decode", "600 tokens"): lambda g: mla.mla_decode(g, (600,), 3, 1, 64, (32, 16)),
    ("mla_decode_value", "600 tokens"): lambda g: mla.mla_decode_value(
        g, (600, 9), 3, 24, new=1, page=64, widths=(32, 16)
    ),
}


def mutated(mutation: Mutation, folder: Path) -> Path:
    """A copy of the sources with the change, in a folder."""
    copy = folder / "cuda"
    shutil.copytree(SOURCES, copy)
    path = copy / mutation.file
    text = path.read_text()
    found = text.count(mutation.old)
    assert found == mutation.times, f"{mutation.file}: {mutation.old!r} is there {found} times"
    path.write_text(text.replace(mutation.old, mutation.new))
    # The calls are in bfloat16: instances of other dtypes would only take time to compile.
    source = copy / f"{mutation.op}.cu"
    source.write_text(re.sub(r"^[A-Z]+\((fp16|float),.*\n", "", source.read_text(), flags=re.M))
    return copy


def arguments(mutation: Mutation) -> tuple[Any, ...]:
    """Of the call that shows it."""
    if build := CALLS.get((mutation.op, mutation.call)):
        return build(torch.Generator().manual_seed(7))
    (case,) = (c for c in cases(mutation.op, full=True) if c.name == mutation.call)
    return case.args()


def what_is_said(mutation: Mutation) -> Exception | None:
    """What the emulator, or the body of the tests, says of the mutated kernel; None: nothing."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(_launcher, "SOURCES", mutated(mutation, Path(folder))),
        with_way(mutation.op, WAY_OF[mutation.arch]) as backend,
        batch_invariant() if mutation.invariant else contextlib.nullcontext(),
        mock.patch(*mutation.host) if mutation.host else contextlib.nullcontext(),
    ):
        try:
            check_op(mutation.op, arguments(mutation), backend)
        except (PtxError, AssertionError) as error:
            return error
    return None


def told(error: Exception | None) -> str:
    """What is said, on one line: kind, message, place."""
    if error is None:
        return "nothing"
    kind = "outside the budget" if type(error) is AssertionError else type(error).__name__
    text = re.sub(r",? (at )?PTX line \d+", "", " ".join(str(error).split()))
    return f"**{kind}**: {text}"


def row(mutation: Mutation, said: str) -> str:
    """A row of the page."""
    call = f"`{mutation.op}`, {mutation.call}" + ", sm_90" * (mutation.arch == 90)
    cells = (mutation.what, mutation.file, call, said)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def page() -> str:
    """The page: all mutations, executed anew."""
    rows = []
    for mutation in MUTATIONS:
        error = what_is_said(mutation)
        wanted = mutation.said
        if not (error is None if wanted is None else isinstance(error, wanted)):
            raise SystemExit(f"{mutation.what}: {told(error)}")
        rows.append(row(mutation, told(error) + f" ({mutation.why})" * bool(mutation.why)))
        print(rows[-1], flush=True)
    silent = sum(mutation.said is None for mutation in MUTATIONS)
    made_with = commit_of("csrc/cuda")
    return "\n".join(
        [
            "# Mutations of the CUDA C++ kernels",
            "",
            f"{len(MUTATIONS)} changes to `csrc/cuda/`, one at a time, each compiled by NVRTC and "
            "executed in the emulator (sm_80, or sm_90 where a row says so) in the body of the "
            "tests on one small call. Of "
            f"{len(MUTATIONS) - silent} something is said; of {silent} nothing, and why is in the "
            "row. `tests/test_cuda_mutations.py` holds the kind of what is said: the quick ones in "
            "every run, all with `--full`. Made with "
            f"`python tests/cuda_mutations.py docs/results/mutations.md`, {made_with}.",
            "",
            "| change | file | shown by | what is said |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
