"""Launches `csrc/cpu/moe_experts_int4.cpp`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kimi_ops import _native
from kimi_ops._batch_invariant import is_batch_invariant
from kimi_ops.cpu._support import dense_last, dense_refusal, refusal

BATCH_INVARIANT = True  # then every expert takes one path, however many tokens it has


def unsupported(
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
) -> str | None:
    return refusal("moe_experts_int4", x) or dense_refusal(
        "moe_experts_int4",
        gate_up_packed=gate_up_packed,
        gate_up_scale=gate_up_scale,
        down_packed=down_packed,
        down_scale=down_scale,
    )


def launch(
    y: Tensor,
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
) -> None:
    if y.numel() == 0:
        return
    x = dense_last(x)
    shared_gate_up = None if shared_gate_up is None else dense_last(shared_gate_up)
    shared_down = None if shared_down is None else dense_last(shared_down)
    _native.call(
        "moe_experts_int4",
        dtype=x.dtype,
        y=y,
        x=x,
        gate_up_packed=gate_up_packed,
        gate_up_scale=gate_up_scale,
        down_packed=down_packed,
        down_scale=down_scale,
        weights=weights.float().contiguous(),
        ids=ids.contiguous(),
        shared_gate_up=shared_gate_up,
        shared_down=shared_down,
        tokens=x.shape[0],
        depth=x.shape[1],
        width=down_packed.shape[2] * 8,
        experts=down_packed.shape[0],
        choices=ids.shape[1],
        shared_width=0 if shared_down is None else shared_down.shape[1],
        first_expert=expert_range[0] if expert_range else 0,
        stride_x=x.stride(0),
        stride_gate_up_e=gate_up_packed.stride(0),
        stride_gate_up=gate_up_packed.stride(1),
        stride_gate_up_scale_e=gate_up_scale.stride(0),
        stride_gate_up_scale=gate_up_scale.stride(1),
        stride_down_e=down_packed.stride(0),
        stride_down=down_packed.stride(1),
        stride_down_scale_e=down_scale.stride(0),
        stride_down_scale=down_scale.stride(1),
        stride_shared_gate_up=0 if shared_gate_up is None else shared_gate_up.stride(0),
        stride_shared_down=0 if shared_down is None else shared_down.stride(0),
        scale_dtype=gate_up_scale.dtype,
        one_path=is_batch_invariant(),
    )
