"""Modules that own exactly the fused parameters of `weight_map`, by the names given there."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from kimi_ops.model.weight_map import TensorSpec


class Parameters(nn.Module):
    """A module with one parameter per entry of `specs` that stands directly below `prefix`.

    With ``prefix`` "language.layers.3.attn", the entry "language.layers.3.attn.qkv_a" becomes
    ``self.qkv_a``. Parameters are uninitialised and without gradient, on ``device``.
    """

    def __init__(
        self, specs: Mapping[str, TensorSpec], prefix: str, device: str | torch.device
    ) -> None:
        super().__init__()
        for name, spec in specs.items():
            parent, _, leaf = name.rpartition(".")
            if parent == prefix:
                data = torch.empty(spec.shape, dtype=spec.dtype, device=device)
                self.register_parameter(leaf, nn.Parameter(data, requires_grad=False))
