"""Calls of decode attention: shuffled pages of 64 tokens, every sequence equally long."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from kimi_ops.bench import Args, Maker, Work
from kimi_ops.bench.cases._sizes import PAGE, C, R
from kimi_ops.quant import latent_fp8

Sizes = tuple[int, int, int, int, bool]
Calls = Callable[..., Iterator[Args]]
# Batch, new tokens of a sequence, heads, cached tokens, fp8: an ordinary run, and the rest.
ORDINARY = (
    (1, 1, 64, 4096, False),
    (1, 1, 64, 32768, False),
    (1, 1, 16, 32768, False),
    (8, 1, 64, 4096, False),
    (1, 1, 64, 32768, True),
)
FULL = (
    *((1, 1, 64, length, False) for length in (131072, 262144)),
    *((1, 1, heads, 4096, False) for heads in (32, 16, 8, 4)),
    *((1, 1, heads, 32768, False) for heads in (32, 8, 4)),
    *((batch, 1, 64, 4096, False) for batch in (2, 4, 16, 32, 64)),
    (8, 4, 64, 4096, False),  # four tokens at once, as speculative decoding has them
    (8, 1, 64, 4096, True),
)


def queries_and_cache(
    new: Maker, batch: int, tokens: int, heads: int, length: int, fp8: bool
) -> Iterator[Args]:
    """q_latent, kv_cache, page_table, seq_lens."""
    own = -(-length // PAGE)
    lengths = new.ints([length] * batch)
    while True:
        cache = new.normal(batch * own, PAGE, C + R)
        if fp8:
            cache = encoded(cache)
        table = torch.randperm(batch * own, generator=new.generator).int().view(batch, own)
        yield new.normal(batch, tokens, heads, C + R), cache, table.to(new.device), lengths


def encoded(cache: torch.Tensor) -> torch.Tensor:
    """The same entries in the fp8 format."""
    if cache.device.type == "meta":
        entry = latent_fp8.entry_bytes(C, R)
        return torch.empty(*cache.shape[:2], entry, dtype=torch.uint8, device="meta")
    return latent_fp8.pack(cache, C)


def work(q: torch.Tensor, cache: torch.Tensor, lengths: torch.Tensor) -> Work:
    """Without what stands between the attention and its result."""
    _, tokens, heads, _ = q.shape
    cached = int(lengths.sum())
    entry = cache.shape[-1] * cache.element_size()
    pairs = cached * tokens * heads
    return Work(cached * entry + q.numel() * 2, 0, 2 * pairs * (C + R + C))


def name(batch: int, tokens: int, heads: int, length: int, fp8: bool) -> str:
    """Of a case."""
    new = f", {tokens} new tokens" if tokens > 1 else ""
    return f"batch {batch}{new}, {heads} heads, {length:,} cached" + ", fp8 cache" * fp8


def series(batch: int, tokens: int, heads: int, length: int, fp8: bool) -> tuple[str, int, str]:
    """Series, size and unit of a case."""
    new = f", {tokens} new tokens" if tokens > 1 else ""
    return f"batch {batch}{new}, {heads} heads" + ", fp8 cache" * fp8, length, "cached tokens"


def called(calls: Calls, sizes: Sizes, new: Maker) -> Iterator[Args]:
    """The calls of a case with these sizes."""
    return calls(new, *sizes)
