"""The routed experts on int4 weights, and optionally the shared expert beside them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kimi_ops._dispatch import define_op
from kimi_ops.ops.moe_sort import EXPERT_RANGE_RULE


def outputs(
    x: Tensor,
    gate_up_packed: Tensor,
    gate_up_scale: Tensor,
    down_packed: Tensor,
    down_scale: Tensor,
    weights: Tensor,
    ids: Tensor,
    shared_gate_up: Tensor | None,
    shared_down: Tensor | None,
    expert_range: Sequence[int] | None,
) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_op = define_op(
    "moe_experts_int4(Tensor x, Tensor gate_up_packed, Tensor gate_up_scale, Tensor down_packed,"
    " Tensor down_scale, Tensor weights, Tensor ids, Tensor? shared_gate_up=None,"
    " Tensor? shared_down=None, int[]? expert_range=None) -> Tensor",
    checks={
        "shared_gate_up and shared_down": "(shared_gate_up is None) == (shared_down is None)",
        "x": "[T, D] float",
        "gate_up_packed": "[E, 2*F, D/8] int32",
        "gate_up_scale": "[E, 2*F, D/32] bfloat16|float16|float32",
        "down_packed": "[E, D, F/8] int32",
        "down_scale": "[E, D, F/32] like gate_up_scale",
        "weights": "[T, K] float32|float64",
        "ids": "[T, K] int32",
        "shared_gate_up": "optional [2*F_shared, D] like x",
        "shared_down": "optional [D, F_shared] like x",
        "D": "D % 32 == 0",
        "F": "F % 32 == 0",
        "expert_range": EXPERT_RANGE_RULE,
        "expert_range and E": "expert_range is None or expert_range[1] - expert_range[0] == E",
    },
    outputs=outputs,
)


def moe_experts_int4(
    x: Tensor,
    gate_up_packed: Tensor,
    gate_up_scale: Tensor,
    down_packed: Tensor,
    down_scale: Tensor,
    weights: Tensor,
    ids: Tensor,
    *,
    shared_gate_up: Tensor | None = None,
    shared_down: Tensor | None = None,
    expert_range: tuple[int, int] | None = None,
) -> Tensor:
    """``y[t] = sum_k weights[t, k] * E_ids[t, k](x[t]) + E_shared(x[t])``.

    ``E(x) = down @ (silu(gate @ x) * (up @ x))``. The weight multiplies the expert's output; the
    shared expert has no weight. Weights are int4 in groups of 32 along the input, in the layout
    of `kimi_ops.quant.int4`.

    Args:
        x: ``[T, D]`` bfloat16, float16, float32 or float64; T = 0 allowed. An infinity in a row
            gives infinities or NaN in that token's result.
        gate_up_packed: ``[E, 2F, D/8]`` int32, the F gate rows of an expert first.
        gate_up_scale: ``[E, 2F, D/32]`` bfloat16, float16 or float32.
        down_packed: ``[E, D, F/8]`` int32.
        down_scale: ``[E, D, F/32]``, dtype of ``gate_up_scale``.
        weights: ``[T, K]`` float32 or float64.
        ids: ``[T, K]`` int32. An id outside the local experts contributes nothing. An expert
            chosen twice by a token contributes twice.
        shared_gate_up: ``[2F', D]``, dtype of ``x``; gate rows first. Together with:
        shared_down: ``[D, F']``, dtype of ``x``.
        expert_range: ``(first, last + 1)`` of the E experts given here within all experts, for
            expert parallelism; ``(0, E)`` if None. The shared expert belongs to one rank only.

    Returns:
        ``[T, D]`` contiguous, dtype of ``x``, accumulated in at least float32, bitwise equal from
        run to run.

    Raises:
        ValueError, TypeError: a shape, dtype or device other than stated, or D or F that is not a
            multiple of 32.

    Gradients: to ``x``, ``weights`` and the shared expert; the int4 experts are frozen.

    Source: DeepSeek-V3, arXiv 2412.19437 section 2.1.2; compressed-tensors ``pack-quantized``.
    """
    y: Tensor = _op(
        x,
        gate_up_packed,
        gate_up_scale,
        down_packed,
        down_scale,
        weights,
        ids,
        shared_gate_up,
        shared_down,
        expert_range,
    )
    return y
