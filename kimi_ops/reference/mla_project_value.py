"""Reference of `mla_project_value`."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops.reference import runs_anything as unsupported

__all__ = ["launch", "mla_project_value", "unsupported"]


def mla_project_value(out: Tensor, w_uv: Tensor) -> Tensor:
    return torch.einsum("thc,hvc->thv", out, w_uv)


def launch(value: Tensor, out: Tensor, w_uv: Tensor) -> None:
    value.copy_(mla_project_value(out, w_uv))
