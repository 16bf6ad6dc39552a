"""What a user would otherwise run, one file per peer.

A peer module has

- ``NAME``: as the tables show it;
- ``WRITTEN_AGAINST``: the version of the package that its calls were written against;
- ``DEVICES``: device types, ``("cpu",)``;
- ``missing(device) -> str | None``: why it cannot run here ("kt-kernel is not installed: pip
  install kt-kernel"), or None. Imports nothing heavy unless the package is there;
- ``OPS``: op -> ``prepare(calls)``. It gets the arguments of every call of the rotation, in the
  order of the op's schema, and returns ``run(i)``: the i-th call in the peer's own way. Repacking
  weights and whatever else an engine does once belongs into ``prepare``. ``run`` returns what is
  comparable to the op's first result (a tuple, to the first ones), or, for an op that writes an
  argument, that argument. It must not write into the arguments otherwise.

It may have ``APART``, the relative L2 distance from our result that its own way of computing
explains, and ``REST_S``, seconds that its threads stay awake after a call.

``prepare`` raises `Declined` where it cannot do such a case, with the reason.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kimi_ops.bench.case import Args

Prepared = Callable[[int], Any]
Prepare = Callable[[Sequence[Args]], Prepared]


class Declined(Exception):  # noqa: N818  no error: a case it is not for
    """A case that the peer cannot do, and why."""


class Peer(Protocol):
    """A module of this package."""

    NAME: str
    WRITTEN_AGAINST: str
    DEVICES: tuple[str, ...]
    OPS: dict[str, Prepare]

    @staticmethod
    def missing(device: str) -> str | None:
        """Why it cannot run here."""


def peers() -> dict[str, Any]:
    """All of them by name."""
    found = {}
    for entry in sorted(pkgutil.iter_modules(__path__), key=lambda entry: entry.name):
        if not entry.name.startswith("_"):
            module = importlib.import_module(f"{__name__}.{entry.name}")
            found[module.NAME] = module
    return found
