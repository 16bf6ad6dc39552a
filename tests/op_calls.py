"""Small legal calls of every op, at any size of their dynamic dimension; and what several files
need of single ops' calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kimi_ops
from kimi_ops._dispatch import get_op
from kimi_ops.quant import latent_fp8
from kimi_ops.reference.mla_decode import mla_decode
from kimi_ops.testing import check
from kimi_ops.testing.inputs import int4, mla, moe, norm, vision
from kimi_ops.testing.oracle import assert_close_to_oracle
from kimi_ops.testing.runner import emulated


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
    "moe_route_sort": lambda g, n, t: moe.moe_route_sort(
        g, tokens=n, d=64, experts=16, top_k=4, dtype=t
    ),
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


def on_device(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments where the kernels of the ``backend`` fixture run, which ``--device`` names."""
    return tuple(a.to(check.DEVICE) if isinstance(a, torch.Tensor) else a for a in args)


def clone(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with their tensors copied."""
    return tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)


def tensors(result: Any) -> tuple[torch.Tensor, ...]:
    """An op's result as a tuple."""
    if result is None:
        return ()
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


class Requests(TorchDispatchMode):
    """Operators that torch is asked for in a block, in order, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Any] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if not function.is_view:
            self.made.append(function)
        return function(*args, **(kwargs or {}))


def experts_call(
    tokens: int, experts: int, top_k: int, d: int, f: int, **options: Any
) -> tuple[Any, ...]:
    """Arguments of `moe_experts_int4`, the same ones each time."""
    generator = torch.Generator().manual_seed(7)
    return moe.moe_experts_int4(generator, tokens, experts, top_k, d, f, **options)


def mla_decode_call(
    lengths: tuple[int, ...],
    heads: int,
    new: int = 1,
    page: int = 64,
    widths: tuple[int, int] = (512, 64),
    columns: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    fp8: bool = False,
) -> tuple[Any, ...]:
    """Arguments of `mla_decode`: sequence b depends on ``lengths[b]`` alone; the page table has at
    least ``columns``."""
    rank, rope = widths
    columns = max(columns, *(-(-n // page) for n in lengths), 1)
    cache = torch.full((len(lengths) * columns, page, rank + rope), torch.nan, dtype=dtype)
    table = torch.arange(len(cache)).flip(0).int().view(len(lengths), columns)
    queries = []
    for b, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(length)
        values = torch.randn(length, rank + rope, generator=generator).to(dtype)
        for first in range(0, length, page):
            chunk = values[first : first + page]
            cache[table[b, first // page], : len(chunk)] = chunk
        queries.append(torch.randn(new, heads, rank + rope, generator=generator).to(dtype) / 4)
    if fp8:
        cache = latent_fp8.pack(cache, rank)
    return torch.stack(queries), cache, table, torch.tensor(lengths).int(), 0.1446796, rank


def run_mla_decode(
    kernels: Any, args: tuple[Any, ...], arch: int = 80, seed: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, list[tuple[str, Any]]]:
    """Outputs, and names and reports of the launches, of one call of a backend in the emulator."""
    out = torch.empty(*args[0].shape[:3], args[5], dtype=args[0].dtype)
    lse = torch.empty(args[0].shape[:3])
    with emulated(arch=arch, seed=seed) as emulation:
        kernels.launch((out, lse), *args)
    return out, lse, emulation.launches


def assert_mla_decode(args: tuple[Any, ...], out: torch.Tensor, lse: torch.Tensor) -> None:
    """That results of `mla_decode` are within the budget."""
    cache = args[1] if args[1].dtype == torch.uint8 else args[1].double()
    exact = mla_decode(args[0].double(), cache, *args[2:])
    for result, naive, oracle in zip((out, lse), mla_decode(*args), exact, strict=True):
        assert_close_to_oracle("mla_decode", result, naive.to(result.dtype), oracle)
