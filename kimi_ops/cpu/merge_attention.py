"""Launches `csrc/cpu/merge_attention.cpp`."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops import _native
from kimi_ops.cpu._support import dense_rows, refusal

BATCH_INVARIANT = True  # a row is merged alike in every batch


def unsupported(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> str | None:
    if lse_a.dtype != torch.float32:
        return "merge_attention on the CPU takes float32 for lse; lse_a is float64"
    return refusal("merge_attention", out_a)


def launch(
    outputs: tuple[Tensor, Tensor], out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> None:
    out, lse = outputs
    if lse.numel() == 0:
        return
    out_a, rows_a = dense_rows(out_a)
    out_b, rows_b = dense_rows(out_b)
    _native.call(
        "merge_attention",
        dtype=out.dtype,
        out=out,
        lse=lse,
        out_a=out_a,
        rows_a=rows_a,
        lse_a=lse_a.contiguous(),
        out_b=out_b,
        rows_b=rows_b,
        lse_b=lse_b.contiguous(),
        rows=lse.numel(),
        width=out.shape[-1],
    )
