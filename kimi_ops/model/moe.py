"""The feed-forward halves of the decoder: the dense MLP and the mixture of experts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kimi_ops
from kimi_ops.model.config import TextConfig
from kimi_ops.model.parameters import Parameters
from kimi_ops.model.weight_map import TensorSpec


class DenseMLP(Parameters):
    """``down(silu(gate x) * up x)`` of the first layers."""

    gate_up: Tensor  # [2F, D], gate rows first
    down: Tensor  # [D, F]

    def forward(self, x: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, D]``."""
        return F.linear(kimi_ops.silu_mul(F.linear(x, self.gate_up)), self.down)


class MixtureOfExperts(Parameters):
    """Router, routed experts (int4, or in the model's dtype) and the shared expert.

    Attributes:
        on_route: None, or a function that is called with the ids ``[T, K]`` int32 that the router
            has chosen, whichever backend it runs on; for whoever counts them.
    """

    gate: Tensor  # [E, D]
    bias: Tensor  # [E] float32
    gate_up_packed: Tensor  # [E, 2F, D/8] int32
    gate_up_scale: Tensor  # [E, 2F, D/32]
    down_packed: Tensor  # [E, D, F/8] int32
    down_scale: Tensor  # [E, D, F/32]
    gate_up: Tensor  # [E, 2F, D], instead of the four above
    down: Tensor  # [E, D, F]
    shared_gate_up: Tensor  # [2F', D]
    shared_down: Tensor  # [D, F']

    def __init__(
        self,
        config: TextConfig,
        specs: Mapping[str, TensorSpec],
        prefix: str,
        device: str | torch.device,
    ) -> None:
        super().__init__(specs, prefix, device)
        self.config = config
        self.quantized = f"{prefix}.gate_up_packed" in specs
        self.on_route: Callable[[Tensor], None] | None = None

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> MixtureOfExperts:
        # .half() and the like leave these alone: the bias is float32 by definition (its small steps
        # would vanish), and scales belong to the stored weights.
        kept = {
            n: p.data
            for n, p in self._parameters.items()
            if p is not None and (n == "bias" or n.endswith("_scale"))
        }
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, data in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, D]``."""
        config = self.config
        router = x, self.gate, self.bias, config.num_experts_per_tok
        options: dict[str, Any] = {
            "n_group": config.n_group,
            "topk_group": config.topk_group,
            "scale": config.routed_scaling_factor,
            "normalize": config.norm_topk_prob,
        }
        if self.quantized:
            weights, ids = kimi_ops.moe_route(*router, **options)
            if self.on_route is not None:
                self.on_route(ids)
            return kimi_ops.moe_experts_int4(
                x,
                self.gate_up_packed,
                self.gate_up_scale,
                self.down_packed,
                self.down_scale,
                weights,
                ids,
                shared_gate_up=self.shared_gate_up,
                shared_down=self.shared_down,
            )
        weights, ids, order, offsets = kimi_ops.moe_route_sort(*router, **options)
        if self.on_route is not None:
            self.on_route(ids)
        return self._unquantized(x, weights, order, offsets)

    def _unquantized(self, x: Tensor, weights: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
        """The same with torch's own matrix products, expert by expert, summed in float32.

        Reads the number of tokens of each expert on the host.
        """
        shared = kimi_ops.silu_mul(F.linear(x, self.shared_gate_up))
        total = F.linear(shared, self.shared_down).to(weights.dtype)
        starts = offsets.tolist()
        for expert, (start, stop) in enumerate(itertools.pairwise(starts)):
            if start < stop:
                pairs = order[start:stop].long()
                tokens = pairs // weights.shape[1]
                inner = kimi_ops.silu_mul(F.linear(x[tokens], self.gate_up[expert]))
                y = F.linear(inner, self.down[expert])
                # A token chooses an expert at most once, so no row is added to twice here.
                total[tokens] += weights.flatten()[pairs, None] * y
        return total.to(x.dtype)
