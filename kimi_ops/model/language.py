"""The decoder: embedding, layers, final norm and head."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kimi_ops
from kimi_ops.model.attention import LatentAttention
from kimi_ops.model.cache import LatentCache, Step
from kimi_ops.model.config import TextConfig
from kimi_ops.model.errors import ConfigError
from kimi_ops.model.moe import DenseMLP, MixtureOfExperts
from kimi_ops.model.parameters import Parameters
from kimi_ops.model.rope import yarn_attention_factor, yarn_inv_freq
from kimi_ops.model.weight_map import TensorSpec


class DecoderLayer(Parameters):
    """``h = x + attention(norm(x))``, then ``h + feed_forward(norm(h))``."""

    input_layernorm: Tensor  # [D]
    post_attention_layernorm: Tensor  # [D]

    def __init__(
        self,
        config: TextConfig,
        layer: int,
        specs: Mapping[str, TensorSpec],
        device: str | torch.device,
    ) -> None:
        prefix = f"language.layers.{layer}"
        super().__init__(specs, prefix, device)
        self.eps = config.rms_norm_eps
        self.attn = LatentAttention(config, specs, f"{prefix}.attn", device)
        if config.is_moe_layer(layer):
            self.moe = MixtureOfExperts(config, specs, f"{prefix}.moe", device)
        else:
            self.mlp = DenseMLP(specs, f"{prefix}.mlp", device)
        self.routed = config.is_moe_layer(layer)

    def forward(
        self, x: Tensor, residual: Tensor | None, step: Step, pages: Tensor, inv_freq: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``[T, D]`` of the layer before, and the residual stream without it; returns the same.

        The addition is left to the next norm, which does both in one pass.
        """
        if residual is None:
            normal, residual = kimi_ops.rms_norm(x, self.input_layernorm, self.eps), x
        else:
            normal, residual = kimi_ops.add_rms_norm(x, residual, self.input_layernorm, self.eps)
        attended = self.attn(normal, step, pages, inv_freq)
        normal, residual = kimi_ops.add_rms_norm(
            attended, residual, self.post_attention_layernorm, self.eps
        )
        return (self.moe if self.routed else self.mlp)(normal), residual


class LanguageModel(Parameters):
    """Tokens or embeddings in, hidden states and logits out.

    Args:
        config: of the text model.
        layers: decoder layers present.
        specs: all fused parameters.
        device: of the parameters.

    Raises:
        ConfigError: YaRN parameters that scale cos and sin, which the attention ops do not.
    """

    embed_tokens: Tensor  # [vocab, D]
    norm: Tensor  # [D]
    lm_head: Tensor  # [vocab, D]
    inv_freq: Tensor  # [R/2] float32

    def __init__(
        self,
        config: TextConfig,
        layers: range,
        specs: Mapping[str, TensorSpec],
        device: str | torch.device,
    ) -> None:
        if yarn_attention_factor(config) != 1:
            raise ConfigError(
                "text_config.rope_scaling: mscale and mscale_all_dim must be equal "
                "(cos and sin unscaled), as in every released model of this family"
            )
        super().__init__(specs, "language", device)
        self.config = config
        self.layers = nn.ModuleDict(
            {str(layer): DecoderLayer(config, layer, specs, device) for layer in layers}
        )
        self.register_buffer("inv_freq", yarn_inv_freq(config), persistent=False)
        self._place_inv_freq()

    def _place_inv_freq(self) -> None:
        """Float32 and on the parameters' device, whatever happened to them."""
        device = self.embed_tokens.device
        if device.type != "meta":
            self.inv_freq = yarn_inv_freq(self.config).to(device)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> LanguageModel:
        # .half(), .to(device), .to_empty() and the like go through here; angles stay float32.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._place_inv_freq()
        return self

    def embed(self, input_ids: Tensor) -> Tensor:
        """``[T]`` int64 to ``[T, D]``."""
        return F.embedding(input_ids, self.embed_tokens)

    def forward(self, x: Tensor, step: Step, cache: LatentCache) -> Tensor:
        """Hidden states after the final norm, ``[T, D]``, of embeddings ``x [T, D]``."""
        residual = None
        for name, layer in self.layers.items():
            x, residual = layer(x, residual, step, cache.pages[int(name)], self.inv_freq)
        assert residual is not None
        normal, _ = kimi_ops.add_rms_norm(x, residual, self.norm, self.config.rms_norm_eps)
        return normal

    def logits(self, hidden: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, vocab]`` float32 (float64 stays): sampling happens in that."""
        y = F.linear(hidden, self.lm_head)
        return y.to(torch.promote_types(y.dtype, torch.float32))
