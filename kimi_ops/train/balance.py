"""Balance of the experts: the selection bias follows the load of a step, and beside it a small loss
keeps single sequences from extremes.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from kimi_ops.model.errors import KimiError
from kimi_ops.model.tensor_arguments import check_tensor
from kimi_ops.reference import widen

# DeepSeek-V3's. Kimi's is not published.
SPEED = 1e-3


def _check_ids(ids: Tensor, experts: int) -> None:
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < experts):
        raise KimiError(
            f"expert ids must be in 0 .. {experts - 1}, got {int(ids.min())} .. {int(ids.max())}"
        )


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
        _check_ids(ids, len(self.counts))
        counts = torch.bincount(ids.flatten().long(), minlength=len(self.counts))
        self.counts += counts.to(self.counts.device)

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


def sequence_balance_loss(scores: Tensor, ids: Tensor, cu_seqlens: Tensor, alpha: float) -> Tensor:
    """The sequence-wise balance loss; of a sequence of T tokens::

        f_i = E / (K T) * (how often its tokens chose expert i)
        P_i = mean over its tokens t of scores[t, i] / sum_j scores[t, j]
        loss = alpha * sum_i f_i P_i

    and of several their mean. It is alpha for an even load, and at most alpha * E / K. Reads the
    offsets on the host.

    Args:
        scores: ``[T, E]`` floats, the router's before the selection bias,
            ``sigmoid(x.float() @ gate.float().T)``, positive. Computed in at least float32.
        ids: ``[T, K]`` integers, from `kimi_ops.moe_route`; a constant here.
        cu_seqlens: ``[B+1]`` integers, offsets of the sequences, from 0 to T. Those without tokens
            do not count.
        alpha: ``aux_loss_alpha`` of the config.

    Returns:
        ``[]``, float32 (float64 for float64 ``scores``), differentiable to ``scores``; 0 without
        tokens.

    Raises:
        KimiError: shapes or dtypes other than stated, an id that is no expert, or offsets that do
            not go from 0 to T.

    Source: DeepSeek-V3, arXiv 2412.19437 section 2.1.2, equations 17 to 20.
    """
    check_tensor("scores", scores, "[T, E] floats")
    check_tensor("ids", ids, "[T, K] integers")
    check_tensor("cu_seqlens", cu_seqlens, "[B] integers")
    tokens, experts = scores.shape
    if len(ids) != tokens or not ids.shape[1]:
        raise KimiError(f"ids must be [{tokens}, K], K at least 1, got {list(ids.shape)}")
    _check_ids(ids, experts)
    starts = cu_seqlens.tolist()
    if not starts or starts != sorted(starts) or (starts[0], starts[-1]) != (0, tokens):
        raise KimiError(f"cu_seqlens must ascend from 0 to {tokens}, got {starts!r:.80}")
    wide = widen(scores)
    # What `moe_route` adds where it normalises: a row of scores that all vanish gives 0, no NaN.
    share = wide / (wide.sum(dim=1, keepdim=True) + 1e-20)
    losses = []
    for start, stop in itertools.pairwise(starts):
        if start < stop:
            counts = torch.bincount(ids[start:stop].flatten().long(), minlength=experts)
            load = counts * (experts / (ids.shape[1] * (stop - start)))
            losses.append((load.to(wide) * share[start:stop].mean(dim=0)).sum())
    return alpha * torch.stack(losses).mean() if losses else share.sum()
