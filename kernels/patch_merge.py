"""Triton kernel of `kimi_ops.patch_merge`: LayerNorm, mean over frames, 2x2 merge, LayerNorm.

    y[token, 2a + b] = LN_pre(mean over frames f of LN_final(x[f, 2i + a, 2j + b]))

Grid: ``(merged_length,)``, one program per output token. It finds its entry in the device's grid
table, and reads the four patches of its 2x2 square in every frame:

    x  frame 0   . . . . . .       y  token (i, j)
                 . A B . . .          [ A | B | C | D ]   4 x D, one contiguous row
                 . C D . . .
       frame 1   . . . . . .          A = LN_pre(mean(LN_final(A of frame 0), LN_final(A of 1), ..))

Bytes: every patch is read once and every token written once, ``2 L D + 8 L' D`` in 16-bit dtypes:
18.9 MB for one 64 x 64 picture, the floor. The four norm vectors come from L2. Neighbouring
programs read neighbouring pairs of patches of the same two picture rows.

Rows of D = 1152 are tiles of 2048: the masked part costs issue slots, no bytes. Statistics are
two-pass in registers, everything is float32 from load to the one rounding at the end (the reference
rounds after the first norm and after the mean).

Source: MoonViT-3D and the patch merger in the Kimi K2.5 report, arXiv 2602.02276.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_ops.kernels._grid import ENTRIES_PER_STEP, locate
from kimi_ops.kernels._tiles import TileChoice

BATCH_INVARIANT = True  # a token's program sees nothing of the others


class Tile(NamedTuple):
    """A program is one token; only its warps are to choose."""

    warps: int


# 8192 elements of a token over 8 warps are 32 per thread: four 16-byte loads in flight each.
_TILE = Tile(8)


def _candidates(width: int, element_bytes: int) -> tuple[Tile, ...]:
    return Tile(4), Tile(8), Tile(16)


TILES = TileChoice("patch_merge", _candidates, row=("width", "element_bytes"))


@triton.jit
def _normalised(x, mask_d, width: tl.constexpr, eps, EXACT: tl.constexpr):
    """Rows ``[4, BLOCK_D]`` float32 with mean 0 and variance 1; masked lanes become 0.

    ``EXACT`` divides; otherwise a rounded reciprocal multiplies, whose error of one float32 unit is
    nothing to a 16-bit result, at a tenth of the instructions.
    """
    mean = tl.sum(x, 1) / width
    centred = tl.where(mask_d, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / width
    deviation = tl.sqrt_rn(variance + eps)[:, None]
    if EXACT:
        normal = tl.div_rn(centred, deviation + tl.zeros_like(centred))
    else:
        normal = centred * (1.0 / deviation)
    return normal


@triton.jit
def patch_merge_kernel(
    x_ptr,  # [L, D]
    grid_ptr,  # [n, 3]
    final_weight_ptr,  # [D], as the next three
    final_bias_ptr,
    pre_weight_ptr,
    pre_bias_ptr,
    y_ptr,  # [L', 4 D]
    length,
    num_entries,
    stride_x_l,
    stride_x_d,
    eps,
    width: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
    EXACT: tl.constexpr,
):
    token = tl.program_id(0)
    # A token is four patches of one frame; the search counts in patches.
    index = token * 4 + tl.zeros([1], tl.int32)
    found, t, h, w, place, first = locate(index, grid_ptr, num_entries, True, STEP)
    found, t, h, w = tl.sum(found, 0), tl.sum(t, 0), tl.sum(h, 0), tl.sum(w, 0)
    place, first = tl.sum(place, 0) // 4, tl.sum(first, 0)
    i = place // tl.maximum(w // 2, 1)
    j = place % tl.maximum(w // 2, 1)

    corner = tl.arange(0, 4)  # 2a + b
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = (offs_d < width)[None, :]
    final_weight = tl.load(final_weight_ptr + offs_d, mask=offs_d < width, other=0.0)
    final_bias = tl.load(final_bias_ptr + offs_d, mask=offs_d < width, other=0.0)
    patch = first + (2 * i + corner // 2) * w + 2 * j + corner % 2  # [4], of frame 0
    total = tl.zeros([4, BLOCK_D], tl.float32)
    for _ in range(tl.where(found != 0, t, 0)):
        # What an entry announces past the end of x counts as 0 in the mean.
        mask = ((patch >= 0) & (patch < length))[:, None] & mask_d
        at_ptr = x_ptr + patch.to(tl.int64)[:, None] * stride_x_l + offs_d[None, :] * stride_x_d
        x = tl.load(at_ptr, mask=mask, other=0.0).to(tl.float32)  # [4, BLOCK_D]
        normal = _normalised(x, mask_d, width, eps, EXACT)
        normal = normal * final_weight.to(tl.float32)[None, :] + final_bias.to(tl.float32)[None, :]
        total += tl.where(mask, normal, 0.0)
        patch += h * w

    normal = _normalised(total / t.to(tl.float32), mask_d, width, eps, EXACT)
    pre_weight = tl.load(pre_weight_ptr + offs_d, mask=offs_d < width, other=0.0)
    pre_bias = tl.load(pre_bias_ptr + offs_d, mask=offs_d < width, other=0.0)
    y = normal * pre_weight.to(tl.float32)[None, :] + pre_bias.to(tl.float32)[None, :]
    y = tl.where(found != 0, y, 0.0)
    offs_y = (token.to(tl.int64) * 4 + corner)[:, None] * width + offs_d[None, :]
    tl.store(y_ptr + offs_y, y.to(y_ptr.dtype.element_ty), mask=mask_d & (corner >= 0)[:, None])


def _arguments(
    y: Tensor,
    x: Tensor,
    grid_thws: Tensor,
    final_weight: Tensor,
    final_bias: Tensor,
    pre_weight: Tensor,
    pre_bias: Tensor,
    eps: float,
) -> dict[str, Any]:
    length, width = x.shape
    return {
        "x_ptr": x,
        "grid_ptr": grid_thws,
        "final_weight_ptr": final_weight,
        "final_bias_ptr": final_bias,
        "pre_weight_ptr": pre_weight,
        "pre_bias_ptr": pre_bias,
        "y_ptr": y,
        "length": length,
        "num_entries": grid_thws.shape[0],
        "stride_x_l": x.stride(0),
        "stride_x_d": x.stride(1),
        "eps": eps,
        "width": width,
        "BLOCK_D": triton.next_power_of_2(width),
        "STEP": ENTRIES_PER_STEP,
        "EXACT": x.dtype == torch.float32,
    }


def unsupported(
    x: Tensor,
    grid_thws: Tensor,
    merged_length: int,
    final_weight: Tensor,
    final_bias: Tensor,
    pre_weight: Tensor,
    pre_bias: Tensor,
    eps: float,
) -> str | None:
    if x.dtype == torch.float64:
        return "patch_merge in Triton computes in float32; x is float64"
    if x.shape[1] > 4096:
        return (
            f"patch_merge in Triton keeps four patches in registers, D up to 4096, got {x.shape[1]}"
        )
    return None


def launch(
    y: Tensor,
    x: Tensor,
    grid_thws: Tensor,
    merged_length: int,
    final_weight: Tensor,
    final_bias: Tensor,
    pre_weight: Tensor,
    pre_bias: Tensor,
    eps: float,
) -> None:
    if y.numel() == 0:
        return
    arguments = _arguments(
        y=y,
        x=x,
        grid_thws=grid_thws.contiguous(),
        final_weight=final_weight.contiguous(),
        final_bias=final_bias.contiguous(),
        pre_weight=pre_weight.contiguous(),
        pre_bias=pre_bias.contiguous(),
        eps=eps,
    )
    tile = TILES.choose(x.device, _TILE, x.shape[1], x.element_size())
    patch_merge_kernel[(merged_length,)](**arguments, num_warps=tile.warps)


def static_cases() -> Iterable[Any]:
    from kimi_ops.testing.static import StaticCase

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.empty(4096, 1152, dtype=dtype, device="meta")
        norms = [torch.empty(1152, dtype=dtype, device="meta") for _ in range(4)]
        arguments = _arguments(
            torch.empty(1024, 4608, dtype=dtype, device="meta"),
            x,
            torch.empty(2, 3, dtype=torch.int64, device="meta"),
            *norms,
            eps=1e-5,
        )
        name = f"1152_{str(dtype).removeprefix('torch.')}"
        yield StaticCase.of_call(name, patch_merge_kernel, arguments, num_warps=_TILE.warps)
