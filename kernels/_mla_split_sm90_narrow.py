"""First stage of `mla_decode` for sm_90, up to 16 query rows a tile, in Gluon.

The tokens and the latent columns are on the side of the products that wgmma wants 64 wide, and the
query rows on its narrow one. A block of 64 tokens, within one page, is held once:

    scores [64, 16]   = k q^T      wgmma m64n16k16, k as it lies
    acc [512, 16]    += k^T p      wgmma m64n16k16, k as a transposed view, 8 times 64 columns

Shared memory: k 64 KiB, its rope part 8, q 18, p 2: two programs per multiprocessor, of which one
loads while the other computes, so one buffer is enough. Plain Triton keeps two buffers and one
program of four warps, and with them too little in flight.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kimi_ops.kernels._mla_split_sm90 import (
    LOG2_E,
    SHARED,
    C,
    R,
    any_page_lost,
    load_tokens,
    query_rows,
    split_bounds,
)

ROWS = gl.constexpr(16)
WARPS = gl.constexpr(4)
SHARED_P = gl.constexpr(gl.NVMMASharedLayout(32, 16))
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [2, 2], [1, 0]))
COPY_ROPE = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
PRODUCT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16]))


@gluon.jit
def mla_decode_split_sm90_kernel(
    q_ptr,  # [B, S, H, C+R]
    kv_ptr,  # [num_pages, PAGE, C+R]
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
    stride_kv_p,
    stride_table_b,
    stride_table_p,
    stride_length_b,
    STRIDE_KV_T: gl.constexpr,  # known, so that a row's address costs no register
    PAGE: gl.constexpr,
    BLOCK_T: gl.constexpr,  # 64
):
    rows = new * heads
    row_tiles = (rows + ROWS - 1) // ROWS
    tile = gl.program_id(0) % row_tiles
    split = gl.program_id(0) // row_tiles % num_splits
    b = (gl.program_id(0) // row_tiles // num_splits).to(gl.int64)

    length = gl.load(length_ptr + b * stride_length_b)
    length = gl.minimum(gl.maximum(length, 0), capacity)
    first, last = split_bounds(length, split, num_splits, min_blocks, BLOCK_T)
    if (first == last) & (num_splits > 1):
        return  # the second stage does not read what a split without blocks would write
    end = gl.minimum(length, last * BLOCK_T)
    table_ptr += b * stride_table_b

    k = gl.allocate_shared_memory(kv_ptr.dtype.element_ty, [BLOCK_T, C], SHARED)
    k_rope = gl.allocate_shared_memory(kv_ptr.dtype.element_ty, [BLOCK_T, R], SHARED)
    q = gl.allocate_shared_memory(kv_ptr.dtype.element_ty, [ROWS, C], SHARED)
    q_rope = gl.allocate_shared_memory(kv_ptr.dtype.element_ty, [ROWS, R], SHARED)
    p_shared = gl.allocate_shared_memory(kv_ptr.dtype.element_ty, [BLOCK_T, ROWS], SHARED_P)

    q_ptr += b * stride_q_b
    at, there = query_rows(
        tile * ROWS, rows, heads, stride_q_s, stride_q_h, ROWS, gl.SliceLayout(1, COPY)
    )
    at_ptr = q_ptr + at[:, None] + gl.arange(0, C, gl.SliceLayout(0, COPY))[None, :]
    async_copy.async_copy_global_to_shared(q, at_ptr, mask=there[:, None])
    at, there = query_rows(
        tile * ROWS, rows, heads, stride_q_s, stride_q_h, ROWS, gl.SliceLayout(1, COPY_ROPE)
    )
    at_ptr = q_ptr + at[:, None] + (C + gl.arange(0, R, gl.SliceLayout(0, COPY_ROPE)))[None, :]
    async_copy.async_copy_global_to_shared(q_rope, at_ptr, mask=there[:, None])
    load_tokens(k, k_rope, kv_ptr, table_ptr, first, end, num_pages,
                stride_kv_p, stride_table_p, STRIDE_KV_T, PAGE, COPY, COPY_ROPE)  # fmt: skip

    # While the copies are on their way.
    first_page, end_page = first * BLOCK_T // PAGE, (end + PAGE - 1) // PAGE
    lost = any_page_lost(table_ptr, stride_table_p, first_page, end_page, num_pages, WARPS)

    # Row (s, h) sees this many tokens: the new ones after its own are hidden from it.
    row = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, PRODUCT))
    limit = gl.where(row < rows, length - (new - 1 - row // heads), 0)
    offs_t = gl.arange(0, BLOCK_T, gl.SliceLayout(1, PRODUCT))
    top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(0, PRODUCT))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(0, PRODUCT))
    acc = gl.zeros([C, ROWS], gl.float32, PRODUCT)
    for block in range(first, last):
        async_copy.wait_group(0)
        # cp.async wrote through the generic proxy, wgmma reads through the asynchronous one.
        fence_async_shared()
        gl.barrier()
        score = gl.zeros([BLOCK_T, ROWS], gl.float32, PRODUCT)
        score = warpgroup_mma(k_rope, q_rope.permute([1, 0]), score, use_acc=False, is_async=True)
        score = warpgroup_mma(k, q.permute([1, 0]), score, is_async=True)
        score = warpgroup_mma_wait(0, [score])
        seen = (block * BLOCK_T + offs_t)[:, None] < limit[None, :]
        score = gl.where(seen, score * scale, float("-inf"))
        new_top = gl.maximum(top, gl.max(score, 0))
        # A row that has seen nothing yet has the maximum -inf, which must not meet itself.
        base = gl.where(new_top == float("-inf"), 0.0, new_top)
        p = gl.exp2((score - base[None, :]) * LOG2_E)
        fade = gl.exp2((top - base) * LOG2_E)
        total = total * fade + gl.sum(p, 0)
        top = new_top
        p_shared.store(p.to(kv_ptr.dtype.element_ty))
        acc = acc * fade[None, :]
        fence_async_shared()
        gl.barrier()
        acc = warpgroup_mma(k.permute([1, 0]), p_shared, acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])
        gl.barrier()  # all four warps have read the block
        load_tokens(k, k_rope, kv_ptr, table_ptr, block + 1, end, num_pages,
                    stride_kv_p, stride_table_p, STRIDE_KV_T, PAGE, COPY, COPY_ROPE)  # fmt: skip
    async_copy.wait_group(0)
    norm = gl.where(total == 0, 0.0, 1.0 / total)
    norm = gl.where(lost, float("nan"), norm)
    lse = gl.where(total == 0, float("-inf"), top + gl.log(total))
    lse = gl.where(lost, float("nan"), lse)
    gl.store(lse_ptr + (b * rows + row) * num_splits + split, lse, mask=row < rows)
    out_row = ((b * num_splits + split) * rows + row) * C
    offs_c = gl.arange(0, C, gl.SliceLayout(1, PRODUCT))
    gl.store(
        out_ptr + out_row[None, :] + offs_c[:, None],
        (acc * norm[None, :]).to(out_ptr.dtype.element_ty),
        mask=(row < rows)[None, :],
    )
