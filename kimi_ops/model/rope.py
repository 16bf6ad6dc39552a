"""Rotary frequencies of the text model: plain RoPE and YaRN (arXiv 2309.00071).

Pair i of a rope slice is (x[2i], x[2i+1]) and turns by position * inv_freq[i]. YaRN keeps the fast
frequencies, divides the slow ones by its factor, and blends linearly in between.
"""

from __future__ import annotations

import torch

from kimi_ops.model.config import TextConfig


def yarn_inv_freq(text_config: TextConfig) -> torch.Tensor:
    """Angle per position of each pair, in radians: [qk_rope_head_dim / 2] float32 on the CPU.

    With b = rope_theta, d = qk_rope_head_dim and factor s, f_i = b^(2i/d) and inv_i = ramp_i / (s
    f_i) + (1 - ramp_i) / f_i, where ramp_i rises from 0 to 1 between the indices
    `text_config.rope_ramp()`. `rope_scaling` None gives 1 / f_i. Computed in float64, rounded once.
    """
    dim = text_config.qk_rope_head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    extrapolated = torch.pow(float(text_config.rope_theta), -exponents)
    scaling = text_config.rope_scaling
    if scaling is None:
        return extrapolated.to(torch.float32)
    low, high = text_config.rope_ramp()
    ramp = (torch.arange(dim // 2, dtype=torch.float64) - low).div(high - low).clamp(0, 1)
    return (ramp * extrapolated / scaling.factor + (1 - ramp) * extrapolated).to(torch.float32)


def yarn_attention_factor(text_config: TextConfig) -> float:
    """Factor on cos and sin: m(mscale) / m(mscale_all_dim); 1.0 for Kimi K2.5 and for plain RoPE.

    The squared m(mscale_all_dim) of the softmax scale is apart from this:
    `TextConfig.softmax_scale`.
    """
    scaling = text_config.rope_scaling
    if scaling is None:
        return 1.0
    return scaling.magnitude(scaling.mscale) / scaling.magnitude(scaling.mscale_all_dim)


def rotate(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """Turns the adjacent pairs of ``x [T, H, R]`` by ``positions [T]`` times ``inv_freq [R/2]``.

    Computed in at least float32, rounded once, pairs in place: the order that `mla_latent_write`
    stores, so that the scalar products agree.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    angle = positions.to(wide)[:, None, None] * inv_freq.to(wide)
    pairs = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)
