"""First stage of `mla_decode` in plain Triton: attention over one split of one sequence.

A program holds BLOCK_M query rows (a row is one head of one new token) and walks over the tokens of
its split, BLOCK_T at a time. A tile of the cache is held once in shared memory and serves both
products, as keys (all C+R columns) and as values (the first C):

    TOKEN_AXIS 1   scores [BLOCK_M, BLOCK_T] = q k^T        acc [BLOCK_M, C]  += p k
    TOKEN_AXIS 0   scores [BLOCK_T, BLOCK_M] = k q^T        acc [C, BLOCK_M]  += k^T p

The second form puts tokens and latent columns where the tensor core wants 64 rows (wgmma), so that
16 or 32 query rows are its narrow side and none is padding.

From a cache in the fp8 format (`kimi_ops.quant.latent_fp8`) a block's codes are widened to the
dtype of q, exactly, on their way to shared memory, and a token's scale never meets them: it
multiplies the token's scores between the products with the latent and with the rope values, and its
p before the product with the values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_ops.kernels._e4m3 import CODE_UNIT, from_e4m3

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def split_bounds(length, split, num_splits, min_blocks, BLOCK_T: tl.constexpr):
    """First and one past the last block of a split, and how many splits hold any.

    The blocks of a sequence are dealt out evenly, at least ``min_blocks`` to a split: what a split
    holds depends on the length of its own sequence alone.
    """
    blocks = (length + BLOCK_T - 1) // BLOCK_T
    per_split = tl.maximum((blocks + num_splits - 1) // num_splits, min_blocks)
    first = tl.minimum(split * per_split, blocks)
    return first, tl.minimum(first + per_split, blocks), (blocks + per_split - 1) // per_split


@triton.jit
def any_page_lost(table_ptr, stride_p, first, end, num_pages, STEP: tl.constexpr):
    """Whether one of the page ids ``first .. end - 1`` of a table row is no page of the cache."""
    lost = tl.zeros((STEP,), tl.int32)
    for start in range(first, end, STEP):
        offs_p = start + tl.arange(0, STEP)
        page = tl.load(table_ptr + offs_p.to(tl.int64) * stride_p, mask=offs_p < end, other=0)
        lost |= ((offs_p < end) & ((page < 0) | (page >= num_pages))).to(tl.int32)
    return tl.max(lost, 0) > 0


@triton.jit
def mla_decode_split_kernel(
    q_ptr,  # [B, S, H, C+R]
    kv_ptr,  # [num_pages, PAGE, C+R], or uint8 [num_pages, PAGE, C+16+2R]
    table_ptr,  # [B, max_pages]
    length_ptr,  # [B]
    out_ptr,  # [B, num_splits, S * H, C], float32 partials, or the op's own with one split
    lse_ptr,  # [B, S * H, num_splits]
    scale,
    new,  # S
    heads,  # H
    num_pages,
    capacity,  # tokens that a row of the page table can hold
    num_splits,
    min_blocks,
    stride_q_b,
    stride_q_s,
    stride_q_h,
    stride_q_w,
    stride_kv_p,
    stride_kv_t,
    stride_kv_w,
    stride_table_b,
    stride_table_p,
    stride_length_b,
    C: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,  # C and R up to the next power of two, 16 or more; BLOCK_R 0 if R is 0
    BLOCK_R: tl.constexpr,
    TOKEN_AXIS: tl.constexpr,
    ASSEMBLY: tl.constexpr,  # NVIDIA's, for an fp8 cache
):
    rows = new * heads
    row_tiles = (rows + BLOCK_M - 1) // BLOCK_M
    tile = tl.program_id(0) % row_tiles
    split = tl.program_id(0) // row_tiles % num_splits
    b = (tl.program_id(0) // row_tiles // num_splits).to(tl.int64)

    length = tl.load(length_ptr + b * stride_length_b)
    length = tl.minimum(tl.maximum(length, 0), capacity)
    first, last, _ = split_bounds(length, split, num_splits, min_blocks, BLOCK_T)
    if (first == last) & (num_splits > 1):
        return  # the second stage does not read what a split without blocks would write
    table_ptr += b * stride_table_b

    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < rows
    s, h = offs_m // heads, offs_m % heads
    # Row (s, h) sees this many tokens: the new ones after its own are hidden from it.
    limit = tl.where(mask_m, length - (new - 1 - s), 0)
    offs_c, mask_c = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_C) < C
    offs_t = tl.arange(0, BLOCK_T)
    row_ptr = q_ptr + b * stride_q_b + s.to(tl.int64) * stride_q_s + h.to(tl.int64) * stride_q_h
    row_ptr = row_ptr[:, None]
    q = tl.load(  # [BLOCK_M, C]
        row_ptr + (offs_c * stride_q_w)[None, :], mask=mask_m[:, None] & mask_c[None, :], other=0.0
    )
    FP8: tl.constexpr = kv_ptr.dtype.element_ty == tl.uint8
    if BLOCK_R > 0:
        offs_r, mask_r = C + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_R) < R
        q_rope = tl.load(  # [BLOCK_M, R]
            row_ptr + (offs_r * stride_q_w)[None, :],
            mask=mask_m[:, None] & mask_r[None, :],
            other=0.0,
        )

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if TOKEN_AXIS == 1:
        acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    else:
        acc = tl.zeros((BLOCK_C, BLOCK_M), tl.float32)

    for block in range(first, last):
        token = block * BLOCK_T + offs_t
        used = token < length
        if PAGE % BLOCK_T == 0:
            # A block lies within one page.
            page = tl.load(table_ptr + (block * BLOCK_T // PAGE).to(tl.int64) * stride_table_p)
        else:
            at = (token // PAGE).to(tl.int64) * stride_table_p
            page = tl.load(table_ptr + at, mask=used, other=0)
        # Rows that are not there become zeros: NaN in them would outlive a weight of 0.
        present = used & (page >= 0) & (page < num_pages)
        kv_row = page.to(tl.int64) * stride_kv_p + (token % PAGE).to(tl.int64) * stride_kv_t
        kv_row_ptr = kv_ptr + kv_row[:, None]
        k = tl.load(  # [BLOCK_T, C]
            kv_row_ptr + (offs_c * stride_kv_w)[None, :],
            mask=present[:, None] & mask_c[None, :],
            other=0,
        )
        if FP8:
            k = from_e4m3(k, q.dtype, ASSEMBLY)
            scale_ptr = (kv_ptr + (kv_row + C)).to(tl.pointer_type(tl.float32), bitcast=True)
            token_scale = tl.load(scale_ptr, mask=present, other=0.0) * CODE_UNIT  # [BLOCK_T]
            token_scale = tl.expand_dims(token_scale, 1 - TOKEN_AXIS)
        if TOKEN_AXIS == 1:
            score = tl.dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_T]
        else:
            score = tl.dot(k, tl.trans(q))  # [BLOCK_T, BLOCK_M]
        if FP8:
            score *= token_scale
        if BLOCK_R > 0:
            if FP8:
                rope_ptr = (kv_row_ptr + (C + 16)).to(tl.pointer_type(tl.bfloat16), bitcast=True)
                rope_ptr += (offs_r - C)[None, :]
            else:
                rope_ptr = kv_row_ptr + (offs_r * stride_kv_w)[None, :]
            k_rope = tl.load(  # [BLOCK_T, R]
                rope_ptr, mask=present[:, None] & mask_r[None, :], other=0.0
            ).to(q.dtype)
            if TOKEN_AXIS == 1:
                score = tl.dot(q_rope, tl.trans(k_rope), score)
            else:
                score = tl.dot(k_rope, tl.trans(q_rope), score)

        seen = tl.expand_dims(token, 1 - TOKEN_AXIS) < tl.expand_dims(limit, TOKEN_AXIS)
        score = tl.where(seen, score * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, TOKEN_AXIS))
        # A row that has seen nothing yet has the maximum -inf, which must not meet itself.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2((score - tl.expand_dims(base, TOKEN_AXIS)) * LOG2_E)
        fade = tl.exp2((top - base) * LOG2_E)
        total = total * fade + tl.sum(p, TOKEN_AXIS)
        top = new_top
        acc = acc * tl.expand_dims(fade, TOKEN_AXIS)
        if FP8:
            p *= token_scale  # only now: the total is of the weights alone
        if TOKEN_AXIS == 1:
            acc = tl.dot(p.to(k.dtype), k, acc)
        else:
            acc = tl.dot(tl.trans(k), p.to(k.dtype), acc)

    first_page = first * BLOCK_T // PAGE
    end_page = (tl.minimum(last * BLOCK_T, length) + PAGE - 1) // PAGE
    lost = any_page_lost(table_ptr, stride_table_p, first_page, end_page, num_pages, 256)
    norm = tl.where(total == 0, 0.0, 1.0 / total)
    norm = tl.where(lost, float("nan"), norm)
    lse = tl.where(total == 0, float("-inf"), top + tl.log(total))
    lse = tl.where(lost, float("nan"), lse)

    out_row = ((b * num_splits + split) * rows + offs_m) * C
    tl.store(
        out_ptr + tl.expand_dims(out_row, TOKEN_AXIS) + tl.expand_dims(offs_c, 1 - TOKEN_AXIS),
        (acc * tl.expand_dims(norm, TOKEN_AXIS)).to(out_ptr.dtype.element_ty),
        mask=tl.expand_dims(mask_m, TOKEN_AXIS) & tl.expand_dims(mask_c, 1 - TOKEN_AXIS),
    )
    tl.store(lse_ptr + (b * rows + offs_m) * num_splits + split, lse, mask=mask_m)
