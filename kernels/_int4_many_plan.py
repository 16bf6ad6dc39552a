"""When and how the Gluon form of many tokens is launched; the kernels are in `_int4_many_gluon`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kimi_ops import _target
from kimi_ops.kernels import _gluon, _int4
from kimi_ops.kernels._int4_product import Tile

_STEP_GROUPS = 4
_DENSE_STEP = 64


def _span(groups: int) -> int:
    """Groups of a row's scales in one copy, for K of so many groups: up to 32 bytes."""
    return next(span for span in (16, 8, _STEP_GROUPS) if groups % span == 0)


def rows_fit(tensor: Tensor, multiple: int) -> bool:
    """Whether rows are so many elements apart, or multiples, and start at such and at 16 bytes."""
    rows = zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True)
    apart = all(stride % multiple == 0 for stride, size in rows if size > 1)
    return apart and tensor.data_ptr() % max(16, multiple * tensor.element_size()) == 0


def fits(x: Tensor, scales: Iterable[Tensor], dense: Iterable[Tensor]) -> bool:
    """Whether this Triton, GPU and call are such as the Gluon kernels were made for.

    Args:
        x: activations.
        scales: of the int4 weights, ``[.., N, K/32]``.
        dense: 16-bit weights, ``[N, K]``.
    """
    if not _gluon.compiles() or not _int4.takes_assembly(x.device):
        return False
    return all(
        scale.dtype == x.dtype
        and scale.shape[-1] > 0
        and scale.shape[-1] % _STEP_GROUPS == 0
        and rows_fit(scale, _span(scale.shape[-1]))
        for scale in scales
    ) and all(weight.shape[-1] % _DENSE_STEP == 0 and rows_fit(weight, 8) for weight in dense)


def constants(tile: Tile, groups: int, device: torch.device) -> dict[str, Any]:
    """What shapes a product of so many groups along K."""
    return {
        "TOKENS": tile.tokens,
        "SPAN": _span(groups),
        "STAGES": tile.stages,
        "HOPPER": _target.target(device).capability == 90,
    }


def scale_strides(scale: Tensor) -> list[int]:
    """Strides of all dimensions but the last, in spans."""
    return [stride // _span(scale.shape[-1]) for stride in scale.stride()[:-1]]
