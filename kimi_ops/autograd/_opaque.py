"""Backward passes that read offsets or ids on the host, as ops of their own.

`torch.compile` traces a backward pass of plain torch operators. One that loops over the sequences
or experts that its arguments name cannot be traced; as an op it is one node of the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("kimi_ops", "FRAGMENT")


def define_opaque(schema: str, compute: Callable[..., Any], outputs: Callable[..., Any]) -> Any:
    """Registers ``compute`` under a schema in torch's notation and returns its callable.

    Args:
        schema: of a functional op, ``<op>_backward(...) -> ...``.
        compute: the implementation, for every device.
        outputs: ``outputs(*args)`` allocates what ``compute`` returns, for the trace.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kimi_ops::{name}", outputs, lib=_LIBRARY)
    return getattr(torch.ops.kimi_ops, name).default
