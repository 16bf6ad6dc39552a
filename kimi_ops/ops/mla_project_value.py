"""Value up-projection of the attention result in latent space."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops._dispatch import define_op


def outputs(out: Tensor, w_uv: Tensor) -> Tensor:
    shape = (out.shape[0], out.shape[1], w_uv.shape[1])
    return torch.empty(shape, dtype=out.dtype, device=out.device)


_op = define_op(
    "mla_project_value(Tensor out, Tensor w_uv) -> Tensor",
    checks={"out": "[T, H, C] float", "w_uv": "[H, V, C] like out"},
    outputs=outputs,
)


def mla_project_value(out: Tensor, w_uv: Tensor) -> Tensor:
    """``value[t, h] = w_uv[h] @ out[t, h]``.

    Args:
        out: ``[T, H, C]`` bfloat16, float16, float32 or float64; from `mla_decode`, B and S merged.
        w_uv: ``[H, V, C]``, dtype of ``out``; the value rows of ``kv_b_proj``, any strides.

    Returns:
        ``[T, H, V]`` contiguous, dtype of ``out``.

    Raises:
        ValueError, TypeError: a shape, dtype or device other than stated.

    Gradients: none; an argument that requires grad is an error.

    Source: DeepSeek-V2, arXiv 2405.04434 section 2.1 (absorbed form).
    """
    value: Tensor = _op(out, w_uv)
    return value
