"""Small legal calls of every op, at any size of their dynamic dimension."""

from __future__ import annotations

from typing import Any

import torch

import kimi_ops
from kimi_ops._dispatch import get_op
from kimi_ops.testing.inputs import int4, mla, moe, norm, vision


def _grids(n: int) -> tuple[tuple[int, int, int], ...]:
    return tuple((1 + i % 3, 2, 2 + 2 * (i % 4)) for i in range(n))


# op -> arguments for a number of tokens, rows or entries, and a dtype
_BUILDERS: dict[str, Any] = {
    "rms_norm": lambda g, n, t: norm.rms_norm(g, (n, 64), t),
    "add_rms_norm": lambda g, n, t: norm.add_rms_norm(g, (n, 64), t),
    "silu_mul": lambda g, n, t: norm.silu_mul(g, (n, 64), t),
    "mla_latent_write": lambda g, n, t: mla.mla_latent_write(g, n, (48, 32, 16), 8, t),
    "mla_absorb_query": lambda g, n, t: mla.mla_absorb_query(g, n, 4, (16, 8, 32), t),
    "mla_decode": lambda g, n, t: mla.mla_decode(g, (9,) * n, 4, 2, 8, (32, 16), t),
    "mla_decode_value": lambda g, n, t: mla.mla_decode_value(
        g, (9,) * n, 4, 24, new=2, page=8, widths=(32, 16), dtype=t
    ),
    "mla_project_value": lambda g, n, t: mla.mla_project_value(g, n, 4, (16, 32), t),
    "mla_prefill": lambda g, n, t: mla.mla_prefill(g, (n, 2), (n + 3, 2), 2, (24, 16), t),
    "merge_attention": lambda g, n, t: mla.merge_attention(g, (n + 3, 2, 16), t),
    "moe_route": lambda g, n, t: moe.moe_route(g, n, 64, 16, 4, t),
    "moe_select": lambda g, n, t: moe.moe_select(g, tokens=n, d=64, experts=16, top_k=4, dtype=t),
    "moe_sort": lambda g, n, t: moe.moe_sort(g, n, 16, 4),
    "moe_experts_int4": lambda g, n, t: moe.moe_experts_int4(g, n, 4, 2, 64, 32, t, shared=32),
    "int4_linear": lambda g, n, t: int4.int4_linear(g, (n, 64), 40, t),
    "vision_pos_embed": lambda g, n, t: vision.vision_pos_embed(g, _grids(n), 16, (8, 8), t),
    "vision_rope": lambda g, n, t: vision.vision_rope(g, _grids(n), 2, 8, t),
    "vision_attention": lambda g, n, t: vision.vision_attention(g, (n, 3), 2, 20, t),
    "patch_merge": lambda g, n, t: vision.patch_merge(g, _grids(n), 16, t),
}


def op_args(op: str, size: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """All arguments of a small legal call, the same ones each time."""
    args: tuple[Any, ...] = _BUILDERS[op](torch.Generator().manual_seed(size), size, dtype)
    if op == "mla_latent_write":  # opcheck takes equal NaNs for a difference
        slots = torch.arange(3, 3 + size, dtype=torch.int32)
        args = (*args[:5], slots, torch.zeros_like(args[6]), args[7])
    return args


def call(op: str, args: tuple[Any, ...]) -> Any:
    """Calls the public function, whose later arguments are keyword-only."""
    function = getattr(kimi_ops, op)
    positional = function.__code__.co_argcount
    named = dict(zip(get_op(op).params[positional:], args[positional:], strict=True))
    return function(*args[:positional], **named)


def clone(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with their tensors copied."""
    return tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)


def tensors(result: Any) -> tuple[torch.Tensor, ...]:
    """An op's result as a tuple."""
    if result is None:
        return ()
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)
