"""Launches `csrc/cuda/moe_select.cu`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kimi_ops._target import target
from kimi_ops.cuda._launcher import Argument, launch_kernel
from kimi_ops.cuda._support import is_aligned, refusal

BATCH_INVARIANT = True  # a row is one warp's, whatever the other rows are
FEW_EXPERTS = 384  # that fit 12 registers a lane
_WARPS = 4  # of a block, once there are more rows than warp schedulers


class Selection(NamedTuple):
    """A call's selection, as kernels take it.

    Attributes:
        weights, ids: the outputs, ``[T, K]``.
        logits: ``[splits, T, >= E]`` float32, to be summed over the splits.
        bias: ``[E]`` float32.
        experts, n_group, topk_group, scale, normalize: as the op has them.
    """

    weights: Tensor
    ids: Tensor
    logits: Tensor
    bias: Tensor
    experts: int
    n_group: int
    topk_group: int
    scale: float
    normalize: bool

    def arguments(self) -> list[Argument]:
        """Of every kernel that selects, the first ones."""
        vectors = self.experts % 4 == 0 and is_aligned(self.logits, self.bias)
        tokens, top_k = self.ids.shape
        sizes = self.logits.shape[0], tokens, self.experts, top_k, self.n_group, self.topk_group
        strides = *self.logits.stride(), self.bias.stride(0)
        tensors = self.logits, self.bias, self.weights, self.ids
        return [*tensors, *sizes, *strides, self.scale, int(self.normalize), int(vectors)]

    def scratch_bytes(self, warps: int) -> int:
        """Shared memory that warps rank groups in."""
        return 4 * warps * (self.experts + self.n_group) * (self.topk_group < self.n_group)

    def launch(self) -> None:
        """Launches the kernel that selects and nothing else."""
        tokens = self.ids.shape[0]
        warps = 1 if tokens <= 4 * target(self.ids.device).multiprocessors else _WARPS
        launch_kernel(
            "moe_select",
            f"moe_select_kernel_{12 if self.experts <= FEW_EXPERTS else 32}",
            grid=(-(-tokens // warps),),
            block=(32, warps),
            args=self.arguments(),
            shared_bytes=self.scratch_bytes(warps),
        )


def unsupported(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    scale: float,
    normalize: bool,
) -> str | None:
    if logits.dtype == torch.float64:
        return "moe_select in CUDA C++ computes in float32; logits are float64"
    return refusal("moe_select", logits, (torch.float32,))


def launch(
    outputs: tuple[Tensor, Tensor],
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    scale: float,
    normalize: bool,
) -> None:
    if logits.shape[0] == 0:
        return
    experts = logits.shape[1]
    call = Selection(*outputs, logits[None], bias, experts, n_group, topk_group, scale, normalize)
    call.launch()
