"""FlashInfer: decode attention over latents with its own choice of kernel, norms, SwiGLU, merge.

Attention is planned once per set of lengths, as an engine does for all layers of a step. Its lse
are logarithms to base 2, so those of a merge are converted in ``prepare``. The fused norm writes
its inputs: it has copies, and the first run of each call is the one that compares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kimi_ops.bench.case import Args
from kimi_ops.bench.peers import Declined, Prepare, Prepared
from kimi_ops.bench.peers._attention import with_value

NAME = "FlashInfer"
WRITTEN_AGAINST = "flashinfer-python 0.7.2"
DEVICES = ("cuda",)
_WORKSPACE_BYTES = 128 << 20  # what it recommends


def missing(device: str) -> str | None:
    """Whether it is installed."""
    if find_spec("flashinfer") is None:
        return "flashinfer is not installed: pip install flashinfer-python==0.7.2"
    return None


def _library() -> Any:
    return import_module("flashinfer")


def _mla_decode(calls: Sequence[Args]) -> Prepared:
    q, cache = calls[0][:2]
    if cache.dtype == torch.uint8:
        raise Declined("FlashInfer has another fp8 cache: two tensors with one scale for all")
    rank = calls[0][5] if len(calls[0]) > 5 else 512
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)

    def planned(call: Args) -> Any:
        q, cache, table, lengths, scale = call[:5]
        batch, new, heads, width = q.shape
        page = cache.shape[1]
        pages = [-(-n // page) for n in lengths.tolist()]
        ends = torch.tensor([0, *pages]).cumsum(0).int()
        wrapper = _library().mla.BatchMLAPagedAttentionWrapper(workspace)
        wrapper.plan(
            qo_indptr=torch.arange(batch + 1, dtype=torch.int32, device=q.device) * new,
            kv_indptr=ends.to(q.device),
            kv_indices=torch.cat([row[:n] for row, n in zip(table, pages, strict=True)]),
            kv_len_arr=lengths,
            num_heads=heads,
            head_dim_ckv=rank,
            head_dim_kpe=width - rank,
            page_size=page,
            causal=new > 1,
            sm_scale=scale,
            q_data_type=q.dtype,
            kv_data_type=cache.dtype,
        )
        return wrapper

    wrappers = [planned(call) for call in calls]

    def run(i: int) -> Tensor:
        q, cache = calls[i][:2]
        rows = q.flatten(0, 1)
        out: Tensor = wrappers[i].run(
            q_nope=rows[..., :rank],
            q_pe=rows[..., rank:],
            ckv_cache=cache[..., :rank],
            kpe_cache=cache[..., rank:],
        )
        return out.view(*q.shape[:3], rank)

    return run


def _rms_norm(calls: Sequence[Args]) -> Prepared:
    norm = _library().norm.rmsnorm
    return lambda i: norm(*calls[i])


def _add_rms_norm(calls: Sequence[Args]) -> Prepared:
    norm = _library().norm.fused_add_rmsnorm
    own = [(x.clone(), residual.clone()) for x, residual, *_ in calls]

    def run(i: int) -> tuple[Tensor, Tensor]:
        norm(*own[i], *calls[i][2:])
        return own[i]

    return run


def _silu_mul(calls: Sequence[Args]) -> Prepared:
    silu_and_mul = _library().activation.silu_and_mul
    return lambda i: silu_and_mul(calls[i][0])


def _merge_attention(calls: Sequence[Args]) -> Prepared:
    if calls[0][0].dim() != 3:
        raise Declined("FlashInfer merges outputs [T, H, V] only")
    merge = _library().cascade.merge_state
    to_base_2 = 1 / math.log(2)
    own = [(a, lse_a * to_base_2, b, lse_b * to_base_2) for a, lse_a, b, lse_b in calls]
    return lambda i: merge(*own[i])[0]


OPS: dict[str, Prepare] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "silu_mul": _silu_mul,
    "merge_attention": _merge_attention,
    "mla_decode": _mla_decode,
    "mla_decode_value": with_value(_mla_decode),
}
