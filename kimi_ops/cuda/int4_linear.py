"""Launches `csrc/cuda/int4_linear.cu`: prepare, product."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops.cuda import _int4
from kimi_ops.cuda._launcher import launch_kernel
from kimi_ops.cuda._support import ELEMENTS, is_aligned

BATCH_INVARIANT = True  # then blocks have one form and one size


def unsupported(x: Tensor, packed: Tensor, scale: Tensor) -> str | None:
    return _int4.weights_refusal("int4_linear", x, {"packed": (packed, scale)})


def launch(y: Tensor, x: Tensor, packed: Tensor, scale: Tensor) -> None:
    if y.numel() == 0:
        return
    x = x.reshape(-1, x.shape[-1])
    if x.shape[1] == 0:
        y.zero_()
        return
    if not is_aligned(x):
        x = x.clone(memory_format=torch.contiguous_format)
    tokens, rows, groups = len(x), len(packed), packed.shape[1] // 4
    columns, starts = _int4.rearranged(groups)
    xr = torch.empty(tokens * columns + _int4.ZEROS, dtype=x.dtype, device=x.device)
    start = torch.empty(tokens * starts, dtype=torch.float32, device=x.device)
    suffix = ELEMENTS[x.dtype]
    launch_kernel(
        "int4_linear",
        f"int4_linear_prepare_kernel_{suffix}",
        grid=(tokens, -(-groups // (_int4.THREADS // 4))),
        block=(_int4.THREADS,),
        args=[x, xr, start, x.stride(0), tokens, groups],
    )
    split = _int4.split_of(groups)
    block_size, few = _int4.tokens_of_block(x, scale)
    blocks = -(-tokens // block_size)
    launch_kernel(
        "int4_linear",
        f"int4_linear_kernel_{suffix}",
        grid=(blocks * -(-rows // _int4.rows_of_block(split)),),
        block=(_int4.THREADS,),
        args=[
            packed,
            scale,
            xr,
            start,
            xr[-_int4.ZEROS :],
            y,
            packed.stride(0) // 4,
            scale.stride(0),
            _int4.scale_kind(scale),
            groups,
            _int4.whole_chunks(x, scale),
            tokens,
            rows,
            block_size,
            blocks,
            few,
            split,
            _int4.SHIFT,
        ],
    )
