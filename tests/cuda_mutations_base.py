"""One change to a source of `csrc/cuda/`, and what must be said of it."""

from __future__ import annotations

from dataclasses import dataclass

# What may be said beside an error of the emulator: the budget, and all else that `check_op` holds.
WRONG = AssertionError


@dataclass(frozen=True)
class Mutation:
    """One change.

    Attributes:
        what: in words.
        op, call: the op that shows it, and one of its cases or of `cuda_mutations.CALLS`.
        file: in `csrc/cuda/`.
        old, new: what is replaced by what.
        said: kind of error that must come; None: nothing is said, and the page tells why.
        why: of a mutation of which nothing is said.
        times: how often ``old`` is there, all of which are replaced.
        arch: of the emulated GPU, 80 or 90.
        invariant: in batch-invariant mode, where a sequence has few splits.
        slow: not in an ordinary test run.
        host: a constant of the launcher's and another value for it, which brings a large call's
            path to a small one.
    """

    what: str
    op: str
    call: str
    file: str
    old: str
    new: str
    said: type[Exception] | None
    why: str = ""
    times: int = 1
    arch: int = 80
    invariant: bool = False
    slow: bool = False
    host: tuple[str, object] | None = None
