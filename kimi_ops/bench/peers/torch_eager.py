"""Plain torch: what a user would write, in the dtype of the arguments, without a compiler.

Of two ordinary forms the faster one stands here (CPU, one thread, bfloat16): the chain for RMSNorm
takes a fifth of the time of torch's own function, which is fused on a GPU alone; complex numbers
rotate six times as fast as the four products written out; ``lerp`` in bfloat16 merges 35 times as
fast as in float32, and 20 times as fast as products and a sum.

What an engine knows on the host stays there: lengths, offsets and grids are read in ``prepare``.
int4 weights are made bfloat16 ones once: this is the row "torch with bf16 weights". Attention
multiplies, takes the softmax and multiplies; `torch_sdpa` has torch's fused form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_ops.bench.case import Args, size_of
from kimi_ops.bench.peers import Prepare, Prepared
from kimi_ops.bench.peers._attention import (
    Span,
    check_scores,
    hidden_keys,
    latent_attention,
    projection,
    sizes,
    spans,
    with_value,
)
from kimi_ops.bench.peers._experts import (
    check_copy,
    expert_loop,
    made_once,
    silu_mul,
    wide_experts,
)
from kimi_ops.quant import latent_fp8
from kimi_ops.quant.int4 import dequantize

NAME = "torch eager"
WRITTEN_AGAINST = "torch 2.13.0"
DEVICES = ("cpu", "cuda")
Grids = list[list[int]]


def missing(device: str) -> str | None:
    """Torch is always there."""
    return None


def each_call(function: Callable[..., Any]) -> Prepare:
    """``prepare`` of a function that takes the op's arguments as they are."""
    return lambda calls: lambda i: function(*calls[i])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the op."""
    if x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = x.float()
    return weight * (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As the op."""
    h = x + residual
    return rms_norm(h, weight, eps), h


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """As the op, but for sides without keys that hold NaN."""
    share = torch.sigmoid(lse_a - lse_b)[..., None].to(out_a.dtype)
    return torch.lerp(out_b, out_a, share), torch.logaddexp(lse_a, lse_b)


def turns(positions: Iterable[Tensor], inv_freq: Tensor) -> Tensor:
    """``[largest position + 1, R/2]`` complex: the table of RoPE that a model makes at load."""
    last = max((int(at.max()) for at in positions if len(at)), default=0)
    angle = torch.arange(last + 1, device=inv_freq.device)[:, None] * inv_freq
    return torch.polar(torch.ones_like(angle), angle)


def _turn(x: Tensor, by: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * by).flatten(-2).to(x.dtype)


def _mla_latent_write(calls: Sequence[Args]) -> Prepared:
    table = turns((call[3] for call in calls), calls[0][4])
    padded = any(bool((call[5] < 0).any()) for call in calls)

    def run(i: int) -> Tensor:
        qkv_a, q_weight, kv_weight, positions, _, slots, cache, eps = calls[i]
        rank = len(kv_weight)
        q, latent, key = qkv_a.split((len(q_weight), rank, 2 * table.shape[1]), dim=1)
        rms_norm(q, q_weight, eps)  # the op's result; what is compared is the cache
        entry = torch.cat((rms_norm(latent, kv_weight, eps), _turn(key, table[positions])), dim=1)
        if cache.dtype == torch.uint8:
            entry = latent_fp8.pack(entry, rank)
        if padded:
            entry, slots = entry[slots >= 0], slots[slots >= 0]
        cache.view(-1, cache.shape[2]).index_copy_(0, slots.long(), entry)
        return cache  # type: ignore[no-any-return]

    return run


def _mla_absorb_query(calls: Sequence[Args]) -> Prepared:
    table = turns((call[2] for call in calls), calls[0][3])
    weights = made_once(calls, 1, lambda call: call[1].contiguous())

    def run(i: int) -> Tensor:
        q, _, positions, _ = calls[i]
        nope, rope = q.split((weights[i].shape[1], 2 * table.shape[1]), dim=2)
        absorbed = torch.bmm(nope.transpose(0, 1), weights[i]).transpose(0, 1)
        return torch.cat((absorbed, _turn(rope, table[positions][:, None])), dim=2)

    return run


def _attend_latent(q: Tensor, kv: Tensor, scale: float, rank: int) -> Tensor:
    kv = kv.squeeze(0)  # of one sequence: two plain matrix products
    score = (q.flatten(1, 2).squeeze(0) @ kv.mT).float().mul_(scale)
    if q.shape[1] > 1:
        hidden = hidden_keys(q.shape[1], kv.shape[-2], q.device)
        by_head = score.view(*q.shape[:3], -1)
        by_head.masked_fill_(hidden[:, None], -torch.inf)
    out = score.softmax(-1).to(q.dtype) @ kv[..., :rank]
    return out.view(*q.shape[:3], rank)


def _mla_project_value(calls: Sequence[Args]) -> Prepared:
    project = projection(calls, 1)
    return lambda i: project(i, calls[i][0])


def _mla_decode(calls: Sequence[Args]) -> Prepared:
    return latent_attention(calls, _attend_latent)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    score = (q @ k.mT).float().mul_(scale)
    if hidden is not None:
        score.masked_fill_(hidden, -torch.inf)
    return (score.softmax(-1).to(v.dtype) @ v).transpose(0, 1)


def _packed_attention(
    calls: Sequence[Args], segments: list[list[tuple[Span, Span]]], scale_at: int, causal: bool
) -> Prepared:
    occurring = sizes(segments)
    check_scores(calls[0][0].shape[1], occurring)
    device = calls[0][0].device
    hidden = {size: hidden_keys(*size, device) if causal else None for size in occurring}

    def run(i: int) -> Tensor:
        q, k, v = calls[i][:3]
        out: Tensor = q.new_zeros((*q.shape[:2], v.shape[2]))
        for (q0, q1), (k0, k1) in segments[i]:
            mask = hidden[q1 - q0, k1 - k0]
            out[q0:q1] = _attend(q[q0:q1], k[k0:k1], v[k0:k1], calls[i][scale_at], mask)
        return out

    return run


def _mla_prefill(calls: Sequence[Args]) -> Prepared:
    segments = [spans(call[3], call[4]) for call in calls]
    return _packed_attention(calls, segments, 7, all(call[8] for call in calls if len(call) > 8))


def _vision_attention(calls: Sequence[Args]) -> Prepared:
    segments = [spans(call[3], call[3]) for call in calls]
    return _packed_attention(calls, segments, 5, causal=False)


def select(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    scale: float = 1.0,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """As `moe_select`, without its promises for NaN and equal scores."""
    score = logits.sigmoid()
    choice = score + bias
    if topk_group < n_group:
        groups = choice.unflatten(1, (n_group, -1))
        best = groups.topk(min(2, groups.shape[2]), dim=-1).values.sum(-1)
        left_out = torch.ones_like(best, dtype=torch.bool)
        left_out.scatter_(1, best.topk(topk_group, dim=-1).indices, False)
        choice = groups.masked_fill(left_out[..., None], -torch.inf).flatten(1)
    ids = choice.topk(top_k, dim=-1).indices
    weights = score.gather(1, ids)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale, ids.int()


def route(x: Tensor, gate: Tensor, *selection: Any) -> tuple[Tensor, Tensor]:
    """As `moe_route`; the gate is in float32 already."""
    return select(F.linear(x.float(), gate), *selection)


def _moe_route(calls: Sequence[Args]) -> Prepared:
    gates = made_once(calls, 1, lambda call: call[1].float())
    return lambda i: route(calls[i][0], gates[i], *calls[i][2:])


def _sort(
    ids: Tensor, num_experts: int, expert_range: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    flat, local = ids.flatten(), num_experts
    if expert_range is not None:
        first, last = expert_range
        local, flat = last - first, flat - first
        flat = flat.masked_fill((flat < 0) | (flat >= local), local)
    counts = flat.bincount(minlength=local)[:local]
    return flat.argsort(stable=True).int(), F.pad(counts.cumsum(0), (1, 0)).int()


def _moe_route_sort(calls: Sequence[Args]) -> Prepared:
    gates = made_once(calls, 1, lambda call: call[1].float())

    def run(i: int) -> tuple[Tensor, ...]:
        call = calls[i]
        weights, ids = route(call[0], gates[i], *call[2:8])
        return weights, ids, *_sort(ids, len(gates[i]), *call[8:])

    return run


def _moe_experts_int4(calls: Sequence[Args]) -> Prepared:
    chosen, gate_ups, downs = wide_experts(calls)

    def expert(place: int) -> Callable[[Tensor], Tensor]:
        gate_up, down = gate_ups[place], downs[place]
        return lambda rows: F.linear(silu_mul(F.linear(rows, gate_up)), down)

    return expert_loop(calls, {e: expert(place) for place, e in enumerate(chosen)})


def _int4_linear(calls: Sequence[Args]) -> Prepared:
    layers = {call[1].data_ptr(): size_of(call[1]) for call in calls}
    what = f"bfloat16 weights of {len(layers)} layers"
    check_copy(what, 1, 4 * sum(layers.values()), device=calls[0][0].device)
    weights = made_once(calls, 1, lambda call: dequantize(call[1], call[2], call[0].dtype))
    return lambda i: F.linear(calls[i][0], weights[i])


def _vision_pos_embed(calls: Sequence[Args]) -> Prepared:
    x = calls[0][0]
    grids: list[Grids] = [call[2].tolist() for call in calls]
    frames = max((t for grid in grids for t, _, _ in grid), default=1)
    half = x.shape[1] // 2
    omega = 10000.0 ** (torch.arange(half, device=x.device) / -half)
    angle = torch.arange(frames, device=x.device)[:, None] * omega
    time = torch.cat((angle.sin(), angle.cos()), dim=1).to(x.dtype)

    pictures = made_once(calls, 1, lambda call: call[1].permute(2, 0, 1)[None].float().contiguous())

    def run(i: int) -> Tensor:
        x, table, _ = calls[i]
        parts = []
        for t, h, w in grids[i]:
            part = table.flatten(0, 1)
            if (h, w) != table.shape[:2]:
                whole = F.interpolate(pictures[i], size=(h, w), mode="bicubic")
                part = whole[0].flatten(1).T.to(x.dtype)
            parts.append((part + time[:t, None]).flatten(0, 1) if t > 1 else part)
        return x + torch.cat(parts)  # type: ignore[no-any-return]

    return run


def picture_angles(grids: Grids, head_dim: int, device: torch.device) -> Tensor:
    """``[L, head_dim/2]`` float32: the turn of each pair, columns and rows in turn."""
    frequency = 10000.0 ** (torch.arange(0, head_dim, 4, device=device) / -head_dim)
    parts = []
    for t, h, w in grids:
        row, column = torch.meshgrid(
            torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij"
        )
        at = torch.stack((column.flatten(), row.flatten()), dim=1)
        parts.append((frequency[:, None] * at[:, None]).flatten(1).repeat(t, 1))
    return torch.cat(parts)


def _vision_rope(calls: Sequence[Args]) -> Prepared:
    def table(call: Args) -> Tensor:  # of a picture, made once for all its layers
        angle = picture_angles(call[1].tolist(), call[0].shape[3], call[0].device)
        return torch.polar(torch.ones_like(angle), angle)[:, None, None]

    tables = [table(call) for call in calls]

    def run(i: int) -> Tensor:
        qkv: Tensor = calls[i][0]
        qkv[:, :2] = _turn(qkv[:, :2], tables[i])
        return qkv

    return run


def patch_merge(x: Tensor, grids: Grids, *norms: Any) -> Tensor:
    """As the op, the grids as numbers; ``norms`` are both layers' weight and bias, and eps."""
    final_weight, final_bias, pre_weight, pre_bias, eps = norms
    width = x.shape[1]
    normal = F.layer_norm(x, (width,), final_weight, final_bias, eps)
    parts, start = [], 0
    for t, h, w in grids:
        clip = normal[start : start + t * h * w].view(t, h // 2, 2, w // 2, 2, width)
        start += t * h * w
        picture = clip.mean(0) if t > 1 else clip[0]
        parts.append(picture.transpose(1, 2).reshape(-1, width))
    merged = F.layer_norm(torch.cat(parts), (width,), pre_weight, pre_bias, eps)
    return merged.view(-1, 4 * width)


def _patch_merge(calls: Sequence[Args]) -> Prepared:
    grids = [call[1].tolist() for call in calls]
    return lambda i: patch_merge(calls[i][0], grids[i], *calls[i][3:])


OPS: dict[str, Prepare] = {
    "rms_norm": each_call(rms_norm),
    "add_rms_norm": each_call(add_rms_norm),
    "silu_mul": each_call(silu_mul),
    "mla_latent_write": _mla_latent_write,
    "mla_absorb_query": _mla_absorb_query,
    "mla_decode": _mla_decode,
    "mla_decode_value": with_value(_mla_decode),
    "mla_project_value": _mla_project_value,
    "mla_prefill": _mla_prefill,
    "merge_attention": each_call(merge_attention),
    "moe_select": each_call(select),
    "moe_route": _moe_route,
    "moe_sort": each_call(_sort),
    "moe_route_sort": _moe_route_sort,
    "moe_experts_int4": _moe_experts_int4,
    "int4_linear": _int4_linear,
    "vision_pos_embed": _vision_pos_embed,
    "vision_rope": _vision_rope,
    "vision_attention": _vision_attention,
    "patch_merge": _patch_merge,
}
