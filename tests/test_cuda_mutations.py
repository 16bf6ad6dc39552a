"""Errors planted in the CUDA C++ kernels: the emulator, or the budget, says something of each."""

from __future__ import annotations

from pathlib import Path

import pytest
from cuda_mutations import MUTATIONS, told, what_is_said

pytest.importorskip("cuda.bindings", reason="needs NVRTC: pip install 'kimi-ops[compile]'")

PAGE = Path(__file__).parents[1] / "docs/results/mutations.md"


@pytest.mark.parametrize(
    "mutation",
    [
        pytest.param(m, id=f"{m.op}-{m.what}", marks=pytest.mark.full if m.slow else [])
        for m in MUTATIONS
    ],
)
def test_what_is_said(mutation):
    """The named kind of error; or nothing, where the page tells why nothing can be said."""
    error = what_is_said(mutation)
    assert (type(error) if error else None) is mutation.said, told(error)


def test_the_page_has_every_mutation():
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    kinds = {
        cells[0].removeprefix("| "): cells[3].partition("**")[2].partition("**")[0]
        for cells in rows[1:]
    }
    for mutation in MUTATIONS:
        kind = mutation.said.__name__ if mutation.said else ""
        assert kinds.pop(mutation.what) == kind.replace("AssertionError", "outside the budget")
        assert bool(mutation.why) == (mutation.said is None), mutation.what
    assert not kinds
