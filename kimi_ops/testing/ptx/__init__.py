"""An emulator of PTX, the virtual instruction set of NVIDIA GPUs, on CPU tensors.

`Kernel` runs what the compilers emit and raises what its checks find; `Report` has the counts.
"""

from __future__ import annotations

from kimi_ops.testing.ptx.errors import (
    Deadlock,
    Divergence,
    DivisionByZero,
    LaunchError,
    MbarrierError,
    Misaligned,
    MissingFence,
    MissingWait,
    OutOfBounds,
    PtxError,
    PtxSyntaxError,
    Race,
    Uninitialised,
    UnsupportedPtx,
)
from kimi_ops.testing.ptx.kernel import Checks, Kernel, Report
from kimi_ops.testing.ptx.tensor_maps import TensorMap

__all__ = [
    "Checks",
    "Deadlock",
    "Divergence",
    "DivisionByZero",
    "Kernel",
    "LaunchError",
    "MbarrierError",
    "Misaligned",
    "MissingFence",
    "MissingWait",
    "OutOfBounds",
    "PtxError",
    "PtxSyntaxError",
    "Race",
    "Report",
    "TensorMap",
    "Uninitialised",
    "UnsupportedPtx",
]
