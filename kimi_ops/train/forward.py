"""The model's forward with gradients: packed conversations in, logits out, no cache.

The same parameters and the same ops as `kimi_ops.model`, in the form that training needs:
attention is materialised (every key and value is expanded from its latent), latents are not
written anywhere, and the experts are float matrices (`train.experts`).

Letters as in `kimi_ops.model.attention`: T tokens, H heads, N nope, R rope, V value, C latent, Q
query latent, D model width, E experts, K chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kimi_ops
from kimi_ops.model.attention import LatentAttention
from kimi_ops.model.kimi import KimiK25
from kimi_ops.model.language import DecoderLayer
from kimi_ops.model.moe import MixtureOfExperts
from kimi_ops.model.rope import rotate
from kimi_ops.reference import widen
from kimi_ops.train.balance import sequence_balance_loss
from kimi_ops.train.examples import IGNORED, Batch
from kimi_ops.train.experts import moe_experts
from kimi_ops.train.qk_clip import max_logits


@dataclass
class Seen:
    """What a forward saw by the way, by decoder layer, without gradients.

    Attributes:
        chosen: ``[T, K]`` int32, the experts of each token.
        largest: ``[H]`` float32, the largest attention logit of each head, if it was asked for.
        balance_loss: the sequence-wise auxiliary loss of all layers; this one has a gradient.
    """

    chosen: dict[int, Tensor] = field(default_factory=dict)
    largest: dict[int, Tensor] = field(default_factory=dict)
    balance_loss: Tensor = field(default_factory=lambda: torch.zeros(()))


@dataclass(frozen=True)
class Options:
    """How to compute.

    Attributes:
        quantize: what an expert's matrices go through before they are used, such as
            `kimi_ops.quant.int4.fake_quantize`; None leaves them as they are.
        recompute: norms, up-projections of the attention and SwiGLU are computed again in
            backward instead of kept (Kimi K2, arXiv 2507.20534 section 2.4.3).
        balance: alpha of the sequence-wise auxiliary loss, `aux_loss_alpha` of the config; 0 leaves
            it out.
        watch_logits: fill `Seen.largest`, which costs the products of queries and keys once more.
    """

    quantize: Callable[[Tensor], Tensor] | None = None
    recompute: bool = False
    balance: float = 0.0
    watch_logits: bool = False


def forward(model: KimiK25, batch: Batch, options: Options) -> tuple[Tensor, Seen]:
    """Logits of the positions of a batch that have a target.

    Args:
        model: with float experts (a config without quantization), ``requires_grad`` where wanted.
        batch: from `pack`.
        options: see there.

    Returns:
        ``[N, vocab]`` float32 for the N positions whose target is not `IGNORED`, in order, and what
        was seen.

    Raises:
        KimiError: as `KimiK25.embed` and `KimiK25.encode_media`.
    """
    media = None
    if len(batch.grid_thws):
        media = model.encode_media(batch.pixel_values, batch.grid_thws)
    x = model.embed(batch.ids, media)
    run = _Run(model, batch, options)
    residual: Tensor | None = None
    for layer in model.language.layers.values():
        assert isinstance(layer, DecoderLayer)
        x, residual = run.layer(layer, x, residual)
    assert residual is not None
    eps = model.config.text_config.rms_norm_eps
    hidden, _ = kimi_ops.add_rms_norm(x, residual, model.language.norm, eps)
    return model.language.logits(hidden[batch.targets != IGNORED]), run.seen


class _Run:
    """One forward: what all layers share."""

    def __init__(self, model: KimiK25, batch: Batch, options: Options) -> None:
        self.model, self.options, self.seen = model, options, Seen()
        self.cu_seqlens = batch.cu_seqlens.to(model.device)
        lengths = batch.cu_seqlens.diff().tolist()
        self.longest = max(lengths, default=0)
        self.positions = torch.cat([torch.arange(length) for length in lengths]).to(model.device)
        self.inv_freq = model.language.inv_freq
        self.number = -1

    def _again(self, function: Callable[..., Any], *args: Tensor) -> Any:
        """Calls it, and a second time in backward if that saves memory."""
        if not self.options.recompute:
            return function(*args)
        return checkpoint(function, *args, use_reentrant=False)

    def layer(
        self, layer: DecoderLayer, x: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One decoder layer, as `DecoderLayer.forward`."""
        self.number += 1
        if residual is None:
            normal, residual = kimi_ops.rms_norm(x, layer.input_layernorm, layer.eps), x
        else:
            normal, residual = kimi_ops.add_rms_norm(x, residual, layer.input_layernorm, layer.eps)
        attended = self.attention(layer.attn, normal)
        normal, residual = kimi_ops.add_rms_norm(
            attended, residual, layer.post_attention_layernorm, layer.eps
        )
        if layer.routed:
            return self.experts(layer.moe, normal), residual
        return self.mlp(normal, layer.mlp.gate_up, layer.mlp.down), residual

    def attention(self, attn: LatentAttention, x: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, D]``, each conversation by itself and causal."""
        config = attn.config
        heads, nope, latent = (
            config.num_attention_heads,
            config.qk_nope_head_dim,
            config.kv_lora_rank,
        )
        qkv_a = F.linear(x, attn.qkv_a)
        q_a, kv_a, rotary = qkv_a.split((config.q_lora_rank, latent, config.qk_rope_head_dim), -1)

        def query(q_a: Tensor, weight: Tensor, q_b: Tensor) -> Tensor:
            normal = kimi_ops.rms_norm(q_a.contiguous(), weight, config.latent_norm_eps)
            q = F.linear(normal, q_b).view(-1, heads, config.qk_head_dim)
            plain, turning = q.split((nope, config.qk_rope_head_dim), dim=-1)
            return torch.cat((plain, rotate(turning, self.positions, self.inv_freq)), dim=-1)

        def key_value(
            kv_a: Tensor, rotary: Tensor, weight: Tensor, kv_b: Tensor
        ) -> tuple[Tensor, Tensor]:
            normal = kimi_ops.rms_norm(kv_a.contiguous(), weight, config.latent_norm_eps)
            expanded = F.linear(normal, kv_b).view(len(x), heads, -1)
            plain, value = expanded.split((nope, config.v_head_dim), dim=-1)
            turned = rotate(rotary[:, None], self.positions, self.inv_freq)
            return torch.cat((plain, turned.expand(-1, heads, -1)), dim=-1), value

        q = self._again(query, q_a, attn.q_a_layernorm, attn.q_b)
        key, value = self._again(key_value, kv_a, rotary, attn.kv_a_layernorm, attn.kv_b)
        scale, cu = config.softmax_scale, self.cu_seqlens
        if self.options.watch_logits:
            self.seen.largest[self.number] = max_logits(q.detach(), key.detach(), cu, cu, scale)
        out, _ = kimi_ops.mla_prefill(
            q, key, value, cu, cu, self.longest, self.longest, scale, causal=True
        )
        return F.linear(out.flatten(1), attn.o)

    def mlp(self, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """``down(silu(gate x) * up x)``, of the first layers and of the shared expert."""

        def inner(x: Tensor, gate_up: Tensor) -> Tensor:
            return kimi_ops.silu_mul(F.linear(x, gate_up))

        return F.linear(self._again(inner, x, gate_up), down)

    def experts(self, moe: MixtureOfExperts, x: Tensor) -> Tensor:
        """Router, routed experts and the shared expert."""
        config, quantize = moe.config, self.options.quantize or (lambda weight: weight)
        weights, ids = kimi_ops.moe_route(
            x,
            moe.gate,
            moe.bias,
            config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            scale=config.routed_scaling_factor,
            normalize=config.norm_topk_prob,
        )
        self.seen.chosen[self.number] = ids.detach()
        if self.options.balance:
            wide = widen(x)
            scores = F.linear(wide, moe.gate.to(wide.dtype)).sigmoid()
            self.seen.balance_loss = self.seen.balance_loss + sequence_balance_loss(
                scores, ids, self.cu_seqlens, self.options.balance
            )
        routed = moe_experts(
            x,
            quantize(moe.gate_up),
            quantize(moe.down),
            weights,
            ids,
            recompute=self.options.recompute,
        )
        return routed + self.mlp(x, moe.shared_gate_up, moe.shared_down)
