"""SGLang's kernels: CUTLASS decode attention, the Kimi router, norms, SwiGLU and merge.

Its decode attention is for Blackwell data-centre GPUs and pads the heads to 128. The fused norm
writes its inputs: it has copies, and the first run of each call is the one that compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_ops.bench.case import Args
from kimi_ops.bench.peers import Declined, Prepare, Prepared
from kimi_ops.bench.peers._attention import with_value

NAME = "sgl-kernel"
WRITTEN_AGAINST = "sgl-kernel 0.3.21"
DEVICES = ("cuda",)
_SELECTION = (1, 1, 1.0, True)  # groups, groups kept, scale, normalised: the op's defaults


def missing(device: str) -> str | None:
    """Whether it is installed."""
    if find_spec("sgl_kernel") is None:
        return "sgl_kernel is not installed: pip install sgl-kernel==0.3.21"
    return None


def _library() -> Any:
    return import_module("sgl_kernel")


def _rms_norm(calls: Sequence[Args]) -> Prepared:
    norm = _library().rmsnorm
    return lambda i: norm(*calls[i])


def _add_rms_norm(calls: Sequence[Args]) -> Prepared:
    norm = _library().fused_add_rmsnorm
    own = [(x.clone(), residual.clone()) for x, residual, *_ in calls]

    def run(i: int) -> tuple[Tensor, Tensor]:
        norm(*own[i], *calls[i][2:])
        return own[i]

    return run


def _silu_mul(calls: Sequence[Args]) -> Prepared:
    silu_and_mul = _library().silu_and_mul
    return lambda i: silu_and_mul(calls[i][0])


def _merge_attention(calls: Sequence[Args]) -> Prepared:
    if calls[0][0].dim() != 3:
        raise Declined("sgl-kernel merges outputs [T, H, V] only")
    merge = _library().merge_state_v2
    return lambda i: merge(*calls[i])


def _moe_select(calls: Sequence[Args]) -> Prepared:
    if any(call[0].shape[1] != 384 or (*call[3:], 1, 1)[1] != 1 for call in calls):
        raise Declined("sgl-kernel's Kimi router is for 384 experts in one group")
    gate = _library().kimi_k2_moe_fused_gate

    def run(i: int) -> Any:
        logits, bias, top_k = calls[i][:3]
        selection: Any = (*calls[i][3:], *_SELECTION[len(calls[i]) - 3 :])
        _, _, scale, normalize = selection
        return gate(
            logits,
            bias,
            topk=top_k,
            renormalize=normalize,
            routed_scaling_factor=scale,
            apply_routed_scaling_factor_on_output=True,
        )

    return run


def _mla_decode(calls: Sequence[Args]) -> Prepared:
    q, cache = calls[0][:2]
    if torch.cuda.get_device_capability()[0] != 10:
        raise Declined("sgl-kernel's decode attention runs on sm_100 GPUs alone")
    if q.shape[1] > 1 or cache.dtype == torch.uint8 or cache.shape[2] != 576:
        raise Declined("sgl-kernel decodes one new token over a bfloat16 cache 576 wide only")
    library, page = _library(), cache.shape[1]
    # Its tiles of 128 tokens must end within the page table.
    step = max(1, 128 // page)
    tables = [F.pad(call[2], (0, -call[2].shape[1] % step)) for call in calls]
    longest = max(int(call[3].max()) for call in calls)
    size = library.cutlass_mla_get_workspace_size(longest, len(q))
    workspace = torch.empty(size, dtype=torch.uint8, device=q.device)

    def run(i: int) -> Tensor:
        q, cache, _, lengths, scale = calls[i][:5]
        out: Tensor = library.cutlass_mla_decode(
            q[:, 0, :, :512], q[:, 0, :, 512:], cache, lengths, tables[i], workspace, scale
        )
        return out[:, None]

    return run


OPS: dict[str, Prepare] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "silu_mul": _silu_mul,
    "merge_attention": _merge_attention,
    "moe_select": _moe_select,
    "mla_decode": _mla_decode,
    "mla_decode_value": with_value(_mla_decode),
}
