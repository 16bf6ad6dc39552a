"""FlashMLA's dense decode attention: Hopper alone, pages of 64, widths 576 and 512.

It plans in the first call for a set of lengths and keeps the plan, as an engine does for all layers
of a step. An fp8 cache is read by its sparse attention only.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kimi_ops.bench.case import Args
from kimi_ops.bench.peers import Declined, Prepare, Prepared
from kimi_ops.bench.peers._attention import with_value

NAME = "FlashMLA"
WRITTEN_AGAINST = "flash_mla 1.0.0 of April 2026"
DEVICES = ("cuda",)


def missing(device: str) -> str | None:
    """Whether it is installed, on a GPU that it has kernels for."""
    if find_spec("flash_mla") is None:
        return "flash_mla is not installed: build it from deepseek-ai/FlashMLA"
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
        return "FlashMLA's dense decode runs on Hopper GPUs (sm_90) alone"
    return None


def _mla_decode(calls: Sequence[Args]) -> Prepared:
    cache = calls[0][1]
    if cache.dtype == torch.uint8:
        raise Declined("FlashMLA reads an fp8 cache in sparse attention only")
    if cache.shape[1] != 64 or cache.shape[2] != 576:
        raise Declined(f"FlashMLA wants pages of 64 x 576, these are {list(cache.shape[1:])}")
    flash_mla: Any = import_module("flash_mla")
    plans = [flash_mla.get_mla_metadata()[0] for _ in calls]

    def run(i: int) -> tuple[Tensor, Tensor]:
        q, cache, table, lengths, scale = calls[i][:5]
        out, lse = flash_mla.flash_mla_with_kvcache(
            q,
            cache[:, :, None],
            table,
            lengths,
            head_dim_v=512,
            tile_scheduler_metadata=plans[i],
            softmax_scale=scale,
            causal=q.shape[1] > 1,
        )
        return out, lse.transpose(1, 2)

    return run


def _out_of(decode: Prepare) -> Prepare:
    def prepare(calls: Sequence[Args]) -> Prepared:
        run = decode(calls)
        return lambda i: run(i)[0]

    return prepare


OPS: dict[str, Prepare] = {
    "mla_decode": _mla_decode,
    "mla_decode_value": with_value(_out_of(_mla_decode)),
}
