"""First stage of `mla_decode` for sm_90, 33 to 64 query rows a tile, in Gluon.

Plain Triton tiles a dot that feeds another dot over rows alone, so that both warpgroups of a
program compute all scores of 64 rows. Here the layouts are named. A step of BLOCK_T tokens takes
two halves, each within one page and held once in shared memory for both products; at 128 tokens:

    scores [64, 128]  = q k^T      warps [4, 2]: warpgroup w has half w,         wgmma m64n64k16
    p [64, 128]       -> shared    both warpgroups need all of it
    acc [64, 512]    += p k        warps [4, 2]: warpgroup w has columns 256 w.., wgmma m64n256k16

A half is refilled by cp.async as soon as its part of p k is done, so that it loads during the other
half's. The rope part of q stays in registers.

Shared memory: k 128 KiB, its rope part 16, q 64, p 16: 229,376 B and what reductions need, of
232,448; one program per multiprocessor. 64 tokens a step are for calls of few tokens, which so
occupy twice the multiprocessors. cp.async moves 16 bytes, so pointers and strides must be
multiples of 16, which `fits` checks. Gluon changes with every Triton release: this is for
those versions of it that it was compiled with; `_mla_split` is for all others.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

C = gl.constexpr(512)
R = gl.constexpr(64)
ROWS = gl.constexpr(64)
WARPS = gl.constexpr(8)
LOG2_E = gl.constexpr(1.4426950408889634)
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16))
# Who copies what: a thread 16 bytes, a warp a quarter of 4 rows of k (of 4 rows of its rope part).
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [4, 2], [1, 0]))
COPY_ROPE = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16]))  # [64, 512]
PAGE_MULTIPLE = 64  # a half of the larger step


def fits(q_latent: Tensor, kv_cache: Tensor, kv_lora_rank: int) -> bool:
    """Whether the kernel is for these tensors: Kimi K2.5's widths, pages of 64 n, 16-byte rows."""
    width, page_size = q_latent.shape[3], kv_cache.shape[1]
    packed = q_latent.stride(3) == kv_cache.stride(2) == 1
    strides = (*q_latent.stride()[:3], *kv_cache.stride()[:2])
    aligned = q_latent.data_ptr() % 16 == kv_cache.data_ptr() % 16 == 0
    return (
        (width, kv_lora_rank, page_size % PAGE_MULTIPLE) == (C.value + R.value, C.value, 0)
        and packed
        and aligned
        and all(stride % 16 == 0 for stride in strides)
    )


@gluon.jit
def split_bounds(length, split, num_splits, min_blocks, BLOCK_T: gl.constexpr):
    """First and one past the last block of a split, as `_mla_split.split_bounds` has them."""
    blocks = (length + BLOCK_T - 1) // BLOCK_T
    per_split = gl.maximum((blocks + num_splits - 1) // num_splits, min_blocks)
    first = gl.minimum(split * per_split, blocks)
    return first, gl.minimum(first + per_split, blocks)


@gluon.jit
def query_rows(
    first, rows, heads, stride_q_s, stride_q_h, ROWS: gl.constexpr, layout: gl.constexpr
):
    """Offsets of query rows ``first ..``, and which of them there are."""
    row = first + gl.arange(0, ROWS, layout)
    s, h = row // heads, row % heads
    return s.to(gl.int64) * stride_q_s + h.to(gl.int64) * stride_q_h, row < rows


@gluon.jit
def load_tokens(
    k, k_rope, kv_ptr, table_ptr, half, end, num_pages, stride_kv_p, stride_table_p,
    STRIDE_KV_T: gl.constexpr, PAGE: gl.constexpr, COPY: gl.constexpr, COPY_ROPE: gl.constexpr,
):  # fmt: skip
    """Starts the copy of one half, all tokens that k [HALF, C] and k_rope [HALF, R] hold.

    Rows at or past ``end``, or of a page that is none, become zeros: NaN in them would outlive a
    weight of 0.
    """
    HALF: gl.constexpr = k.shape[0]
    first = half * HALF
    table_at = (first // PAGE).to(gl.int64) * stride_table_p
    page = gl.load(table_ptr + table_at, mask=first < end, other=0)
    left = gl.where((page >= 0) & (page < num_pages), end - first, 0)
    start = page.to(gl.int64) * stride_kv_p + (first % PAGE).to(gl.int64) * STRIDE_KV_T
    offs_t = gl.arange(0, HALF, gl.SliceLayout(1, COPY))
    offs_c = gl.arange(0, C, gl.SliceLayout(0, COPY))
    at_ptr = kv_ptr + start + (offs_t * STRIDE_KV_T)[:, None] + offs_c[None, :]
    async_copy.async_copy_global_to_shared(k, at_ptr, mask=(offs_t < left)[:, None])
    offs_t = gl.arange(0, HALF, gl.SliceLayout(1, COPY_ROPE))
    offs_r = C + gl.arange(0, R, gl.SliceLayout(0, COPY_ROPE))
    at_ptr = kv_ptr + start + (offs_t * STRIDE_KV_T)[:, None] + offs_r[None, :]
    async_copy.async_copy_global_to_shared(k_rope, at_ptr, mask=(offs_t < left)[:, None])
    async_copy.commit_group()


@gluon.jit
def any_page_lost(table_ptr, stride_p, first, end, num_pages, WARPS: gl.constexpr):
    """Whether one of the page ids ``first .. end - 1`` of a table row is no page of the cache."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    lost = gl.zeros([32 * WARPS], gl.int32, layout)
    for start in range(first, end, 32 * WARPS):
        offs_p = start + gl.arange(0, 32 * WARPS, layout)
        page = gl.load(table_ptr + offs_p.to(gl.int64) * stride_p, mask=offs_p < end, other=0)
        lost |= ((offs_p < end) & ((page < 0) | (page >= num_pages))).to(gl.int32)
    return gl.max(lost, 0) > 0


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
    BLOCK_T: gl.constexpr,
):
    HALF: gl.constexpr = BLOCK_T // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, HALF, 16])
    QUERY_ROPE: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    SHARED_P: gl.constexpr = gl.NVMMASharedLayout(2 * HALF, 16)  # so that a half can be cut out
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
    p_shared = gl.allocate_shared_memory(kv_ptr.dtype.element_ty, [ROWS, BLOCK_T], SHARED_P)
    k_0, k_1 = k.slice(0, HALF), k.slice(HALF, HALF)
    k_rope_0, k_rope_1 = k_rope.slice(0, HALF), k_rope.slice(HALF, HALF)

    q_ptr += b * stride_q_b
    at, there = query_rows(
        tile * ROWS, rows, heads, stride_q_s, stride_q_h, ROWS, gl.SliceLayout(1, COPY)
    )
    offs_c = gl.arange(0, C, gl.SliceLayout(0, COPY))
    async_copy.async_copy_global_to_shared(
        q, q_ptr + at[:, None] + offs_c[None, :], mask=there[:, None]
    )  # in the group of the first half
    load_tokens(k_0, k_rope_0, kv_ptr, table_ptr, 2 * first, end, num_pages,
                stride_kv_p, stride_table_p, STRIDE_KV_T, PAGE, COPY, COPY_ROPE)  # fmt: skip
    load_tokens(k_1, k_rope_1, kv_ptr, table_ptr, 2 * first + 1, end, num_pages,
                stride_kv_p, stride_table_p, STRIDE_KV_T, PAGE, COPY, COPY_ROPE)  # fmt: skip
    at, there = query_rows(
        tile * ROWS, rows, heads, stride_q_s, stride_q_h, ROWS, gl.SliceLayout(1, QUERY_ROPE)
    )
    offs_r = C + gl.arange(0, R, gl.SliceLayout(0, QUERY_ROPE))
    q_rope = gl.load(q_ptr + at[:, None] + offs_r[None, :], mask=there[:, None], other=0.0)

    # Row (s, h) sees this many tokens: the new ones after its own are hidden from it.
    row = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    limit = gl.where(row < rows, length - (new - 1 - row // heads), 0)
    offs_t = gl.arange(0, BLOCK_T, gl.SliceLayout(0, SCORES))
    top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
    acc = gl.zeros([ROWS, C], gl.float32, OUTPUT)
    for block in range(first, last):
        async_copy.wait_group(0)
        # cp.async wrote through the generic proxy, wgmma reads through the asynchronous one.
        fence_async_shared()
        gl.barrier()
        score = gl.zeros([ROWS, BLOCK_T], gl.float32, SCORES)
        score = warpgroup_mma(q_rope, k_rope.permute([1, 0]), score, use_acc=False, is_async=True)
        score = warpgroup_mma(q, k.permute([1, 0]), score, is_async=True)
        score = warpgroup_mma_wait(0, [score])
        seen = (block * BLOCK_T + offs_t)[None, :] < limit[:, None]
        score = gl.where(seen, score * scale, float("-inf"))
        new_top = gl.maximum(top, gl.max(score, 1))
        # A row that has seen nothing yet has the maximum -inf, which must not meet itself.
        base = gl.where(new_top == float("-inf"), 0.0, new_top)
        p = gl.exp2((score - base[:, None]) * LOG2_E)
        fade = gl.exp2((top - base) * LOG2_E)
        total = total * fade + gl.sum(p, 1)
        top = new_top
        p_shared.store(p.to(kv_ptr.dtype.element_ty))
        acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, OUTPUT))[:, None]
        fence_async_shared()
        gl.barrier()
        acc = warpgroup_mma(p_shared.slice(0, HALF, 1), k_0, acc, is_async=True)
        acc = warpgroup_mma(p_shared.slice(HALF, HALF, 1), k_1, acc, is_async=True)
        acc = warpgroup_mma_wait(1, [acc])
        gl.barrier()  # both warpgroups have read the first half
        load_tokens(k_0, k_rope_0, kv_ptr, table_ptr, 2 * block + 2, end, num_pages,
                     stride_kv_p, stride_table_p, STRIDE_KV_T, PAGE, COPY, COPY_ROPE)  # fmt: skip
        acc = warpgroup_mma_wait(0, [acc])
        gl.barrier()
        load_tokens(k_1, k_rope_1, kv_ptr, table_ptr, 2 * block + 3, end, num_pages,
                     stride_kv_p, stride_table_p, STRIDE_KV_T, PAGE, COPY, COPY_ROPE)  # fmt: skip
    async_copy.wait_group(0)

    # Here, where registers are free again: before the loop it spilled.
    first_page, end_page = first * BLOCK_T // PAGE, (end + PAGE - 1) // PAGE
    lost = any_page_lost(table_ptr, stride_table_p, first_page, end_page, num_pages, WARPS)
    norm = gl.where(total == 0, 0.0, 1.0 / total)
    norm = gl.convert_layout(gl.where(lost, float("nan"), norm), gl.SliceLayout(1, OUTPUT))
    lse = gl.where(total == 0, float("-inf"), top + gl.log(total))
    lse = gl.where(lost, float("nan"), lse)
    gl.store(lse_ptr + (b * rows + row) * num_splits + split, lse, mask=row < rows)
    row = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, OUTPUT))
    out_row = ((b * num_splits + split) * rows + row) * C
    offs_c = gl.arange(0, C, gl.SliceLayout(0, OUTPUT))
    gl.store(
        out_ptr + out_row[:, None] + offs_c[None, :],
        (acc * norm[:, None]).to(out_ptr.dtype.element_ty),
        mask=(row < rows)[:, None],
    )
