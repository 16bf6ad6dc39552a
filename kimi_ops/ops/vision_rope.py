"""Two-dimensional RoPE of the vision encoder, in place on packed q, k, v."""

from __future__ import annotations

from torch import Tensor

from kimi_ops._dispatch import define_op


def outputs(qkv: Tensor, grid_thws: Tensor) -> None:
    return None


_op = define_op(
    "vision_rope(Tensor(a!) qkv, Tensor grid_thws) -> ()",
    checks={
        "qkv": "[L, 3, H, head_dim] float",
        "grid_thws": "[n, 3] int",
        "head_dim": "head_dim % 4 == 0",
    },
    outputs=outputs,
)


def vision_rope(qkv: Tensor, grid_thws: Tensor) -> None:
    """Rotates q and k of every patch by its column and row; v stays.

    Adjacent dims (2m, 2m+1) are pair m. Pair 2i turns by ``column * p_i`` and pair 2i+1 by
    ``row * p_i``, ``p_i = 10000^(-4i/head_dim)``, in float32. All frames of a clip turn alike.

    Args:
        qkv: ``[L, 3, H, head_dim]`` bfloat16, float16, float32 or float64, **written**; q, k, v in
            that order, ``head_dim`` a multiple of 4 (72 in Kimi K2.5).
        grid_thws: ``[n, 3]`` int32 or int64: (t, h, w) of each entry, in patches, all positive;
            other values give undefined numbers.
            Rows of ``qkv`` past the last entry stay as they are.

    Raises:
        ValueError, TypeError: a shape, dtype or device other than stated.

    Gradients: to ``qkv``, as of any in-place operation of torch.

    Source: RoFormer, arXiv 2104.09864, in two dimensions; MoonViT, arXiv 2504.07491.
    """
    _op(qkv, grid_thws)
