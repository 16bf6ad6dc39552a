"""The learning rate over a run: warm-up, stable, decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kimi_ops.model.errors import KimiError, check_count


@dataclass(frozen=True)
class WarmupStableDecay:
    """Factor of the learning rate by step, for `torch.optim.lr_scheduler.LambdaLR`.

    Rises linearly over ``warmup`` steps, stays at 1 for ``stable``, falls along half a cosine to
    ``final`` over ``decay``, and stays there. The first step has ``1 / warmup``, the last of the
    warm-up 1, the last of the decay ``final``: no step is spent on a learning rate of 0.

    Args:
        warmup, stable, decay: optimizer steps, each at least 0.
        final: factor at the end, in 0 .. 1; 0.1 in Kimi K2 (2e-4 to 2e-5).

    Raises:
        KimiError: a number out of its range.

    Source: Kimi K2, arXiv 2507.20534 section 2.5 (training recipe).
    """

    warmup: int
    stable: int
    decay: int
    final: float = 0.1

    def __post_init__(self) -> None:
        for name in ("warmup", "stable", "decay"):
            check_count(name, getattr(self, name), minimum=0)
        if not 0 <= self.final <= 1:
            raise KimiError(f"final must be in 0 .. 1, got {self.final!r:.80}")

    @property
    def steps(self) -> int:
        """Length of the run: warm-up, stable and decay."""
        return self.warmup + self.stable + self.decay

    def __call__(self, step: int) -> float:
        """Factor of optimizer step ``step``, counted from 0."""
        done = step + 1
        if done <= self.warmup:
            return done / self.warmup
        falling = done - self.warmup - self.stable
        if falling <= 0:
            return 1.0
        if falling >= self.decay:
            return self.final
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * falling / self.decay)) / 2
