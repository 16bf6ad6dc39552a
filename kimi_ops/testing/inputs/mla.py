"""Inputs of the attention ops of the language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kimi_ops.quant import latent_fp8
from kimi_ops.testing.inputs import DTYPE_NAMES, add, normal, strided

_SCALE = 0.1446796  # of Kimi K2.5: 192**-0.5 times the square of the YaRN factor
_INT32_MAX = 2**31 - 1
_ABSURD_PAGES = (-1, _INT32_MAX, -(2**31), 10**6)
BF16 = torch.bfloat16


def inv_freq(rope: int) -> Tensor:
    """``[R/2]`` float32 frequencies, from 1 radian per position down."""
    exponent = torch.arange(0, rope, 2, dtype=torch.float64) / max(rope, 1)
    return (50000.0**-exponent).float()


def positions(generator: torch.Generator, tokens: int) -> Tensor:
    """``[T]`` int32 over the whole context, both ends of it included."""
    at = torch.randint(0, 262144, (tokens,), generator=generator, dtype=torch.int32)
    at[:1], at[1:2] = 262143, 0
    return at


def mla_latent_write(
    generator: torch.Generator,
    tokens: int,
    widths: tuple[int, int, int] = (1536, 512, 64),
    page: int = 64,
    dtype: torch.dtype = BF16,
    wide: bool = False,
    fp8: bool = False,
    tiny: bool = False,
) -> tuple[Any, ...]:
    """Shuffled slots, some of them -1, absurd or past the end; the cache full of NaN.

    With an ``fp8`` cache token 0 has a latent of zeros, 2 and 5 one that is not finite; ``tiny``
    makes the latents so small that their scale would be subnormal.
    """
    q, c, r = widths
    pages = tokens // page + 3
    qkv_a = normal(generator, tokens, q + c + r, dtype=dtype)
    slots = torch.randperm(pages * page, generator=generator)[:tokens]
    if tokens > 4:
        slots[1], slots[3], slots[4] = -1, pages * page, -7
    cache = torch.full((pages, page, c + r), torch.nan, dtype=dtype)
    cache[0] = 3.0
    if fp8:
        qkv_a[:1, q : q + c] = 0
        qkv_a[2:3, q] = torch.nan
        qkv_a[5:6, q + 1] = torch.inf
        cache = torch.full((pages, page, latent_fp8.entry_bytes(c, r)), 255, dtype=torch.uint8)
        cache[0] = 3
    return (
        strided(qkv_a) if wide else qkv_a,
        normal(generator, q, dtype=dtype),
        normal(generator, c, dtype=dtype, std=1e-36 if tiny else 1.0),
        positions(generator, tokens),
        inv_freq(r),
        slots if wide else slots.int(),
        cache,
        1e-5,
    )


def mla_absorb_query(
    generator: torch.Generator,
    tokens: int,
    heads: int,
    widths: tuple[int, int, int] = (128, 64, 512),
    dtype: torch.dtype = BF16,
) -> tuple[Any, ...]:
    """Queries as a slice of wider rows, the weight as the key rows of ``kv_b_proj``."""
    n, r, c = widths
    kv_b = normal(generator, heads, n + 2, c, dtype=dtype, std=n**-0.5)
    q = strided(normal(generator, tokens, heads, n + r, dtype=dtype))
    at = positions(generator, tokens)
    return q, kv_b[:, :n], at.long() if tokens % 2 else at, inv_freq(r)


def mla_decode(
    generator: torch.Generator,
    lengths: tuple[int, ...],
    heads: int,
    new: int = 1,
    page: int = 64,
    widths: tuple[int, int] = (512, 64),
    dtype: torch.dtype = BF16,
    large: bool = False,
    lost: bool = False,
    table_pages: int = 0,
    fp8: bool = False,
) -> tuple[Any, ...]:
    """Sequences in shuffled pages; NaN past each length, absurd ids past each last page.

    ``table_pages`` widens the page table as an engine does that sizes it for the longest context;
    ``large`` makes scores of several hundred, where a softmax without its maximum overflows;
    ``lost`` puts an absurd id into the used part of the last sequence's table. In an ``fp8`` cache
    the scales of neighbours differ by powers of 2, some latents are zeros, and the copies of the
    scale that a kernel must not need are NaN.
    """
    c, r = widths
    batch = len(lengths)
    max_pages = max(1, *((n + page - 1) // page for n in lengths)) + 2
    cache = torch.full((batch * max_pages + 1, page, c + r), torch.nan, dtype=dtype)
    if fp8:
        width = latent_fp8.entry_bytes(c, r)
        cache = torch.full((*cache.shape[:2], width), 255, dtype=torch.uint8)
    ids = torch.randperm(len(cache), generator=generator).tolist()
    columns = max(max_pages, table_pages)
    table = torch.tensor(_ABSURD_PAGES * (batch * columns), dtype=torch.int32)
    table = table[: batch * columns].view(batch, columns).clone()
    for b, length in enumerate(lengths):
        for first in range(0, max(length, 0), page):
            table[b, first // page] = ids.pop()
            count = min(page, length - first)
            values = normal(generator, count, c + r, dtype=dtype, std=4.0 if large else 1.0)
            if fp8:
                values[:, :c] *= torch.exp2((torch.arange(count) + b) % 4 - 2.0)[:, None].to(dtype)
                values[5::16, :c] = 0
                values = latent_fp8.pack(values, c)
                values[:, c + 4 : c + latent_fp8.SCALE_BYTES] = 255
            cache[table[b, first // page], :count] = values
    if lost:
        table[-1, 0] = len(cache)
    q = normal(generator, batch, new, heads, c + r, dtype=dtype, std=4.0 if large else 0.25)
    return q, cache, table, torch.tensor(lengths, dtype=torch.int32), _SCALE, c


def mla_decode_value(
    generator: torch.Generator, lengths: tuple[int, ...], heads: int, value: int = 128, **kind: Any
) -> tuple[Any, ...]:
    """As `mla_decode`; the weight as the value rows of ``kv_b_proj``."""
    q, cache, table, lens, scale, c = mla_decode(generator, lengths, heads, **kind)
    kv_b = normal(generator, heads, value + 3, c, dtype=q.dtype, std=c**-0.5)
    return q, cache, table, lens, kv_b[:, 3:], scale, c


def mla_project_value(
    generator: torch.Generator,
    tokens: int,
    heads: int,
    widths: tuple[int, int] = (128, 512),
    dtype: torch.dtype = BF16,
) -> tuple[Any, ...]:
    """The weight as the value rows of ``kv_b_proj``."""
    v, c = widths
    kv_b = normal(generator, heads, v + 3, c, dtype=dtype, std=c**-0.5)
    return normal(generator, tokens, heads, c, dtype=dtype), kv_b[:, 3:]


def mla_prefill(
    generator: torch.Generator,
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    heads: int,
    widths: tuple[int, int] = (192, 128),
    dtype: torch.dtype = BF16,
    causal: bool = True,
    padding: int = 0,
    slack: int = 0,
) -> tuple[Any, ...]:
    """Packed sequences, ``padding`` rows of NaN behind the last one of each tensor.

    ``slack`` is how much larger than need be ``max_seqlen`` is.
    """

    def packed(lengths: tuple[int, ...], width: int) -> Tensor:
        x = normal(generator, sum(lengths) + padding, heads, width, dtype=dtype)
        x[sum(lengths) :] = torch.nan
        return x

    def offsets(lengths: tuple[int, ...]) -> Tensor:
        return torch.tensor((0, *lengths)).cumsum(0).int()

    w, v = widths
    return (
        packed(queries, w),
        packed(keys, w),
        packed(keys, v),
        offsets(queries),
        offsets(keys),
        max(queries) + slack,
        max(keys) + slack,
        w**-0.5,
        causal,
    )


def merge_attention(
    generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype = BF16
) -> tuple[Any, ...]:
    """Sides without keys (lse -inf, out NaN) on the left, on the right and on both."""
    out_a, out_b = normal(generator, *shape, dtype=dtype), normal(generator, *shape, dtype=dtype)
    lse_a = normal(generator, *shape[:-1], dtype=torch.float32, std=30)
    lse_b = normal(generator, *shape[:-1], dtype=torch.float32, std=30)
    for rows, sides in ((slice(0, 1), "a"), (slice(1, 2), "b"), (slice(2, 3), "ab")):
        for side, out, lse in (("a", out_a, lse_a), ("b", out_b, lse_b)):
            if side in sides:
                out[rows], lse[rows] = torch.nan, -torch.inf
    return out_a, lse_a, out_b, lse_b


for _dtype, _name in DTYPE_NAMES.items():
    add("mla_latent_write", f"{_name}-9", mla_latent_write, tokens=9, dtype=_dtype)
    add("mla_absorb_query", f"{_name}-3x8", mla_absorb_query, tokens=3, heads=8, dtype=_dtype)
    add("mla_decode", f"{_name}-h8", mla_decode, lengths=(65, 0, 130, 1), heads=8, dtype=_dtype)
    add("mla_decode_value", f"{_name}-h8", mla_decode_value, lengths=(65, 0, 130), heads=8,
        dtype=_dtype)  # fmt: skip
    add("mla_project_value", f"{_name}-5x8", mla_project_value, tokens=5, heads=8, dtype=_dtype)
    add(
        "mla_prefill",
        f"{_name}-h2",
        mla_prefill,
        queries=(65, 0, 3, 1),
        keys=(65, 4, 70, 1),
        heads=2,
        dtype=_dtype,
    )
    add("merge_attention", f"{_name}-17x4", merge_attention, shape=(17, 4, 128), dtype=_dtype)

add("mla_latent_write", "bf16-none", mla_latent_write, tokens=0)
add("mla_latent_write", "bf16-one", mla_latent_write, tokens=1)
add("mla_latent_write", "bf16-page-1-strided", mla_latent_write, tokens=33, page=1, wide=True)
add("mla_latent_write", "bf16-page-7", mla_latent_write, tokens=64, page=7)
add("mla_latent_write", "bf16-small", mla_latent_write, tokens=65, widths=(96, 32, 16), page=16)
add("mla_latent_write", "bf16-1024", mla_latent_write, tokens=1024, full=True)
add("mla_absorb_query", "bf16-none", mla_absorb_query, tokens=0, heads=4)
add("mla_absorb_query", "bf16-1x64", mla_absorb_query, tokens=1, heads=64)
add("mla_absorb_query", "bf16-17x3", mla_absorb_query, tokens=17, heads=3)
add("mla_absorb_query", "bf16-small", mla_absorb_query, tokens=5, heads=4, widths=(16, 8, 32))
add("mla_absorb_query", "bf16-65x64", mla_absorb_query, tokens=65, heads=64, full=True)
add("mla_decode", "bf16-h64", mla_decode, lengths=(1025, 64), heads=64,
    work=1 << 18)  # fmt: skip
add("mla_decode", "bf16-h1", mla_decode, lengths=(63,), heads=1)
add("mla_decode", "bf16-h16-s4", mla_decode, lengths=(200, 4, 3, 2, 0), heads=16, new=4,
    work=1 << 17)  # fmt: skip
add("mla_decode", "bf16-h32-s2-page-16", mla_decode, lengths=(129, 17), heads=32, new=2, page=16)
add("mla_decode", "bf16-h5-page-1", mla_decode, lengths=(33, 2), heads=5, page=1)
add("mla_decode", "bf16-h8-page-7-s16", mla_decode, lengths=(50, 16), heads=8, page=7, new=16)
add("mla_decode", "bf16-large-scores", mla_decode, lengths=(300,), heads=8, large=True)
add("mla_decode", "bf16-lost-page", mla_decode, lengths=(70, 70), heads=8, lost=True)
add("mla_decode", "bf16-negative-length", mla_decode, lengths=(-3, 5), heads=8)
add("mla_decode", "bf16-small", mla_decode, lengths=(40, 9), heads=4, widths=(32, 16), page=8)
add("mla_decode", "bf16-none", mla_decode, lengths=(0,), heads=8)
add("mla_decode", "bf16-h128", mla_decode, lengths=(4097,), heads=128, full=True)
add("mla_decode", "bf16-h64-32k", mla_decode, lengths=(32768,), heads=64, full=True)
_V = mla_decode_value
add("mla_decode_value", "bf16-h64", _V, lengths=(300,), heads=64, full=True)
add("mla_decode_value", "bf16-h3-s2", _V, lengths=(70, 2), heads=3, new=2,
    work=1 << 18)  # fmt: skip
add("mla_decode_value", "bf16-small", _V, lengths=(40, 9), heads=4, value=24, widths=(32, 16),
    page=8)  # fmt: skip
add("mla_decode_value", "bf16-small-long", _V, lengths=(2047, 0, 4100), heads=2, value=16,
    widths=(32, 16))  # fmt: skip
add("mla_decode_value", "bf16-lost-page", _V, lengths=(70, 70), heads=2, value=40, lost=True)
add("mla_decode_value", "bf16-nothing", _V, lengths=(0, -3), heads=4, value=16, widths=(32, 16))
add("mla_decode_value", "bf16-many", _V, lengths=(5, 1, 0, 40) * 5, heads=3, value=16,
    widths=(32, 16), page=8)  # fmt: skip
add("mla_decode_value", "bf16-8k", _V, lengths=(8192, 8000), heads=16, full=True)
add("mla_project_value", "bf16-none", mla_project_value, tokens=0, heads=4)
add("mla_project_value", "bf16-1x64", mla_project_value, tokens=1, heads=64)
add("mla_project_value", "bf16-17x3", mla_project_value, tokens=17, heads=3)
add("mla_project_value", "bf16-small", mla_project_value, tokens=5, heads=4, widths=(16, 32))
add("mla_project_value", "bf16-65x64", mla_project_value, tokens=65, heads=64, full=True)
_P = mla_prefill
add("mla_prefill", "bf16-longer-keys", _P, queries=(5, 64), keys=(200, 64), heads=3)
add("mla_prefill", "bf16-longer-queries", _P, queries=(40,), keys=(7,), heads=2)
add("mla_prefill", "bf16-all-keys", _P, queries=(5, 64), keys=(127, 65), heads=2, causal=False)
add("mla_prefill", "bf16-padding", _P, queries=(33,), keys=(33,), heads=2, padding=31)
add("mla_prefill", "bf16-empty", _P, queries=(0,), keys=(0,), heads=2)
add("mla_prefill", "bf16-small", _P, queries=(9, 20), keys=(9, 31), heads=4, widths=(24, 16))
add("mla_prefill", "bf16-h64", _P, queries=(129,), keys=(257,), heads=64, full=True)
add("mla_latent_write", "bf16-257-small", mla_latent_write, tokens=257, widths=(96, 32, 16))
add("mla_absorb_query", "bf16-257-small", mla_absorb_query, tokens=257, heads=2,
    widths=(16, 8, 32))  # fmt: skip
add("mla_absorb_query", "bf16-130x2", mla_absorb_query, tokens=130, heads=2)
add("mla_project_value", "bf16-257-small", mla_project_value, tokens=257, heads=2, widths=(16, 32))
add("mla_project_value", "bf16-130x2", mla_project_value, tokens=130, heads=2)
add("mla_decode", "bf16-h8-2100", mla_decode, lengths=(2100, 17), heads=8)
add("mla_decode", "bf16-small-long", mla_decode, lengths=(2047, 2049, 4100), heads=2,
    widths=(32, 16))  # fmt: skip
add("mla_decode", "bf16-small-wide-table", mla_decode, lengths=(5, 0, 70), heads=4, widths=(32, 16),
    table_pages=4096)  # fmt: skip
add("mla_prefill", "bf16-300-small", _P, queries=(129, 300), keys=(257, 300), heads=2,
    widths=(24, 16), slack=50)  # fmt: skip
add("mla_prefill", "bf16-300", _P, queries=(130, 1), keys=(300, 258), heads=1)
add("merge_attention", "bf16-3d", merge_attention, shape=(5, 129, 64))
add("merge_attention", "bf16-one", merge_attention, shape=(4, 1))
_W, _D = mla_latent_write, mla_decode
for _dtype, _name in DTYPE_NAMES.items():
    add("mla_latent_write", f"fp8-{_name}-9", _W, tokens=9, dtype=_dtype, fp8=True)
    add("mla_decode", f"fp8-{_name}-h8", _D, lengths=(65, 0, 33), heads=8, dtype=_dtype, fp8=True,
        work=1 << 17)  # fmt: skip
add("mla_latent_write", "fp8-page-1-strided", _W, tokens=33, page=1, wide=True, fp8=True)
add("mla_latent_write", "fp8-small", _W, tokens=65, widths=(96, 32, 16), page=7, fp8=True)
add("mla_latent_write", "fp8-tiny", _W, tokens=7, widths=(96, 32, 16), page=4, fp8=True, tiny=True)
add("mla_latent_write", "fp8-1024", _W, tokens=1024, fp8=True, full=True)
add("mla_decode", "fp8-h64", _D, lengths=(130, 64), heads=64, fp8=True, work=1 << 18)
add("mla_decode", "fp8-h16-s4", _D, lengths=(70, 4, 2), heads=16, new=4, fp8=True)
add("mla_decode", "fp8-h32-page-16", _D, lengths=(129, 17), heads=32, page=16, fp8=True)
add("mla_decode", "fp8-h5-page-1", _D, lengths=(33, 2), heads=5, page=1, fp8=True)
add("mla_decode", "fp8-large-scores", _D, lengths=(150,), heads=8, large=True, fp8=True)
add("mla_decode", "fp8-lost-page", _D, lengths=(70, 70), heads=8, lost=True, fp8=True)
add("mla_decode", "fp8-small", _D, lengths=(40, 9), heads=4, widths=(32, 16), page=7, fp8=True)
add("mla_decode", "fp8-small-long", _D, lengths=(600, 517), heads=2, widths=(32, 16), fp8=True)
add("mla_decode", "fp8-h128", _D, lengths=(4097,), heads=128, fp8=True, full=True)
