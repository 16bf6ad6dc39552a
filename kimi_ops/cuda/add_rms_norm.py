"""Launches `csrc/cuda/add_rms_norm.cu`."""

from __future__ import annotations

from torch import Tensor

from kimi_ops._strided_rows import or_packed
from kimi_ops.cuda._launcher import launch_kernel
from kimi_ops.cuda._rows import rows_of_block, warps_of_row
from kimi_ops.cuda._support import ELEMENTS, aligned, refusal

BATCH_INVARIANT = True  # how a row is summed follows from its width alone


def unsupported(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> str | None:
    return refusal("add_rms_norm", x, tuple(ELEMENTS))


def launch(
    outputs: tuple[Tensor, Tensor], x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> None:
    y, h = outputs
    if y.numel() == 0:
        return
    columns, wide = x.shape[-1], 16 // x.element_size()
    vectors = columns % wide == 0
    if vectors:
        x, residual, weight = aligned(x), aligned(residual), aligned(weight)
    x, rows = or_packed(x)
    residual, residual_rows = or_packed(residual)
    warps = warps_of_row(-(-columns // wide))
    per_block = rows_of_block(warps)
    launch_kernel(
        "add_rms_norm",
        f"add_rms_norm_kernel_{ELEMENTS[x.dtype]}_{'vec' if vectors else 'each'}_{warps}",
        grid=(-(-rows.total // per_block),),
        block=(32 * warps, per_block),
        args=[
            x,
            residual,
            weight,
            y,
            h,
            rows.total,
            columns,
            *rows[1:],
            *residual_rows[1:],
            weight.stride(0),
            eps,
        ],
    )
