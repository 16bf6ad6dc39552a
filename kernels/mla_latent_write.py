"""Triton kernel of `kimi_ops.mla_latent_write`: both norms, RoPE and the paged write, one launch.

    row (q | c | k) of qkv_a:   q_a = rms_norm(q)     kv_cache[slot] = (rms_norm(c) | rope(k))

Grid: ``(cdiv(T, BLOCK_T),)``; at Kimi K2.5's widths a program is one token (several share one where
Q + C is small). q and c lie side by side, and in Kimi K2.5 they are together exactly one power of
two, so that one unmasked tile holds both; each lane knows which it has:

    qkv_a [T, 1536 + 512 + 64]   token t:  |------- q 1536 -------|-- c 512 --| k 64 |
                                            one tile of 2048 (2 warps x 32 a    | one element
                                            lane: four 16-byte loads in flight) | a lane
    q_a [T, 1536]                          |------- q_a ----------|
    kv_cache [pages, P, 576]               page slot // P, row slot % P:  |-- c --| k |
    fp8      [pages, P, 656]                                               codes |scale| k |

In the fp8 format of `kimi_ops.quant.latent_fp8` one more maximum over c gives the scale, and each
lane makes codes of its own part of c: the same loads, the same single launch.

A slot outside the cache stores nothing there, and any but -1 makes the token's q_a NaN.

Bytes: each row read once and written once, ``4 (Q + C + R)`` a token in 16-bit dtypes, 8,448 B in
K2.5 (7,952 B with the fp8 cache); the norm weights and frequencies come from L2. Flops: about 6 an
element: bound by memory, and up to some hundred tokens by one trip there and back. Shared memory:
256 B, for sums over two warps.

Numerics: squares, sums and roots in float32, rounded to the dtype before the weight as the model
has it and once after. The angle is ``position * inv_freq`` in float32, the reference's own; its
sine and cosine are right to 8e-8 at any position (`kimi_ops.kernels._angle`). One tile and one
order of summation for every T: a token's result does not depend on the batch. The fp8 scale and its
reciprocal are divisions rounded to nearest, and codes are rounded in integers (`_e4m3`): given the
same normalised latent, the bytes are those of the reference.

Source: DeepSeek-V2, arXiv 2405.04434 section 2.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_ops.kernels._angle import sin_cos
from kimi_ops.kernels._e4m3 import FP8_CACHE, is_aligned_fp8, to_e4m3
from kimi_ops.kernels._rotate import rotate_pairs
from kimi_ops.kernels._rows import rms_factor
from kimi_ops.quant import latent_fp8

LARGEST: tl.constexpr = tl.constexpr(latent_fp8.LARGEST)
SMALLEST_SCALE: tl.constexpr = tl.constexpr(latent_fp8.SMALLEST_SCALE)
BATCH_INVARIANT = True  # tiles follow from the width of a token alone
PER_WARP = 1024  # elements of a row: 32 a lane, all in registers from load to store
WIDEST = 16384  # 16 warps
SHARED = 2048  # tokens of fewer elements share a program, up to so many together


@triton.jit
def mla_latent_write_kernel(
    qkv_a_ptr,  # [T, Q+C+R]
    q_norm_weight_ptr,  # [Q]
    kv_norm_weight_ptr,  # [C]
    positions_ptr,  # [T]
    inv_freq_ptr,  # [R/2]
    slot_mapping_ptr,  # [T]
    kv_cache_ptr,  # [num_pages, P, C+R], or uint8 [num_pages, P, C+16+2R]
    q_a_ptr,  # [T, Q], contiguous
    tokens,
    num_slots,  # num_pages * P
    stride_x_t,
    stride_x_d,
    stride_wq,
    stride_wc,
    stride_position,
    stride_freq,
    stride_slot,
    stride_cache_page,
    stride_cache_row,
    stride_cache_d,
    eps,
    Q: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,  # holds Q + C
    BLOCK_R: tl.constexpr,
):
    offs_t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]  # [BLOCK_T, 1]
    mask_t = offs_t < tokens
    offs_t = offs_t.to(tl.int64)
    row_ptr = qkv_a_ptr + offs_t * stride_x_t
    slot = tl.load(slot_mapping_ptr + offs_t * stride_slot, mask=mask_t, other=-1).to(tl.int64)
    inside = (slot >= 0) & (slot < num_slots)
    place = tl.where(inside, slot, 0)
    entry_ptr = kv_cache_ptr + place // P * stride_cache_page + place % P * stride_cache_row

    offs = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]: q, then c
    is_q = offs < Q
    is_c = (offs >= Q) & (offs < Q + C)
    at_ptr = row_ptr + offs.to(tl.int64) * stride_x_d
    x = tl.load(at_ptr, mask=mask_t & (offs < Q + C), other=0.0).to(tl.float32)
    weight_q = tl.load(q_norm_weight_ptr + offs * stride_wq, mask=is_q, other=0.0)
    weight_c = tl.load(kv_norm_weight_ptr + (offs - Q) * stride_wc, mask=is_c, other=0.0)
    weight = tl.where(is_q, weight_q, weight_c).to(tl.float32)

    PRECISE: tl.constexpr = q_a_ptr.dtype.element_ty == tl.float32
    squares = x * x
    scale_q, correction_q = rms_factor(tl.where(is_q, squares, 0.0), Q, eps, PRECISE)
    scale_c, correction_c = rms_factor(tl.where(is_c, squares, 0.0), C, eps, PRECISE)
    # A wrong slot must be seen: NaN in its q_a. -1 is padding.
    scale_q = tl.where(inside | (slot == -1), scale_q, float("nan"))  # [BLOCK_T, 1]
    scale = tl.where(is_q, scale_q, scale_c)  # [BLOCK_T, BLOCK]
    normal = x * scale
    if PRECISE:
        normal = tl.fma(x, scale, x * tl.where(is_q, correction_q, correction_c))
    normal = normal.to(q_a_ptr.dtype.element_ty).to(tl.float32)
    y = (weight * normal).to(q_a_ptr.dtype.element_ty)
    tl.store(q_a_ptr + offs_t * Q + offs, y, mask=mask_t & is_q)
    FP8: tl.constexpr = kv_cache_ptr.dtype.element_ty == tl.uint8
    if FP8:
        latent = tl.where(is_c, y.to(tl.float32), 0.0)
        # What a maximum makes of NaN differs between targets; a comparison is false on all.
        lost = tl.max(tl.where(tl.abs(latent) < float("inf"), 0, 1), 1, keep_dims=True) > 0
        largest = tl.max(tl.abs(latent), 1, keep_dims=True)  # [BLOCK_T, 1]
        scale = tl.maximum(tl.div_rn(largest, LARGEST), SMALLEST_SCALE)
        codes = to_e4m3(latent * tl.div_rn(1.0, scale))
        codes = tl.where(lost, 0x7F, codes).to(tl.uint8)
        scale = tl.where(lost, float("nan"), scale)
        # Eight bytes a lane: with sixteen, the loads of x would take 32 bytes a lane too.
        place_c = tl.max_contiguous(offs - Q, (1, 8))
        tl.store(entry_ptr + place_c, codes, mask=inside & is_c)
        scale_ptr = (entry_ptr + C).to(tl.pointer_type(tl.float32), bitcast=True)
        copies = tl.arange(0, 4)[None, :]
        tl.store(scale_ptr + copies, tl.broadcast_to(scale, (BLOCK_T, 4)), mask=inside)
    else:
        tl.store(entry_ptr + (offs - Q).to(tl.int64) * stride_cache_d, y, mask=inside & is_c)

    if R > 0:
        offs_r = tl.arange(0, BLOCK_R)[None, :]  # [1, BLOCK_R]
        offs_m = tl.arange(0, BLOCK_R // 2)[None, :]  # pairs
        key_ptr = row_ptr + (Q + C + offs_r).to(tl.int64) * stride_x_d
        key = tl.load(key_ptr, mask=mask_t & (offs_r < R), other=0.0)
        position = tl.load(positions_ptr + offs_t * stride_position, mask=mask_t, other=0)
        freq = tl.load(inv_freq_ptr + offs_m * stride_freq, mask=offs_m < R // 2, other=0.0)
        sin, cos = sin_cos(position.to(tl.float32) * freq)  # [BLOCK_T, BLOCK_R / 2]
        turned = rotate_pairs(key, sin, cos)
        if FP8:
            rope_ptr = (entry_ptr + (C + 16)).to(tl.pointer_type(tl.bfloat16), bitcast=True)
            turned_ptr, turned = rope_ptr + offs_r, turned.to(tl.bfloat16)
        else:
            turned_ptr = entry_ptr + (C + offs_r).to(tl.int64) * stride_cache_d
        tl.store(turned_ptr, turned, mask=inside & (offs_r < R))


def _arguments(
    q_a: Tensor,
    qkv_a: Tensor,
    q_norm_weight: Tensor,
    kv_norm_weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    eps: float,
) -> tuple[dict[str, Any], int]:
    """Arguments of the kernel, and its warps."""
    q, c, r = len(q_norm_weight), len(kv_norm_weight), 2 * len(inv_freq)
    block = max(64, triton.next_power_of_2(q + c))
    arguments = {
        "qkv_a_ptr": qkv_a,
        "q_norm_weight_ptr": q_norm_weight,
        "kv_norm_weight_ptr": kv_norm_weight,
        "positions_ptr": positions,
        "inv_freq_ptr": inv_freq,
        "slot_mapping_ptr": slot_mapping,
        "kv_cache_ptr": kv_cache,
        "q_a_ptr": q_a,
        "tokens": len(qkv_a),
        "num_slots": kv_cache.shape[0] * kv_cache.shape[1],
        "stride_x_t": qkv_a.stride(0),
        "stride_x_d": qkv_a.stride(1),
        "stride_wq": q_norm_weight.stride(0),
        "stride_wc": kv_norm_weight.stride(0),
        "stride_position": positions.stride(0),
        "stride_freq": inv_freq.stride(0),
        "stride_slot": slot_mapping.stride(0),
        "stride_cache_page": kv_cache.stride(0),
        "stride_cache_row": kv_cache.stride(1),
        "stride_cache_d": kv_cache.stride(2),
        "eps": eps,
        "Q": q,
        "C": c,
        "R": r,
        "P": kv_cache.shape[1],
        "BLOCK_T": max(1, SHARED // block),
        "BLOCK": block,
        "BLOCK_R": max(2, triton.next_power_of_2(r)),
    }
    return arguments, max(2, block // PER_WARP)


def unsupported(
    qkv_a: Tensor,
    q_norm_weight: Tensor,
    kv_norm_weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    eps: float,
) -> str | None:
    if qkv_a.dtype == torch.float64:
        return "mla_latent_write in Triton computes in float32; qkv_a is float64"
    width = len(q_norm_weight) + len(kv_norm_weight)
    if width > WIDEST:
        return (
            f"mla_latent_write in Triton keeps a token in registers, Q+C up to {WIDEST}, "
            f"got {width}"
        )
    if kv_cache.dtype == torch.uint8 and not is_aligned_fp8(kv_cache, len(kv_norm_weight)):
        return f"mla_latent_write in Triton: {FP8_CACHE}"
    return None


def launch(
    q_a: Tensor,
    qkv_a: Tensor,
    q_norm_weight: Tensor,
    kv_norm_weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    eps: float,
) -> None:
    if len(qkv_a) == 0:
        return
    arguments, warps = _arguments(
        q_a=q_a,
        qkv_a=qkv_a,
        q_norm_weight=q_norm_weight,
        kv_norm_weight=kv_norm_weight,
        positions=positions,
        inv_freq=inv_freq,
        slot_mapping=slot_mapping,
        kv_cache=kv_cache,
        eps=eps,
    )
    grid = (triton.cdiv(len(qkv_a), arguments["BLOCK_T"]),)
    mla_latent_write_kernel[grid](**arguments, num_warps=warps)


def static_cases() -> Iterable[Any]:
    """Kimi K2.5's widths at a usual page size, at one of a single token, and at an odd one.

    In the activations' cache format, and in fp8.
    """
    from kimi_ops.testing.static import StaticCase

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, c, r = 1536, 512, 64
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for cache, entry in ((dtype, c + r), (torch.uint8, latent_fp8.entry_bytes(c, r))):
            for page, index in ((64, torch.int32), (1, torch.int64), (7, torch.int64)):
                arguments, warps = _arguments(
                    q_a=empty(64, q, dtype=dtype),
                    qkv_a=empty(64, q + c + r, dtype=dtype),
                    q_norm_weight=empty(q, dtype=dtype),
                    kv_norm_weight=empty(c, dtype=dtype),
                    positions=empty(64, dtype=index),
                    inv_freq=empty(r // 2),
                    slot_mapping=empty(64, dtype=index),
                    kv_cache=empty(4096 // page, page, entry, dtype=cache),
                    eps=1e-5,
                )
                name = f"page_{page}_{str(dtype).removeprefix('torch.')}"
                name += "_fp8" * (cache == torch.uint8)
                yield StaticCase.of_call(name, mla_latent_write_kernel, arguments, num_warps=warps)
