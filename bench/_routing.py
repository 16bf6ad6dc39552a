"""Which experts tokens are sent to: evenly, to a few, or all to one."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops.bench import Maker
from kimi_ops.bench.cases._sizes import CHOSEN


def routed(new: Maker, tokens: int, experts: int, routing: str = "uniform") -> Tensor:
    """``[tokens, 8]`` int32 ids: "uniform", "skewed" (an expert's share falls as 1 / rank), or
    "one expert" (the first choice of every token is the same; what is left is even)."""
    chance = torch.ones(experts)
    if routing == "skewed":
        chance = 1 / torch.arange(1.0, experts + 1)
    ids = torch.multinomial(chance.expand(tokens, -1), CHOSEN, generator=new.generator).int()
    if routing == "one expert":
        ids[ids == 0] = ids[:, :1].expand(-1, CHOSEN)[ids == 0]
        ids[:, 0] = 0
    return ids.to(new.device)
