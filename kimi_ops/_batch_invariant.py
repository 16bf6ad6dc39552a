"""The batch-invariant mode: a row's result does not depend on what else is in the batch.

A kernel that chooses split sizes, tiles or paths by the size of the batch asks
`is_batch_invariant` and, inside the mode, makes one choice for every batch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar

_MODE: ContextVar[bool | None] = ContextVar("kimi_ops_batch_invariant", default=None)
_ENVIRONMENT: list[bool] = []


def _of_environment() -> bool:
    """``KIMI_OPS_BATCH_INVARIANT``, read at the first call that asks."""
    if not _ENVIRONMENT:
        value = os.environ.get("KIMI_OPS_BATCH_INVARIANT", "0")
        if value not in ("0", "1", ""):
            raise ValueError(f"KIMI_OPS_BATCH_INVARIANT must be 0 or 1, got {value!r}")
        _ENVIRONMENT.append(value == "1")
    return _ENVIRONMENT[0]


def is_batch_invariant() -> bool:
    """Whether results must not depend on the rest of the batch."""
    mode = _MODE.get()
    if mode is None:
        mode = _ENVIRONMENT[0] if _ENVIRONMENT else _of_environment()
    return mode


@contextlib.contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """Makes the results of every row independent of the batch, within a ``with`` block.

    One split size, one path and one order of accumulation at every batch size: a sequence decoded
    alone gives the same bits as in any batch. ``KIMI_OPS_BATCH_INVARIANT=1`` does so everywhere.
    A backend that makes no such promise for an op (the reference, which is built from torch's own
    matrix products) refuses calls in this mode. Matrix products outside these ops are torch's.

    Args:
        enabled: False leaves the mode within the block.
    """
    token = _MODE.set(enabled)
    try:
        yield
    finally:
        _MODE.reset(token)
