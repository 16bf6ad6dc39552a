"""A progress bar in bytes on stderr, shown to people and not to log files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from tqdm import tqdm

# True: only where stderr is a terminal. "force": always.
Progress = bool | Literal["force"]


@contextmanager
def byte_progress(title: str, total: int, progress: Progress) -> Iterator[Callable[[int], object]]:
    """Gives a function that takes the number of bytes just done, of `total` bytes in all."""
    hidden = progress is False or (progress is True and not sys.stderr.isatty())
    with tqdm(
        desc=title, total=total, unit="B", unit_scale=True, disable=hidden, file=sys.stderr
    ) as bar:
        yield bar.update
