"""From the fused down-projection to the normalised query latent and the paged latent cache."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops._dispatch import define_op


def outputs(
    qkv_a: Tensor,
    q_norm_weight: Tensor,
    kv_norm_weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    eps: float,
) -> Tensor:
    shape = (qkv_a.shape[0], q_norm_weight.shape[0])
    return torch.empty(shape, dtype=qkv_a.dtype, device=qkv_a.device)


_op = define_op(
    "mla_latent_write(Tensor qkv_a, Tensor q_norm_weight, Tensor kv_norm_weight, Tensor positions,"
    " Tensor inv_freq, Tensor slot_mapping, Tensor(a!) kv_cache, float eps) -> Tensor",
    checks={
        "qkv_a": "[T, Q+C+R] float",
        "q_norm_weight": "[Q] like qkv_a",
        "kv_norm_weight": "[C] like qkv_a",
        "positions": "[T] int",
        "inv_freq": "[R/2] float32",
        "slot_mapping": "[T] int",
        "kv_cache": "[num_pages, P, C+R] like qkv_a or [num_pages, P, C+16+2*R] uint8",
        "P": "P > 0",
        "eps": "eps >= 0",
    },
    outputs=outputs,
)


def mla_latent_write(
    qkv_a: Tensor,
    q_norm_weight: Tensor,
    kv_norm_weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    eps: float,
) -> Tensor:
    """Norms, rotates and stores the latent of each token; returns its normalised query latent.

    Of a row ``(q | c | k)`` of ``qkv_a``: ``q_a = rms_norm(q)``; ``kv_cache[slot] =
    (rms_norm(c) | rope(k))``. The norm of ``c`` leaves the rope values out. RoPE rotates each
    adjacent pair ``(k[2i], k[2i+1])`` by ``position * inv_freq[i]`` in float32 and stores it in
    place (the interleaved order of the checkpoint and of GPT-J style kernels).

    Args:
        qkv_a: ``[T, Q+C+R]`` bfloat16, float16, float32 or float64; 1536 + 512 + 64 in Kimi K2.5.
        q_norm_weight: ``[Q]``, dtype of ``qkv_a``.
        kv_norm_weight: ``[C]``, dtype of ``qkv_a``.
        positions: ``[T]`` int32 or int64.
        inv_freq: ``[R/2]`` float32, radians per position.
        slot_mapping: ``[T]`` int32 or int64: ``page * P + offset`` of the token. A slot outside
            the cache writes nothing: -1 on purpose (padding), any other also makes the token's
            ``q_a`` NaN, so that a wrong slot is seen. Slots in the cache must differ.
        kv_cache: ``[num_pages, P, C+R]``, dtype of ``qkv_a``, or ``[num_pages, P, C+16+2R]`` uint8,
            the fp8 format of `kimi_ops.quant.latent_fp8`; **written**.
        eps: added to both mean squares.

    Returns:
        ``q_a [T, Q]`` contiguous, dtype of ``qkv_a``.

    Raises:
        ValueError, TypeError: a shape, dtype, device, page size or ``eps`` other than stated.

    Gradients: none; an argument that requires grad is an error.

    Source: DeepSeek-V2, arXiv 2405.04434 section 2.1; YaRN, arXiv 2309.00071, for ``inv_freq``.
    """
    q_a: Tensor = _op(
        qkv_a, q_norm_weight, kv_norm_weight, positions, inv_freq, slot_mapping, kv_cache, eps
    )
    return q_a
