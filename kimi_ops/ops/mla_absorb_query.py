"""RoPE of the query and absorption of the key up-projection into it."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops._dispatch import define_op


def outputs(q: Tensor, w_uk: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    tokens, heads, width = q.shape
    _, nope, latent = w_uk.shape
    return torch.empty((tokens, heads, latent + width - nope), dtype=q.dtype, device=q.device)


_op = define_op(
    "mla_absorb_query(Tensor q, Tensor w_uk, Tensor positions, Tensor inv_freq) -> Tensor",
    checks={
        "q": "[T, H, N+R] float",
        "w_uk": "[H, N, C] like q",
        "positions": "[T] int",
        "inv_freq": "[R/2] float32",
    },
    outputs=outputs,
)


def mla_absorb_query(q: Tensor, w_uk: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """The query as the latent cache wants it: ``(q_nope @ w_uk | rope(q_rope))`` per head.

    Args:
        q: ``[T, H, N+R]`` bfloat16, float16, float32 or float64, ``(q_nope | q_rope)``;
            128 + 64 in Kimi K2.5.
        w_uk: ``[H, N, C]``, dtype of ``q``; the key rows of ``kv_b_proj``, any strides.
        positions: ``[T]`` int32 or int64.
        inv_freq: ``[R/2]`` float32, radians per position.

    Returns:
        ``[T, H, C+R]`` contiguous, dtype of ``q``; pairs rotated in place as `mla_latent_write`
        stores them.

    Raises:
        ValueError, TypeError: a shape, dtype or device other than stated.

    Gradients: none; an argument that requires grad is an error.

    Source: DeepSeek-V2, arXiv 2405.04434 section 2.1 (absorbed form).
    """
    q_latent: Tensor = _op(q, w_uk, positions, inv_freq)
    return q_latent
