"""Launches `csrc/cuda/rms_norm.cu`."""

from __future__ import annotations

from torch import Tensor

from kimi_ops._strided_rows import or_packed
from kimi_ops.cuda._launcher import launch_kernel
from kimi_ops.cuda._rows import rows_of_block, warps_of_row
from kimi_ops.cuda._support import ELEMENTS, aligned, refusal

BATCH_INVARIANT = True  # how a row is summed follows from its width alone


def unsupported(x: Tensor, weight: Tensor, eps: float) -> str | None:
    return refusal("rms_norm", x, tuple(ELEMENTS))


def launch(y: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    if y.numel() == 0:
        return
    columns, wide = x.shape[-1], 16 // x.element_size()
    vectors = columns % wide == 0
    if vectors:
        x, weight = aligned(x), aligned(weight)
    x, rows = or_packed(x)
    warps = warps_of_row(-(-columns // wide))
    per_block = rows_of_block(warps)
    launch_kernel(
        "rms_norm",
        f"rms_norm_kernel_{ELEMENTS[x.dtype]}_{'vec' if vectors else 'each'}_{warps}",
        grid=(-(-rows.total // per_block),),
        block=(32 * warps, per_block),
        args=[x, weight, y, rows.total, columns, *rows[1:], weight.stride(0), eps],
    )
