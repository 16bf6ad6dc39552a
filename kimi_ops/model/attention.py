"""Multi-head latent attention of the decoder, absorbed for decode and materialised for prefill."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

import kimi_ops
from kimi_ops.model.cache import KeyChunk, Step
from kimi_ops.model.config import TextConfig
from kimi_ops.model.parameters import Parameters
from kimi_ops.model.rope import rotate
from kimi_ops.model.weight_map import TensorSpec
from kimi_ops.quant import latent_fp8


class LatentAttention(Parameters):
    """One layer's attention.

    Letters: T tokens, H heads, N nope, R rope, V value, C latent, Q query latent, D model width.
    """

    qkv_a: Tensor  # [Q + C + R, D]
    q_a_layernorm: Tensor  # [Q]
    kv_a_layernorm: Tensor  # [C]
    q_b: Tensor  # [H * (N + R), Q]
    kv_b: Tensor  # [H * (N + V), C]
    o: Tensor  # [D, H * V]

    def __init__(
        self,
        config: TextConfig,
        specs: Mapping[str, TensorSpec],
        prefix: str,
        device: str | torch.device,
    ) -> None:
        super().__init__(specs, prefix, device)
        self.config = config

    def forward(self, x: Tensor, step: Step, pages: Tensor, inv_freq: Tensor) -> Tensor:
        """Attends, after writing the new tokens' latents into the cache.

        Args:
            x: ``[T, D]``, normalised.
            step: where the tokens stand.
            pages: ``[num_pages, P, C+R]``, the layer's cache, or ``[num_pages, P, C+16+2R]`` uint8
                in the fp8 format; written.
            inv_freq: ``[R/2]`` float32.

        Returns:
            ``[T, D]``.
        """
        config = self.config
        heads, nope = config.num_attention_heads, config.qk_nope_head_dim
        q_a = kimi_ops.mla_latent_write(
            F.linear(x, self.qkv_a),
            self.q_a_layernorm,
            self.kv_a_layernorm,
            step.positions,
            inv_freq,
            step.slots,
            pages,
            config.latent_norm_eps,
        )
        q = F.linear(q_a, self.q_b).view(len(x), heads, config.qk_head_dim)
        kv_b = self.kv_b.view(heads, nope + config.v_head_dim, config.kv_lora_rank)
        if step.decode:
            value = self._absorbed(q, kv_b, step, pages, inv_freq)
        else:
            value = self._materialised(q, step, pages, inv_freq)
        return F.linear(value.flatten(1), self.o)

    def _absorbed(
        self, q: Tensor, kv_b: Tensor, step: Step, pages: Tensor, inv_freq: Tensor
    ) -> Tensor:
        nope = self.config.qk_nope_head_dim
        q_latent = kimi_ops.mla_absorb_query(q, kv_b[:, :nope], step.positions, inv_freq)
        value = kimi_ops.mla_decode_value(
            q_latent.view(len(step.new_tokens), step.new_tokens[0], *q_latent.shape[1:]),
            pages,
            step.page_table,
            step.seq_lens,
            kv_b[:, nope:],
            self.config.softmax_scale,
            kv_lora_rank=self.config.kv_lora_rank,
        )
        return value.flatten(0, 1)

    def _materialised(self, q: Tensor, step: Step, pages: Tensor, inv_freq: Tensor) -> Tensor:
        nope = self.config.qk_nope_head_dim
        q = torch.cat((q[..., :nope], rotate(q[..., nope:], step.positions, inv_freq)), dim=-1)
        first, *others = step.chunks
        out, lse = self._attend(q, first, step, pages)
        for chunk in others:  # merged at once: only two results are ever held
            out, lse = kimi_ops.merge_attention(out, lse, *self._attend(q, chunk, step, pages))
        return out

    def _attend(
        self, q: Tensor, chunk: KeyChunk, step: Step, pages: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attention to one chunk of cached tokens, expanded to a key and a value per head."""
        config = self.config
        heads, nope = config.num_attention_heads, config.qk_nope_head_dim
        entries = pages.flatten(0, 1)[chunk.slots]
        if entries.dtype == torch.uint8:
            entries = latent_fp8.unpack(entries, config.kv_lora_rank, q.dtype)
        latent, rotary = entries[:, : config.kv_lora_rank], entries[:, config.kv_lora_rank :]
        expanded = F.linear(latent, self.kv_b).view(len(entries), heads, -1)
        key = torch.cat((expanded[..., :nope], rotary[:, None].expand(-1, heads, -1)), dim=-1)
        return kimi_ops.mla_prefill(
            q,
            key,
            expanded[..., nope:],
            step.cu_seqlens,
            chunk.cu_seqlens,
            max(step.new_tokens),
            chunk.max_seqlen,
            config.softmax_scale,
            causal=chunk.causal,
        )
