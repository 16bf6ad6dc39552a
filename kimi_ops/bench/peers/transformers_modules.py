"""The modules of transformers: DeepSeek-V3's, which are Kimi K2.5's, and its vision encoder's.

Experts have bfloat16 weights and the implementation that transformers takes by default, a grouped
product. Attention is that of its sdpa path, which pads no values. Its router leaves the chosen
experts unordered: the first run of each call puts them in the op's order and is the one that
compares, the others leave that out.

Left out are what has the form of `torch_eager` line by line (SwiGLU, attention of pictures) and
RoPE of pictures, which wants another order of the weights. It has no absorbed attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kimi_ops.bench.case import Args
from kimi_ops.bench.peers import Declined, Prepare, Prepared
from kimi_ops.bench.peers._attention import check_scores, hidden_keys, sizes, spans
from kimi_ops.bench.peers._experts import renumbered, shared_expert, wide_experts

NAME = "transformers"
WRITTEN_AGAINST = "transformers 5.23.0"
DEVICES = ("cpu", "cuda")
_SELECTION = (1, 1, 1.0, True)  # groups, groups kept, scale, normalised: the op's defaults


def missing(device: str) -> str | None:
    """Whether it is installed."""
    if find_spec("transformers") is None:
        return "transformers is not installed: pip install transformers==5.23.0"
    return None


def _modeling(model: str) -> Any:
    return import_module(f"transformers.models.{model}.modeling_{model}")


def _filled(module: Any, **values: Tensor) -> Any:
    """The module with its parameters and buffers replaced, without a gradient."""
    for name, value in values.items():
        buffer = name in dict(module.named_buffers())
        new = torch.nn.Buffer(value) if buffer else torch.nn.Parameter(value, requires_grad=False)
        setattr(module, name, new)
    return module.eval()


def _norm(weight: Tensor, eps: float) -> Any:
    return _filled(_modeling("deepseek_v3").DeepseekV3RMSNorm(len(weight), eps), weight=weight)


def _rms_norm(calls: Sequence[Args]) -> Prepared:
    norms = [_norm(*call[1:]) for call in calls]
    return lambda i: norms[i](calls[i][0])


def _add_rms_norm(calls: Sequence[Args]) -> Prepared:
    norms = [_norm(*call[2:]) for call in calls]

    def run(i: int) -> tuple[Tensor, Tensor]:
        h = calls[i][0] + calls[i][1]
        return norms[i](h), h

    return run


def _moe_route(calls: Sequence[Args]) -> Prepared:
    def router(call: Args) -> Any:
        selection: Any = (*call[3:], *_SELECTION[len(call) - 4 :])
        top_k, n_group, topk_group, scale, normalize = selection
        config = SimpleNamespace(
            num_experts_per_tok=top_k,
            num_local_experts=len(call[1]),
            hidden_size=call[1].shape[1],
            routed_scaling_factor=scale,
            n_group=n_group,
            topk_group=topk_group,
            norm_topk_prob=normalize,
        )
        empty = _modeling("deepseek_v3").DeepseekV3TopkRouter(config)
        return _filled(empty, weight=call[1], e_score_correction_bias=call[2])

    routers = [router(call) for call in calls]

    compared: set[int] = set()

    def run(i: int) -> Any:
        logits, weights, ids = routers[i](calls[i][0])
        if i in compared:
            return weights, ids
        compared.add(i)
        choice = logits.gather(1, ids).sigmoid() + calls[i][2][ids]
        order = choice.argsort(descending=True)
        return weights.gather(1, order), ids.gather(1, order)

    return run


def _moe_experts_int4(calls: Sequence[Args]) -> Prepared:
    chosen, gate_up, down = wide_experts(calls)
    count, hidden, wide = down.shape
    ids = renumbered(calls, chosen, elsewhere=count)
    modeling = _modeling("deepseek_v3")
    config = modeling.DeepseekV3Config(
        n_routed_experts=count, hidden_size=hidden, moe_intermediate_size=wide
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        empty = modeling.DeepseekV3Experts(config)
    module = _filled(empty, gate_up_proj=gate_up, down_proj=down)
    module._is_expert_parallel = any(bool((at == count).any()) for at in ids)

    def run(i: int) -> Tensor:
        y: Tensor = module(calls[i][0], ids[i], calls[i][5])
        shared = shared_expert(calls[i])
        return y if shared is None else y + shared

    return run


def _mla_prefill(calls: Sequence[Args]) -> Prepared:
    attend = import_module("transformers.integrations.sdpa_attention").sdpa_attention_forward
    segments = [spans(call[3], call[4]) for call in calls]
    causal = all(call[8] for call in calls if len(call) > 8)
    layer = torch.nn.Module()
    occurring = sizes(segments)
    device = calls[0][0].device
    if device.type == "cpu":  # where unequal widths have no fused kernel
        check_scores(calls[0][0].shape[1], occurring)
    masks = {
        (n, m): ~hidden_keys(n, m, device)[None, None] if causal and n != m else None
        for n, m in occurring
    }

    def run(i: int) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in calls[i][:3])
        parts = [
            attend(
                layer,
                q[:, :, q0:q1],
                k[:, :, k0:k1],
                v[:, :, k0:k1],
                masks[q1 - q0, k1 - k0],
                scaling=calls[i][7],
                is_causal=causal,
            )[0]
            for (q0, q1), (k0, k1) in segments[i]
        ]
        return torch.cat(parts, dim=1)[0]

    return run


def _vision_pos_embed(calls: Sequence[Args]) -> Prepared:
    modeling = _modeling("kimi_k25")

    def module(call: Args) -> Any:
        rows, columns, width = call[1].shape
        if rows != columns:
            raise Declined(f"transformers resamples square tables, this one is {rows} x {columns}")
        config = SimpleNamespace(
            hidden_size=width,
            pos_emb_height=rows,
            pos_emb_width=columns,
            pos_emb_time=int(call[2][:, 0].max()),
        )
        embeddings = modeling.Kimi_K25VisionPositionEmbeddings(config).to(call[0].device)
        return _filled(embeddings, position_embeddings=call[1])

    modules = [module(call) for call in calls]
    return lambda i: modules[i](calls[i][0], calls[i][2])


def _patch_merge(calls: Sequence[Args]) -> Prepared:
    modeling = _modeling("kimi_k25")

    def norm(weight: Tensor, bias: Tensor, eps: float) -> Any:
        return _filled(torch.nn.LayerNorm(len(weight), eps), weight=weight, bias=bias)

    if any(len(call[1][:, 0].unique()) > 1 for call in calls):
        raise Declined("transformers merges no clips of different lengths in one call")
    final = [norm(call[3], call[4], call[7]) for call in calls]
    pre = [norm(call[5], call[6], call[7]) for call in calls]
    indices = [modeling.get_vision_temporal_merge_index(call[1], 2, 2) for call in calls]

    def run(i: int) -> Tensor:
        x: Tensor = calls[i][0]
        pooled = final[i](x)[indices[i]].mean(dim=1)
        return pre[i](pooled).view(-1, 4 * x.shape[1])  # type: ignore[no-any-return]

    return run


OPS: dict[str, Prepare] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "mla_prefill": _mla_prefill,
    "moe_route": _moe_route,
    "moe_experts_int4": _moe_experts_int4,
    "vision_pos_embed": _vision_pos_embed,
    "patch_merge": _patch_merge,
}
