"""The definition of every op in plain PyTorch, written to be read.

Each module has one function named like its op. Given float64 it is the oracle; given a lower dtype
it is what a user would write with torch's own operators in that dtype (matrix products in the
dtype with torch's accumulation, statistics and softmax in float32), and its error there is the
yardstick for every kernel. ``launch`` copies its result into the op's outputs.

The reference imports torch alone. It runs on any device, may read index tensors on the host, and so
is not meant for CUDA graphs.
"""

from __future__ import annotations

from torch import Tensor


def runs_anything(*args: object) -> str | None:
    """``unsupported`` of every reference: no call within the contract is refused."""
    return None


def widen(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 if it is that already."""
    return x if x.element_size() == 8 else x.float()
