"""Instruction families, one module each. Importing one registers its instructions.

To add a family:

1. Write ``families/<family>.py``: for each instruction a builder, decorated with
   `kimi_ops.testing.ptx.registry.instruction`, that names its section of the ISA, every type and
   modifier that it implements, and how many leading operands it writes. A builder gets a
   `kimi_ops.testing.ptx.binding.Binder`, asks it for operands as arrays over all lanes of the
   batch, and returns a step: a function of the `Active` lanes.
2. What a step finds wrong it raises with ``binder.site.fail(kind, message, lane)``; what a builder
   does not implement, with ``binder.unsupported(what)``.
3. An instruction that whole warps execute together calls ``machine.converged`` before it changes
   anything; one that decides where threads go on is registered with ``control=True`` and returns
   groups, as ``control.py`` does.
4. State that outlives an instruction (copies in flight, barriers) is a class of its own that the
   machine holds and resets for each batch.
5. Add the module's name to ``FAMILIES`` below, and tests against a formulation that is independent
   of the emulator.
"""

from __future__ import annotations

import importlib

FAMILIES = (
    "integer",
    "integer_wide",
    "bits",
    "floating",
    "compare",
    "conversion",
    "conversion_fp8",
    "data",
    "atomics",
    "warp",
    "matrix",
    "wgmma",
    "async_copy",
    "mbarrier",
    "bulk_copy",
    "tensor_copy",
    "proxy",
    "cluster",
    "sync",
    "control",
)


def load() -> None:
    """Registers every family; the second time it does nothing."""
    for name in FAMILIES:
        importlib.import_module(f"{__name__}.{name}")
