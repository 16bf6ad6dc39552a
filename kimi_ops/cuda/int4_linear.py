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
    form = _int4.form_of(x, scale, tokens)
    xr = torch.empty(tokens, columns, dtype=x.dtype, device=x.device)
    lifted = start = None
    if not form.many:
        lifted = torch.empty(tokens * columns + _int4.ZEROS, dtype=torch.float16, device=x.device)
        start = torch.empty(tokens, starts, dtype=torch.float32, device=x.device)
    suffix = ELEMENTS[x.dtype]
    launch_kernel(
        "int4_linear",
        f"int4_linear_prepare_kernel_{suffix}",
        grid=(tokens, -(-groups // (_int4.THREADS // 4))),
        block=(_int4.THREADS,),
        args=[x, xr, lifted, start, x.stride(0), tokens, groups],
    )
    blocks = -(-tokens // form.block)
    row_tiles = -(-rows // _int4.rows_of_block(form))
    if form.many:
        launch_kernel(
            "int4_linear",
            f"int4_linear_many_kernel_{suffix}",
            grid=(row_tiles * blocks,),
            block=(form.threads(1),),
            shared_bytes=form.shared_bytes(1),
            args=[
                packed,
                scale,
                xr,
                y,
                packed.stride(0) // 4,
                scale.stride(0),
                groups,
                tokens,
                rows,
                form.block,
                row_tiles,
                _int4.SHIFT,
                _int4.whole_pieces(scale),
            ],
        )
        return
    split = _int4.split_of(x, groups, blocks * row_tiles)
    launch_kernel(
        "int4_linear",
        f"int4_linear_kernel_{suffix}",
        grid=(blocks, row_tiles),
        block=(form.threads(split),),
        shared_bytes=form.shared_bytes(split),
        args=[
            packed,
            scale,
            xr,
            lifted,
            start,
            None if lifted is None else lifted[-_int4.ZEROS :],
            y,
            packed.stride(0) // 4,
            scale.stride(0),
            _int4.scale_kind(scale),
            groups,
            _int4.whole_chunks(x, scale),
            tokens,
            rows,
            form.block,
            form.few,
            split,
            _int4.SHIFT,
        ],
    )
