"""Inputs of the router without near ties, on which two correct routers may differ."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kimi_ops.bench import Maker
from kimi_ops.bench.cases._sizes import CHOSEN, EXPERTS, ROUTED_SCALE, D

REST = (CHOSEN, 1, 1, ROUTED_SCALE, True)
_GAP = 1e-4  # between biased scores that a float32 product cannot swap


def router(new: Maker, tokens: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """x, gate, bias, logits."""
    while True:
        gate = new.normal(EXPERTS, D, std=1.5 * D**-0.5)
        bias = new.normal(EXPERTS, dtype=torch.float32, std=0.1)
        x = new.normal(tokens, D)
        logits = x.float() @ gate.float().T
        while new.device.type != "meta":
            best = (logits.sigmoid() + bias).topk(CHOSEN + 1).values
            close = ((best[:, :-1] - best[:, 1:]) < _GAP).any(1).nonzero()[:, 0]
            if not len(close):
                break
            x[close] = new.normal(len(close), D)
            logits[close] = x[close].float() @ gate.float().T
        yield x, gate, bias, logits
