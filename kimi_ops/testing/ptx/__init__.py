"""An emulator of PTX, the virtual instruction set of NVIDIA GPUs, on CPU tensors.

`Kernel` runs what the compilers emit and raises what its checks find; `Report` has the counts.
"""

from __future__ import annotations

from kimi_ops.testing.ptx.errors import (
    Deadlock,
    Divergence,
    DivisionByZero,
    LaunchError,
    Misaligned,
    MissingWait,
    OutOfBounds,
    PtxError,
    PtxSyntaxError,
    Race,
    Uninitialised,
    UnsupportedPtx,
)
from kimi_ops.testing.ptx.kernel import Checks, Kernel, Report

__all__ = [
    "Checks",
    "Deadlock",
    "Divergence",
    "DivisionByZero",
    "Kernel",
    "LaunchError",
    "Misaligned",
    "MissingWait",
    "OutOfBounds",
    "PtxError",
    "PtxSyntaxError",
    "Race",
    "Report",
    "Uninitialised",
    "UnsupportedPtx",
]
