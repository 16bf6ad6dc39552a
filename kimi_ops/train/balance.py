"""Balance of the experts without an auxiliary loss: the selection bias follows the load."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops.model.errors import KimiError

# DeepSeek-V3's. Kimi's is not published.
SPEED = 1e-3


class ExpertLoad:
    """How many tokens chose each expert of one layer, summed over the micro-batches of a step.

    Args:
        experts: E.
        device: of the counts.

    Raises:
        KimiError: experts below 1.
    """

    def __init__(self, experts: int, device: str | torch.device = "cpu") -> None:
        if experts < 1:
            raise KimiError(f"experts must be at least 1, got {experts}")
        self.counts = torch.zeros(experts, dtype=torch.int64, device=device)
        """``[E]`` int64. Ranks are joined by summing it over them."""

    def add(self, ids: Tensor) -> None:
        """Counts the choices of a micro-batch.

        Args:
            ids: ``[T, K]`` integers, from `kimi_ops.moe_route`.

        Raises:
            KimiError: an id that is no expert.
        """
        flat = ids.flatten().long()
        experts = len(self.counts)
        if flat.numel() and not (int(flat.min()) >= 0 and int(flat.max()) < experts):
            raise KimiError(
                f"expert ids must be in 0 .. {experts - 1}, "
                f"got {int(flat.min())} .. {int(flat.max())}"
            )
        self.counts += torch.bincount(flat, minlength=experts).to(self.counts.device)

    def share(self) -> Tensor:
        """``[E]`` float64: load of each expert over the mean load; ones where nothing was added."""
        counts = self.counts.double()
        return counts / counts.mean() if bool(counts.any()) else torch.ones_like(counts)

    def violation(self) -> float:
        """MaxVio, the largest load over the mean load, less 1; 0 is perfect balance.

        Source: Auxiliary-Loss-Free Load Balancing Strategy, arXiv 2408.15664 section 4.
        """
        return float(self.share().max()) - 1

    def reset(self) -> None:
        """Forgets the step."""
        self.counts.zero_()


@torch.no_grad()
def update_bias_(bias: Tensor, counts: Tensor, *, speed: float = SPEED) -> None:
    """Raises the bias of experts below the mean load and lowers that of those above, once a step::

        bias += speed * sign(mean(counts) - counts)

    Args:
        bias: ``[E]`` float32 (in bfloat16 its small steps would vanish), **written**.
        counts: ``[E]`` integers, `ExpertLoad.counts` of the whole batch and all ranks.
        speed: of the bias per step, in units of the scores, which are in 0 .. 1.

    Raises:
        KimiError: other shapes or dtypes, or a negative speed.

    Source: DeepSeek-V3, arXiv 2412.19437 section 2.1.2.
    """
    if bias.dtype != torch.float32 or bias.dim() != 1:
        raise KimiError(f"bias must be [E] float32, got {list(bias.shape)} {bias.dtype}")
    if counts.shape != bias.shape or counts.is_floating_point():
        raise KimiError(
            f"counts must be {list(bias.shape)} integers, got {list(counts.shape)} {counts.dtype}"
        )
    if not speed >= 0:
        raise KimiError(f"speed must be at least 0, got {speed}")
    # In integers: the mean of counts is rarely a float, and an expert at the mean must stay.
    below = counts.sum() - counts * len(counts)
    bias += speed * below.sign().to(bias.device, bias.dtype)
