"""vLLM's kernels: its Marlin experts, Triton decode attention, norms, SwiGLU and merge.

The experts are repacked once, as vLLM does at load. Its attention is the one that runs on any GPU;
on Hopper it would take FlashMLA, which is a peer of its own. The fused norm writes its inputs: it
has copies, and the first run of each call is the one that compares.
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
from kimi_ops.bench.peers._experts import made_once, shared_expert

NAME = "vLLM"
WRITTEN_AGAINST = "vllm 0.33.0"
DEVICES = ("cuda",)
_GROUP = 32
_SPLITS = 8  # parts of the cached tokens, which the caller chooses


def missing(device: str) -> str | None:
    """Whether it is installed."""
    return None if find_spec("vllm") else "vllm is not installed: pip install vllm==0.33.0"


def _ops() -> Any:
    return import_module("vllm._custom_ops")


def _rms_norm(calls: Sequence[Args]) -> Prepared:
    norm = _ops().rms_norm

    def run(i: int) -> Tensor:
        x, weight, eps = calls[i]
        out = torch.empty_like(x)
        norm(out, x, weight, eps)
        return out

    return run


def _add_rms_norm(calls: Sequence[Args]) -> Prepared:
    norm = _ops().fused_add_rms_norm
    own = [(x.clone(), residual.clone()) for x, residual, *_ in calls]

    def run(i: int) -> tuple[Tensor, Tensor]:
        norm(*own[i], *calls[i][2:])
        return own[i]

    return run


def _silu_mul(calls: Sequence[Args]) -> Prepared:
    _ops()  # which loads them
    silu_and_mul: Any = torch.ops._C.silu_and_mul

    def run(i: int) -> Tensor:
        x: Tensor = calls[i][0]
        out = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
        silu_and_mul(out, x)
        return out

    return run


def _merge_attention(calls: Sequence[Args]) -> Prepared:
    if calls[0][0].dim() != 3:
        raise Declined("vLLM merges outputs [T, H, V] only")
    merge = _ops().merge_attn_states
    by_head = [(a, lse_a.T.contiguous(), b, lse_b.T.contiguous()) for a, lse_a, b, lse_b in calls]

    def run(i: int) -> Tensor:
        out = torch.empty_like(calls[i][0])
        merge(out, *by_head[i], output_lse=torch.empty_like(by_head[i][1]))
        return out

    return run


def _mla_decode(calls: Sequence[Args]) -> Prepared:
    if calls[0][0].shape[1] > 1:
        raise Declined("vLLM's Triton decode attention takes one new token per sequence")
    if calls[0][1].dtype == torch.uint8:
        raise Declined("vLLM has another fp8 cache: one scale for all tokens")
    decode = import_module("vllm.v1.attention.ops.triton_decode_attention").decode_attention_fwd

    def run(i: int) -> Tensor:
        q, cache, table, lengths, scale = calls[i][:5]
        rank = calls[i][5] if len(calls[i]) > 5 else 512
        batch, _, heads, _ = q.shape
        out: Tensor = q.new_empty((batch, heads, rank))
        lse = q.new_empty((batch, heads))
        parts = torch.empty((batch, heads, _SPLITS, rank + 1), device=q.device)
        keys = cache[:, :, None]
        decode(
            q[:, 0],
            keys,
            keys[..., :rank],
            out,
            lse,
            table,
            lengths,
            parts,
            _SPLITS,
            scale,
            page_size=cache.shape[1],
            is_mla=True,
        )
        return out[:, None]

    return run


def _repacked(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """From ``[E, N, K/8]`` and ``[E, N, K/32]``; Marlin starts from their transposes."""
    utils = import_module("vllm.model_executor.layers.quantization.utils.marlin_utils")
    experts, rows, groups = scale.shape
    columns = groups * _GROUP
    unordered = torch.empty((experts, 0), dtype=torch.int32, device=packed.device)
    weight = _ops().gptq_marlin_moe_repack(
        packed.transpose(1, 2).contiguous(), unordered, columns, rows, 4
    )
    scales = utils.marlin_moe_permute_scales(
        scale.transpose(1, 2).contiguous(), columns, rows, _GROUP
    )
    return weight, scales


def _moe_experts_int4(calls: Sequence[Args]) -> Prepared:
    if any(len(call) > 9 and call[9] for call in calls):
        raise Declined("a range of local experts would need vLLM's expert map")
    marlin = import_module("vllm.model_executor.layers.fused_moe.experts.marlin_moe")
    kind = import_module("vllm.scalar_type").scalar_types.uint4b8.id
    first = made_once(calls, 1, lambda call: _repacked(call[1], call[2]))
    second = made_once(calls, 3, lambda call: _repacked(call[3], call[4]))

    def run(i: int) -> Tensor:
        y: Tensor = marlin.fused_marlin_moe(
            hidden_states=calls[i][0],
            w1=first[i][0],
            w2=second[i][0],
            bias1=None,
            bias2=None,
            w1_scale=first[i][1],
            w2_scale=second[i][1],
            topk_weights=calls[i][5],
            topk_ids=calls[i][6],
            quant_type_id=kind,
        )
        shared = shared_expert(calls[i])
        return y if shared is None else y + shared

    return run


OPS: dict[str, Prepare] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "silu_mul": _silu_mul,
    "merge_attention": _merge_attention,
    "mla_decode": _mla_decode,
    "mla_decode_value": with_value(_mla_decode),
    "moe_experts_int4": _moe_experts_int4,
}
