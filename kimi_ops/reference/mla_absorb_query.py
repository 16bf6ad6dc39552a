"""Reference of `mla_absorb_query`."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops.reference import runs_anything as unsupported
from kimi_ops.reference._rotate import rope

__all__ = ["launch", "mla_absorb_query", "unsupported"]


def mla_absorb_query(q: Tensor, w_uk: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    nope, rotary = q.split((w_uk.shape[1], 2 * len(inv_freq)), dim=2)
    absorbed = torch.einsum("thn,hnc->thc", nope, w_uk)
    return torch.cat((absorbed, rope(rotary, positions, inv_freq)), dim=2)


def launch(q_latent: Tensor, q: Tensor, w_uk: Tensor, positions: Tensor, inv_freq: Tensor) -> None:
    q_latent.copy_(mla_absorb_query(q, w_uk, positions, inv_freq))
