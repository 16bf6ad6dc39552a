"""MoonViT-3D: patches of pictures and clips, of any sizes together, to merged features."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kimi_ops
from kimi_ops.model.config import VisionConfig
from kimi_ops.model.errors import ConfigError, MediaError
from kimi_ops.model.parameters import Parameters
from kimi_ops.model.weight_map import TensorSpec

MAX_SIDE = 512  # patches; what the released rotary tables and preprocessing allow
LAYER_NORM_EPS = 1e-5  # of the encoder; the released file gives only the projector's


class EncoderLayer(Parameters):
    """``y = x + attention(norm0(x))``, then ``y + mlp(norm1(y))``."""

    norm0_weight: Tensor  # [D]
    norm0_bias: Tensor
    norm1_weight: Tensor
    norm1_bias: Tensor
    wqkv_weight: Tensor  # [3D, D]
    wqkv_bias: Tensor
    wo_weight: Tensor  # [D, D]
    wo_bias: Tensor
    fc0_weight: Tensor  # [F, D]
    fc0_bias: Tensor
    fc1_weight: Tensor  # [D, F]
    fc1_bias: Tensor

    def __init__(
        self,
        config: VisionConfig,
        specs: Mapping[str, TensorSpec],
        prefix: str,
        device: str | torch.device,
    ) -> None:
        super().__init__(specs, prefix, device)
        self.heads, self.head_dim = config.vt_num_attention_heads, config.head_dim

    def forward(self, x: Tensor, grid_thws: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        """``[L, D]`` to ``[L, D]``; one segment of attention per entry of ``grid_thws``."""
        shape = x.shape[1:]
        normal = F.layer_norm(x, shape, self.norm0_weight, self.norm0_bias, LAYER_NORM_EPS)
        qkv = F.linear(normal, self.wqkv_weight, self.wqkv_bias)
        qkv = qkv.view(len(x), 3, self.heads, self.head_dim)
        kimi_ops.vision_rope(qkv, grid_thws)
        q, k, v = qkv.unbind(1)
        scale = self.head_dim**-0.5
        attended = kimi_ops.vision_attention(q, k, v, cu_seqlens, longest, scale)
        x = x + F.linear(attended.flatten(1), self.wo_weight, self.wo_bias)
        normal = F.layer_norm(x, shape, self.norm1_weight, self.norm1_bias, LAYER_NORM_EPS)
        inner = F.gelu(F.linear(normal, self.fc0_weight, self.fc0_bias), approximate="tanh")
        return x + F.linear(inner, self.fc1_weight, self.fc1_bias)


class VisionTower(Parameters):
    """The encoder, up to the projector's own LayerNorm (which the last op contains)."""

    patch_embed_weight: Tensor  # [D, 3, P, P]
    patch_embed_bias: Tensor  # [D]
    pos_emb: Tensor  # [rows, columns, D]
    final_layernorm_weight: Tensor  # [D]
    final_layernorm_bias: Tensor

    def __init__(
        self, config: VisionConfig, specs: Mapping[str, TensorSpec], device: str | torch.device
    ) -> None:
        if config.projector_ln_eps != LAYER_NORM_EPS:
            raise ConfigError(
                f"vision_config.projector_ln_eps must be {LAYER_NORM_EPS} (that of the encoder, "
                f"whose last norm runs in the same kernel), got {config.projector_ln_eps}"
            )
        super().__init__(specs, "vision", device)
        self.config = config
        self.blocks = nn.ModuleDict(
            {
                str(i): EncoderLayer(config, specs, f"vision.blocks.{i}", device)
                for i in range(config.vt_num_hidden_layers)
            }
        )

    def forward(
        self, pixel_values: Tensor, grid_thws: Tensor, norm_weight: Tensor, norm_bias: Tensor
    ) -> Tensor:
        """Features of the merged patches, normalised for the projector.

        Args:
            pixel_values: ``[L, 3, P, P]``, patches of all pictures and chunks of clips, in order.
            grid_thws: ``[n, 3]`` int64 on the CPU, (t, h, w) of each in patches.
            norm_weight, norm_bias: ``[D]``, the projector's LayerNorm.

        Returns:
            ``[sum of h*w/4, 4D]``.

        Raises:
            MediaError: sizes that do not belong together, or out of range.
        """
        lengths = self._check(pixel_values, grid_thws)
        device, dtype = self.pos_emb.device, self.pos_emb.dtype
        patches = pixel_values.to(device, dtype).flatten(1)
        x = F.linear(patches, self.patch_embed_weight.flatten(1), self.patch_embed_bias)
        grid = grid_thws.to(device)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int().to(device)
        x = kimi_ops.vision_pos_embed(x, self.pos_emb, grid)
        longest = int(lengths.max()) if len(lengths) else 0
        for block in self.blocks.values():
            x = block(x, grid, cu_seqlens, longest)
        return kimi_ops.patch_merge(
            x,
            grid,
            int(merged_lengths(grid_thws).sum()),
            self.final_layernorm_weight,
            self.final_layernorm_bias,
            norm_weight,
            norm_bias,
            LAYER_NORM_EPS,
        )

    def _check(self, pixel_values: Tensor, grid_thws: Tensor) -> Tensor:
        """Patches per entry, ``[n]``; everything that the ops leave to their caller."""
        patch = self.config.patch_size
        # Integers would be raw bytes: pixels two hundred times too bright, without a word.
        if pixel_values.shape[1:] != (3, patch, patch) or not pixel_values.is_floating_point():
            raise MediaError(
                f"pixel_values must be [L, 3, {patch}, {patch}] floats, got "
                f"{list(pixel_values.shape)} {pixel_values.dtype}"
            )
        for entry, (t, h, w) in enumerate(grid_thws.tolist()):
            frames = self.config.init_pos_emb_time
            sides = all(0 < side <= MAX_SIDE and side % 2 == 0 for side in (h, w))
            if not (1 <= t <= frames and sides):
                raise MediaError(
                    f"grid_thws[{entry}] must be 1 to {frames} frames of an even number of rows "
                    f"and columns, at most {MAX_SIDE}, got {(t, h, w)}"
                )
        lengths = grid_thws.prod(1)
        if int(lengths.sum()) != len(pixel_values):
            raise MediaError(
                f"grid_thws announces {int(lengths.sum())} patches, pixel_values has "
                f"{len(pixel_values)}"
            )
        return lengths


def merged_lengths(grid_thws: Tensor) -> Tensor:
    """Vision tokens of each entry, ``[n]``: a quarter of a frame's patches, whatever t is."""
    return grid_thws[:, 1] * grid_thws[:, 2] // 4
