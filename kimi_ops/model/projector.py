"""The patch merger's two linears: merged vision features to the width of the language model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_ops.model.parameters import Parameters
from kimi_ops.model.weight_map import TensorSpec


class Projector(Parameters):
    """``proj2(gelu(proj0(x)))`` with the exact GELU; its LayerNorm runs in `patch_merge`."""

    pre_norm_weight: Tensor  # [Dv]
    pre_norm_bias: Tensor
    proj0_weight: Tensor  # [4Dv, 4Dv]
    proj0_bias: Tensor
    proj2_weight: Tensor  # [D, 4Dv]
    proj2_bias: Tensor

    def __init__(self, specs: Mapping[str, TensorSpec], device: str | torch.device) -> None:
        super().__init__(specs, "projector", device)

    def forward(self, x: Tensor) -> Tensor:
        """``[M, 4Dv]``, normalised, to ``[M, D]``."""
        inner = F.gelu(F.linear(x, self.proj0_weight, self.proj0_bias))
        return F.linear(inner, self.proj2_weight, self.proj2_bias)
