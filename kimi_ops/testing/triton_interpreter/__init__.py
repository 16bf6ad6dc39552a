"""Rung 2 of the evidence ladder, "interpreted": Triton kernels in Python, as the GPU rounds.

    with interpreted(seed=0) as report:
        module.launch(outputs, *args)

Built on the interpreter inside Triton, which does bf16 arithmetic on bit patterns, returns 0 for
masked lanes and reads out of bounds silently. See `interpreted` for what is checked, and `FAULTS`
for the names of what can be found.

What it cannot show:

- Programs run one by one, each to its end: an order that only interleaving gives is not executed.
  Races do not depend on it, they are found from who used which address.
- Lanes of a program are told apart by their position in the block. Which thread holds a position is
  the compiler's choice: "unsynchronised" means that some layout breaks it. A reduction counts as no
  barrier, though it may hold one.
- Overflow is followed from 32-bit (or narrower) signed ``+ - *`` through shapes, casts and further
  arithmetic to an address, not through reductions, ``tl.gather`` or memory, and not in 64 bits.
- ``exp``, ``log`` and their family are numpy's, within an ulp or so, where the GPU's approximate; a
  product and a sum are rounded separately, where the compiler may fuse them; sums of a dot and of a
  reduction have an order, not the GPU's.
- Float to integer out of range is undefined in LLVM; here it saturates.
- Of the programs that read an address, the first and the last are remembered, not all.
- Refused by name: inline assembly, Gluon, ``tl.dot_scaled``, ``tl.map_elementwise``, libdevice
  functions without a numpy twin, fp8 other than e4nv and e5, autotuning among several
  configurations, and operations that a later Triton adds.
"""

from __future__ import annotations

from kimi_ops.testing.triton_interpreter.faults import (
    FAULTS,
    KernelFault,
    Launch,
    Place,
    Report,
    UnsupportedByInterpreter,
)
from kimi_ops.testing.triton_interpreter.versions import require_known_triton

require_known_triton()

from kimi_ops.testing.triton_interpreter.execution import interpreted  # noqa: E402

__all__ = [
    "FAULTS",
    "KernelFault",
    "Launch",
    "Place",
    "Report",
    "UnsupportedByInterpreter",
    "interpreted",
]
