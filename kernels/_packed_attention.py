"""Softmax attention of packed sequences, for `mla_prefill` and `vision_attention`.

    out[i] = sum_j softmax(scale q_i . k_j) v_j    j < seen(i), within each sequence

Grid: ``(tiles * (B + 1), H)``, ``tiles = cdiv(longest, BLOCK_M)``. A program has BLOCK_M queries of
one sequence and head and goes through the keys that any of them sees; the programs of "sequence" B
write the rows that belong to none. Which rows are whose stays on the device: a tile past the end
of its sequence returns at once.

    sequence b, head h      keys 0 .. BLOCK_N ..  seen by all of the tile | by some (causal, end)
    queries tile 0          [ scores -> p ] [ .. ]  no mask               | masked
    queries tile 1          ..

Widths that are no power of two are two tiles side by side, so 192 computes on 128 + 64 and 72 on
64 + 16, not on 256 and 128. The softmax is online, base 2, in float32; p is rounded to the dtype of
v for its product, as the reference rounds its weights.

Source: FlashAttention-2, arXiv 2307.08691.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kimi_ops.kernels._alignment import common_alignment


class Tile(NamedTuple):
    """Queries and keys of a step, warps, and stages of the pipeline of keys and values."""

    queries: int
    keys: int
    warps: int
    stages: int


def candidates(width: int, value_width: int) -> tuple[Tile, ...]:
    """Tiles for `kimi_ops.kernels._tiles`: 16 or 32 queries a warp, so that no row crosses one."""
    shapes = (64, 32, 4), (64, 64, 4), (128, 32, 8), (128, 64, 8), (128, 128, 8), (128, 64, 4)
    return tuple(Tile(*shape, stages) for shape in shapes for stages in (2, 3))


def pieces(width: int) -> tuple[int, int]:
    """Two powers of two, each at least 16 or the second 0, that hold ``width`` columns."""
    if width <= 16:
        return 16, 0
    first = 1 << (width.bit_length() - 1)
    rest = width - first
    return first, max(16, triton.next_power_of_2(rest)) if rest else 0


@triton.jit
def _rows(
    ptr, rows, stride_l, stride_d, count,
    width: tl.constexpr, ALIGN: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Tile ``[rows, SIZE]`` from column FIRST on; zero past ``count`` rows or ``width`` columns."""
    offs_d = FIRST + tl.arange(0, SIZE)
    mask = (rows < count)[:, None] & (offs_d < width)[None, :]
    offs_row = tl.multiple_of(rows.to(tl.int64) * stride_l, ALIGN)
    return tl.load(ptr + offs_row[:, None] + offs_d[None, :] * stride_d, mask=mask, other=0.0)


@triton.jit
def _step(
    q0, q1, k_ptr, v_ptr, n0, end_k, seen, best, total, out0, out1,
    stride_k_l, stride_k_d, stride_v_l, stride_v_d, scale,
    width: tl.constexpr, value_width: tl.constexpr, ALIGN_K: tl.constexpr, ALIGN_V: tl.constexpr,
    W0: tl.constexpr, W1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Takes BLOCK_N keys from n0 on into the running (best, total, out0, out1) of a tile."""
    offs_n = n0 + tl.arange(0, BLOCK_N)
    k0 = _rows(k_ptr, offs_n, stride_k_l, stride_k_d, end_k, width, ALIGN_K, 0, W0)
    score = tl.dot(q0, tl.trans(k0))  # [BLOCK_M, BLOCK_N]
    if W1 > 0:
        k1 = _rows(k_ptr, offs_n, stride_k_l, stride_k_d, end_k, width, ALIGN_K, W0, W1)
        score = tl.dot(q1, tl.trans(k1), score)
    score *= scale
    if MASKED:
        score = tl.where(offs_n[None, :] < seen[:, None], score, float("-inf"))
    new_best = tl.maximum(best, tl.max(score, 1))
    # A row that has seen no key yet has -inf here, whose difference to itself would be NaN.
    safe = tl.where(new_best == float("-inf"), 0.0, new_best)
    p = tl.exp2(score - safe[:, None])
    keep = tl.exp2(best - safe)
    total = total * keep + tl.sum(p, 1)
    v0 = _rows(v_ptr, offs_n, stride_v_l, stride_v_d, end_k, value_width, ALIGN_V, 0, V0)
    out0 = tl.dot(p.to(v0.dtype), v0, out0 * keep[:, None])
    if V1 > 0:
        v1 = _rows(v_ptr, offs_n, stride_v_l, stride_v_d, end_k, value_width, ALIGN_V, V0, V1)
        out1 = tl.dot(p.to(v1.dtype), v1, out1 * keep[:, None])
    return new_best, total, out0, out1


@triton.jit
def _store_columns(
    out_ptr, rows, count, stride_l, values,
    width: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    offs_d = FIRST + tl.arange(0, SIZE)
    mask = (rows < count)[:, None] & (offs_d < width)[None, :]
    offs = rows.to(tl.int64)[:, None] * stride_l + offs_d[None, :]
    tl.store(out_ptr + offs, values.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def packed_attention_kernel(
    q_ptr,  # [T, H, width]
    k_ptr,  # [L, H, width]
    v_ptr,  # [L, H, value_width]
    cu_seqlens_q_ptr,  # [B + 1]
    cu_seqlens_k_ptr,  # [B + 1]
    out_ptr,  # [T, H, value_width], contiguous
    lse_ptr,  # [T, H], contiguous; only with WITH_LSE
    tokens,
    sequences,
    tiles,
    stride_q_l,
    stride_q_h,
    stride_q_d,
    stride_k_l,
    stride_k_h,
    stride_k_d,
    stride_v_l,
    stride_v_h,
    stride_v_d,
    stride_out_l,
    stride_lse_l,
    scale_log2,  # scale * log2(e)
    width: tl.constexpr,
    value_width: tl.constexpr,
    ALIGN_Q: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ALIGN_V: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WITH_LSE: tl.constexpr,
):
    sequence = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    head = tl.program_id(1)
    out_ptr += tl.multiple_of(head * value_width, 8 if value_width % 8 == 0 else 1)
    lse_ptr += head
    start_q = tl.load(cu_seqlens_q_ptr + sequence)
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)

    if sequence == sequences:  # rows of no sequence
        left = tokens - start_q
        for first in range(tile * BLOCK_M, left, tiles * BLOCK_M):
            rows = first + tl.arange(0, BLOCK_M)
            zero_ptr = out_ptr + start_q.to(tl.int64) * stride_out_l
            zero = tl.zeros([BLOCK_M, V0], tl.float32)
            _store_columns(zero_ptr, rows, left, stride_out_l, zero, value_width, 0, V0)
            if V1 > 0:
                zero = tl.zeros([BLOCK_M, V1], tl.float32)
                _store_columns(zero_ptr, rows, left, stride_out_l, zero, value_width, V0, V1)
            if WITH_LSE:
                offs_lse = (start_q + rows).to(tl.int64) * stride_lse_l
                tl.store(lse_ptr + offs_lse, float("-inf"), mask=rows < left)
        return

    end_q = tl.load(cu_seqlens_q_ptr + sequence + 1) - start_q
    if tile * BLOCK_M >= end_q:
        return
    start_k = tl.load(cu_seqlens_k_ptr + sequence)
    end_k = tl.load(cu_seqlens_k_ptr + sequence + 1) - start_k
    offs_q = start_q.to(tl.int64) * stride_q_l + head * stride_q_h
    offs_k = start_k.to(tl.int64) * stride_k_l + head * stride_k_h
    offs_v = start_k.to(tl.int64) * stride_v_l + head * stride_v_h
    q_ptr += tl.multiple_of(offs_q, ALIGN_Q)
    k_ptr += tl.multiple_of(offs_k, ALIGN_K)
    v_ptr += tl.multiple_of(offs_v, ALIGN_V)

    if CAUSAL:
        seen = tl.minimum(tl.maximum(offs_m + 1 + end_k - end_q, 0), end_k)
        most = tl.minimum(tl.maximum((tile + 1) * BLOCK_M + end_k - end_q, 0), end_k)
        least = tl.minimum(tl.maximum(tile * BLOCK_M + 1 + end_k - end_q, 0), end_k)
    else:
        seen = tl.zeros_like(offs_m) + end_k
        most = end_k
        least = end_k

    q0 = _rows(q_ptr, offs_m, stride_q_l, stride_q_d, end_q, width, ALIGN_Q, 0, W0)
    q1 = q0
    if W1 > 0:
        q1 = _rows(q_ptr, offs_m, stride_q_l, stride_q_d, end_q, width, ALIGN_Q, W0, W1)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out0 = tl.zeros([BLOCK_M, V0], tl.float32)
    out1 = tl.zeros([BLOCK_M, V1 if V1 > 0 else 1], tl.float32)
    unmasked = least // BLOCK_N * BLOCK_N
    for n0 in range(0, unmasked, BLOCK_N):
        best, total, out0, out1 = _step(
            q0, q1, k_ptr, v_ptr, n0, end_k, seen, best, total, out0, out1,
            stride_k_l, stride_k_d, stride_v_l, stride_v_d, scale_log2,
            width, value_width, ALIGN_K, ALIGN_V, W0, W1, V0, V1, BLOCK_N, False,
        )  # fmt: skip
    for n0 in range(unmasked, most, BLOCK_N):
        best, total, out0, out1 = _step(
            q0, q1, k_ptr, v_ptr, n0, end_k, seen, best, total, out0, out1,
            stride_k_l, stride_k_d, stride_v_l, stride_v_d, scale_log2,
            width, value_width, ALIGN_K, ALIGN_V, W0, W1, V0, V1, BLOCK_N, True,
        )  # fmt: skip

    # A query without keys has total 0, out 0 and best -inf.
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    at_ptr = out_ptr + start_q.to(tl.int64) * stride_out_l
    _store_columns(at_ptr, offs_m, end_q, stride_out_l, out0 * share[:, None], value_width, 0, V0)
    if V1 > 0:
        out1 *= share[:, None]
        _store_columns(at_ptr, offs_m, end_q, stride_out_l, out1, value_width, V0, V1)
    if WITH_LSE:
        lse = (best + tl.log2(total)) * 0.6931471805599453
        lse = tl.where(total == 0.0, float("-inf"), lse)
        offs_lse = (start_q + offs_m).to(tl.int64) * stride_lse_l
        tl.store(lse_ptr + offs_lse, lse, mask=offs_m < end_q)


def arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    out: Tensor,
    lse: Tensor | None,
    longest: int,
    scale: float,
    causal: bool,
    tile: Tile,
) -> dict[str, Any]:
    """Arguments of the kernel for a call whose longest sequence has ``longest`` queries."""
    w0, w1 = pieces(q.shape[2])
    v0, v1 = pieces(v.shape[2])
    return {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "cu_seqlens_q_ptr": cu_seqlens_q,
        "cu_seqlens_k_ptr": cu_seqlens_k,
        "out_ptr": out,
        "lse_ptr": out if lse is None else lse,
        "tokens": q.shape[0],
        "sequences": cu_seqlens_q.shape[0] - 1,
        "tiles": max(1, triton.cdiv(longest, tile.queries)),
        "stride_q_l": q.stride(0),
        "stride_q_h": q.stride(1),
        "stride_q_d": q.stride(2),
        "stride_k_l": k.stride(0),
        "stride_k_h": k.stride(1),
        "stride_k_d": k.stride(2),
        "stride_v_l": v.stride(0),
        "stride_v_h": v.stride(1),
        "stride_v_d": v.stride(2),
        "stride_out_l": out.stride(0),
        "stride_lse_l": 0 if lse is None else lse.stride(0),
        "scale_log2": scale * 1.4426950408889634,
        "width": q.shape[2],
        "value_width": v.shape[2],
        "ALIGN_Q": common_alignment(*q.stride()[:2]),
        "ALIGN_K": common_alignment(*k.stride()[:2]),
        "ALIGN_V": common_alignment(*v.stride()[:2]),
        "W0": w0,
        "W1": w1,
        "V0": v0,
        "V1": v1,
        "BLOCK_M": tile.queries,
        "BLOCK_N": tile.keys,
        "CAUSAL": causal,
        "WITH_LSE": lse is not None,
    }


def unsupported(op: str, q: Tensor, v: Tensor) -> str | None:
    """Why this kernel cannot take such queries and values for ``op``, or None."""
    if q.element_size() != 2:
        return f"{op} in Triton multiplies bfloat16 or float16 on tensor cores; q is {q.dtype}"
    if max(q.shape[2], v.shape[2]) > 256:
        return f"{op} in Triton takes heads of up to 256, got {q.shape[2]} and {v.shape[2]}"
    return None


def run(call: dict[str, Any], heads: int, tile: Tile) -> None:
    """Launches the kernel on `arguments`."""
    grid = (call["tiles"] * (call["sequences"] + 1), heads)
    packed_attention_kernel[grid](**call, num_warps=tile.warps, num_stages=tile.stages)
