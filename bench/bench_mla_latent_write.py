"""Both norms, RoPE and the write into the paged cache, after the fused down-projection."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kimi_ops.bench import Args, BenchCase, Maker, Work
from kimi_ops.bench.case import size_of
from kimi_ops.bench.cases._sizes import DECODE, PAGE, PREFILL, Q_LORA, C, R, tokens_text
from kimi_ops.bench.pytest_case import benchmarks
from kimi_ops.quant import latent_fp8
from kimi_ops.testing.inputs.mla import inv_freq


def calls(new: Maker, tokens: int, fp8: bool) -> Iterator[Args]:
    norms = new.normal(Q_LORA), new.normal(C)
    pages = tokens // PAGE + 3
    entry = (latent_fp8.entry_bytes(C, R), torch.uint8) if fp8 else (C + R, torch.bfloat16)
    while True:
        cache = torch.zeros(pages, PAGE, entry[0], dtype=entry[1], device=new.device)
        slots = torch.randperm(pages * PAGE, generator=new.generator)[:tokens].int()
        positions = torch.arange(tokens, dtype=torch.int32)
        qkv_a = new.normal(tokens, Q_LORA + C + R)
        index = (positions.to(new.device), inv_freq(R).to(new.device), slots.to(new.device))
        yield qkv_a, *norms, *index, cache, 1e-5


def work(qkv_a: Tensor, *others: Any) -> Work:
    *norms, positions, freq, slots, cache, _ = others
    entry = cache.shape[-1] * cache.element_size()
    written = len(qkv_a) * (Q_LORA * qkv_a.element_size() + entry)
    return Work(size_of(qkv_a, *norms, positions, freq, slots), written)


CASES = [
    BenchCase(
        "mla_latent_write",
        tokens_text(t) + ", fp8 cache" * fp8,
        partial(calls, tokens=t, fp8=fp8),
        work,
        t not in (1, 64, 4096) or (fp8 and t != 4096),
        "fp8 cache" if fp8 else "bf16 cache",
        t,
        "tokens",
    )
    for fp8 in (False, True)
    for t in (*DECODE, *PREFILL)
]
test_mla_latent_write = benchmarks(CASES)
