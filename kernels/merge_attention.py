"""Triton kernel of `kimi_ops.merge_attention`: two partial attentions into one by their lse.

    lse = log(e^lse_a + e^lse_b)        out = e^(lse_a - lse) out_a + e^(lse_b - lse) out_b

Grid: ``(cdiv(T, BLOCK_T),)`` for the T rows that all leading dimensions make; a program owns
BLOCK_T rows of both sides from end to end:

    out_a [T, V]  lse_a [T]     program 0: |rows 0 .. BLOCK_T-1|  2,048 elements of each side: with
    out_b [T, V]  lse_b [T]     program 1: |rows BLOCK_T ..    |  4 warps two 16-byte loads a thread
    out   [T, V]  lse   [T]     (16 rows of 128, 4 of 512)        and side, all of them in flight

Bytes: both sides once, the result once: ``(6 V + 12) T`` in 16-bit dtypes, the floor. Flops: 3 an
element: bound by memory everywhere. No tensor cores, no shared memory; the order of work does not
depend on T, so every batch size gives the same bits.

Numerics: with ``d = e^-|lse_a - lse_b|`` the larger side's share is 1 / (1 + d), the other's d
times that, and ``lse = max + log(1 + d)``. Neither overflows nor cancels, and the shares do not
inherit the rounding of lse, as ``e^(lse_a - lse)`` would. float32 throughout, one rounding at the
end.

Source: FlashAttention-2, arXiv 2307.08691.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_ops._strided_rows import or_packed
from kimi_ops.kernels._rows import row_offsets

BATCH_INVARIANT = True  # a row is one program's, and tiles follow from its width alone
ELEMENTS = 2048  # of each side in a program
WIDEST = 512  # columns of a step; a wider row takes several
WARPS = 4


@triton.jit
def _log1p(d):
    """log(1 + d) for d from 0 to 1, as 2 artanh(d / (2 + d)).

    The machine's logarithm is off by 1.6e-7 just above 1, which is 3 units of float32 there. The
    odd series in s <= 1/3 is cut after s^15: what it leaves out is 6e-9 of the result.
    """
    s = tl.div_rn(d, d + 2.0)
    z = s * s
    tail = 1.0 / 11 + z * (1.0 / 13 + z * (1.0 / 15))
    tail = 1.0 / 3 + z * (1.0 / 5 + z * (1.0 / 7 + z * (1.0 / 9 + z * tail)))
    return 2.0 * (s + s * z * tail)


@triton.jit
def _places(offs_t, inner, stride_outer, stride_inner, FLAT: tl.constexpr):
    """Offsets of rows; the two divisions for each of four tensors were half of all instructions."""
    if FLAT:
        offs = offs_t.to(tl.int64) * stride_inner
    else:
        offs = row_offsets(offs_t, inner, stride_outer, stride_inner)
    return offs


@triton.jit
def merge_attention_kernel(
    out_a_ptr,  # [T, V]
    lse_a_ptr,  # [T]
    out_b_ptr,  # [T, V]
    lse_b_ptr,  # [T]
    out_ptr,  # [T, V], contiguous
    lse_ptr,  # [T], contiguous
    rows,
    columns,
    inner_a,
    stride_a_outer,
    stride_a_inner,
    stride_a_d,
    inner_b,
    stride_b_outer,
    stride_b_inner,
    stride_b_d,
    inner_lse_a,
    stride_lse_a_outer,
    stride_lse_a_inner,
    inner_lse_b,
    stride_lse_b_outer,
    stride_lse_b_inner,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,  # BLOCK_D holds a row
    FLAT: tl.constexpr,  # each tensor's rows are one stride apart
):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    mask_t = offs_t < rows
    a_ptr = out_a_ptr + _places(offs_t, inner_a, stride_a_outer, stride_a_inner, FLAT)[:, None]
    b_ptr = out_b_ptr + _places(offs_t, inner_b, stride_b_outer, stride_b_inner, FLAT)[:, None]
    y_ptr = out_ptr + (offs_t.to(tl.int64) * columns)[:, None]
    offs_a = _places(offs_t, inner_lse_a, stride_lse_a_outer, stride_lse_a_inner, FLAT)
    offs_b = _places(offs_t, inner_lse_b, stride_lse_b_outer, stride_lse_b_inner, FLAT)
    lse_a = tl.load(lse_a_ptr + offs_a, mask=mask_t, other=0.0)
    lse_b = tl.load(lse_b_ptr + offs_b, mask=mask_t, other=0.0)

    has_a = lse_a != float("-inf")
    has_b = lse_b != float("-inf")
    d = tl.exp(-tl.abs(lse_a - lse_b))
    larger = tl.maximum(lse_a, lse_b)
    lse = tl.where(has_a & has_b & (larger < float("inf")), larger + _log1p(d), larger)
    # Two sides of -inf leave -inf; NaN of either side, which the maximum may drop, stays NaN.
    lse = tl.where((lse_a != lse_a) | (lse_b != lse_b), float("nan"), lse)
    tl.store(lse_ptr + offs_t, lse, mask=mask_t)

    major = tl.div_rn(tl.full(d.shape, 1.0, tl.float32), 1.0 + d)
    # An lse of +inf or NaN has no share that means anything: NaN, as the formula gives.
    major = tl.where(lse < float("inf"), major, float("nan"))
    share_a = tl.where(lse_a >= lse_b, major, d * major)[:, None]
    share_b = tl.where(lse_a >= lse_b, d * major, major)[:, None]

    for start in range(0, BLOCK_D if WHOLE else columns, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask = mask_t[:, None] & (offs_d < columns)[None, :]
        offs_wide = offs_d.to(tl.int64)[None, :]
        a = tl.load(a_ptr + offs_wide * stride_a_d, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + offs_wide * stride_b_d, mask=mask, other=0.0).to(tl.float32)
        # A side without keys may hold anything: it is left out and not multiplied by 0.
        a = tl.where(has_a[:, None], a * share_a, 0.0)
        b = tl.where(has_b[:, None], b * share_b, 0.0)
        tl.store(y_ptr + offs_d[None, :], (a + b).to(out_ptr.dtype.element_ty), mask=mask)


def _arguments(
    out: Tensor, lse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> dict[str, Any]:
    out_a, rows_a = or_packed(out_a)
    out_b, rows_b = or_packed(out_b)
    lse_a, rows_lse_a = or_packed(lse_a.unsqueeze(-1))
    lse_b, rows_lse_b = or_packed(lse_b.unsqueeze(-1))
    columns = out.shape[-1]
    block_d = min(WIDEST, triton.next_power_of_2(columns))
    return {
        "out_a_ptr": out_a,
        "lse_a_ptr": lse_a,
        "out_b_ptr": out_b,
        "lse_b_ptr": lse_b,
        "out_ptr": out,
        "lse_ptr": lse,
        "rows": rows_a.total,
        "columns": columns,
        "inner_a": rows_a.inner,
        "stride_a_outer": rows_a.stride_outer,
        "stride_a_inner": rows_a.stride_inner,
        "stride_a_d": rows_a.stride_d,
        "inner_b": rows_b.inner,
        "stride_b_outer": rows_b.stride_outer,
        "stride_b_inner": rows_b.stride_inner,
        "stride_b_d": rows_b.stride_d,
        "inner_lse_a": rows_lse_a.inner,
        "stride_lse_a_outer": rows_lse_a.stride_outer,
        "stride_lse_a_inner": rows_lse_a.stride_inner,
        "inner_lse_b": rows_lse_b.inner,
        "stride_lse_b_outer": rows_lse_b.stride_outer,
        "stride_lse_b_inner": rows_lse_b.stride_inner,
        "BLOCK_T": min(32, ELEMENTS // block_d),
        "BLOCK_D": block_d,
        "WHOLE": columns <= block_d,
        "FLAT": all(rows.inner == rows.total for rows in (rows_a, rows_b, rows_lse_a, rows_lse_b)),
    }


def unsupported(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> str | None:
    if torch.float64 in (out_a.dtype, lse_a.dtype):
        name = "out_a" if out_a.dtype == torch.float64 else "lse_a"
        return f"merge_attention in Triton computes in float32; {name} is float64"
    return None


def launch(
    outputs: tuple[Tensor, Tensor], out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> None:
    out, lse = outputs
    if lse.numel() == 0:
        return
    call = _arguments(out=out, lse=lse, out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    merge_attention_kernel[(triton.cdiv(call["rows"], call["BLOCK_T"]),)](**call, num_warps=WARPS)


def static_cases() -> Iterable[Any]:
    """The widths of prefill and of absorbed decode, and one that takes several steps."""
    from kimi_ops.testing.static import StaticCase

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for columns in (128, 512, 1536):
            out = torch.empty(4096, 64, columns, dtype=dtype, device="meta")
            lse = torch.empty(4096, 64, device="meta")
            call = _arguments(out=out, lse=lse, out_a=out, lse_a=lse, out_b=out, lse_b=lse)
            name = f"{str(dtype).removeprefix('torch.')}_{columns}"
            yield StaticCase.of_call(name, merge_attention_kernel, call, num_warps=WARPS)
