"""Muon over the processes of a run: each moves its share of the matrices, and all get the results.

Every process has the whole gradient, so without this each would do all of the same work.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_ops.train.muon import Muon


class SharedMuon:
    """Steps of a `Muon` whose parameters are the same in all processes, before and after.

    Args:
        muon: the same in every process.
    """

    def __init__(self, muon: Muon) -> None:
        self.muon = muon
        self.parameters = [p for group in muon.param_groups for p in group["params"]]
        # The largest first, each to who has the least to do.
        owed = [0] * dist.get_world_size()
        self.mine: set[Tensor] = set()
        for parameter in sorted(self.parameters, key=_work, reverse=True):
            owner = owed.index(min(owed))
            owed[owner] += _work(parameter)
            if owner == dist.get_rank():
                self.mine.add(parameter)

    def step(self) -> None:
        """As that of `Muon`. Only `share_state` makes its state whole."""
        others = [p for p in self.parameters if p not in self.mine]
        gradients = [p.grad for p in others]
        for parameter in others:
            parameter.grad = None
        self.muon.step()
        for parameter, gradient in zip(others, gradients, strict=True):
            parameter.grad = gradient
        self._share(lambda parameter: parameter.detach())

    def share_state(self) -> None:
        """Gives every process the momentum of all matrices, for the state on disk."""
        for parameter in self.parameters:
            self.muon.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        self._share(lambda parameter: self.muon.state[parameter]["momentum_buffer"])

    def _share(self, of: Callable[[Tensor], Tensor]) -> None:
        """Every parameter's tensor becomes that of its owner: the sum of it and of zeros."""
        tensors = [of(p) for p in self.parameters]
        pairs = zip(self.parameters, tensors, strict=True)
        flat = torch.cat(
            [(x if p in self.mine else torch.zeros_like(x)).flatten() for p, x in pairs]
        )
        dist.all_reduce(flat)
        for x, piece in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
            x.copy_(piece.view_as(x))


def _work(parameter: Tensor) -> int:
    """Of orthogonalising: products of the shorter side with the matrix."""
    return parameter.numel() * min(parameter.shape[-2:])
