"""Small legal calls of every op, at any size of their dynamic dimension."""

from __future__ import annotations

from typing import Any

import torch

import kimi_ops
from kimi_ops._dispatch import get_op
from kimi_ops.testing.inputs import int4, mla, moe, norm, vision

F32 = torch.float32


def _grids(n: int) -> tuple[tuple[int, int, int], ...]:
    return tuple((1 + i % 3, 2, 2 + 2 * (i % 4)) for i in range(n))


# op -> arguments for a number of tokens, rows or entries
_BUILDERS: dict[str, Any] = {
    "rms_norm": lambda g, n: norm.rms_norm(g, (n, 64), F32),
    "add_rms_norm": lambda g, n: norm.add_rms_norm(g, (n, 64), F32),
    "silu_mul": lambda g, n: norm.silu_mul(g, (n, 64), F32),
    "mla_latent_write": lambda g, n: mla.mla_latent_write(g, n, (48, 32, 16), 8, F32),
    "mla_absorb_query": lambda g, n: mla.mla_absorb_query(g, n, 4, (16, 8, 32), F32),
    "mla_decode": lambda g, n: mla.mla_decode(g, (9,) * n, 4, 2, 8, (32, 16), F32),
    "mla_project_value": lambda g, n: mla.mla_project_value(g, n, 4, (16, 32), F32),
    "mla_prefill": lambda g, n: mla.mla_prefill(g, (n, 2), (n + 3, 2), 2, (24, 16), F32),
    "merge_attention": lambda g, n: mla.merge_attention(g, (n + 3, 2, 16), F32),
    "moe_route": lambda g, n: moe.moe_route(g, n, 64, 16, 4, F32),
    "moe_select": lambda g, n: moe.moe_select(g, tokens=n, d=64, experts=16, top_k=4, dtype=F32),
    "moe_sort": lambda g, n: moe.moe_sort(g, n, 16, 4),
    "moe_experts_int4": lambda g, n: moe.moe_experts_int4(g, n, 4, 2, dtype=F32, shared=64),
    "int4_linear": lambda g, n: int4.int4_linear(g, (n, 64), 40, F32),
    "vision_pos_embed": lambda g, n: vision.vision_pos_embed(g, _grids(n), 16, (8, 8), F32),
    "vision_rope": lambda g, n: vision.vision_rope(g, _grids(n), 2, 8, F32),
    "vision_attention": lambda g, n: vision.vision_attention(g, (n, 3), 2, 20, F32),
    "patch_merge": lambda g, n: vision.patch_merge(g, _grids(n), 16, F32),
}


def op_args(op: str, size: int) -> tuple[Any, ...]:
    """All arguments of a small legal call, the same ones each time."""
    args: tuple[Any, ...] = _BUILDERS[op](torch.Generator().manual_seed(size), size)
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
