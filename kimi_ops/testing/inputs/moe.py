"""Inputs of the router and of the experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kimi_ops.testing.inputs import DTYPE_NAMES, add, normal
from kimi_ops.testing.inputs.int4 import weights

BF16 = torch.bfloat16
_SCALE = 2.827
_GAP = 1e-4  # between neighbouring biased scores, above any float32 GEMM's error here


def _separated(
    generator: torch.Generator, x: Tensor, gate: Tensor, bias: Tensor, top_k: int
) -> Tensor:
    """Redraws the rows of ``x`` whose best scores are so close that rounding could swap them.

    Selection is a discontinuous function: on a near tie two correct routers may differ.
    """
    for _ in range(100):
        choice = (x.double() @ gate.double().T).sigmoid() + bias.double()
        best = choice.sort(dim=-1, descending=True).values[:, : top_k + 1]
        close = (best[:, :-1] - best[:, 1:] < _GAP).any(1)
        if not bool(close.any()):
            return x
        x[close] = normal(generator, int(close.sum()), x.shape[1], dtype=x.dtype)
    raise RuntimeError("no rows without near ties found")


def moe_route(
    generator: torch.Generator,
    tokens: int,
    d: int,
    experts: int,
    top_k: int,
    dtype: torch.dtype = BF16,
    groups: tuple[int, int] = (1, 1),
    normalize: bool = True,
) -> tuple[Any, ...]:
    """Ordinary rows without near ties."""
    gate = normal(generator, experts, d, dtype=dtype, std=1.5 * d**-0.5)
    bias = normal(generator, experts, dtype=torch.float32, std=0.1)
    x = normal(generator, tokens, d, dtype=dtype)
    if tokens and experts > top_k:
        x = _separated(generator, x, gate, bias, top_k)
    return x, gate, bias, top_k, *groups, _SCALE, normalize


def moe_route_special(generator: torch.Generator, special: str) -> tuple[Any, ...]:
    """Values that float32 adds without rounding, so that ties are ties for every kernel."""
    x = torch.randint(-2, 3, (9, 64), generator=generator).to(BF16)
    gate = torch.randint(-1, 2, (48, 64), generator=generator).to(BF16) / 8
    bias = torch.zeros(48)
    if special == "ties":
        gate[10:20] = gate[10]  # ten experts with one score
        x[0] = 0  # every expert with one score
        bias[10] = -0.0
    elif special == "nan-rows":
        x[0], x[4, 3], x[8] = torch.nan, torch.nan, torch.inf
    elif special == "one-nan-expert":
        gate[7, 0] = torch.nan
    elif special == "near-one":
        # Logits of 18 and more: sigmoids that differ in float64 and are all 1 in float32.
        x[:], gate[:] = 1, 0
        gate[:, 0] = torch.arange(18, 66)
    elif special == "nan-in-kept-group":
        x[:], gate[:] = 1, 0
        gate[36:, 0] = 3
        gate[40, 0] = torch.nan
        return x, gate, bias, 6, 4, 1, _SCALE, True
    elif special == "masked-in-kept-group":
        x[:], gate[:] = 1, 0
        gate[36:, 0] = torch.arange(12).flip(0)
        bias[38:46] = -torch.inf
        return x, gate, bias, 6, 4, 1, _SCALE, True
    elif special == "masked-experts":
        bias[:40] = -torch.inf
    elif special == "saturated":
        gate *= 1000  # sigmoids of exactly 0 and 1
        bias = torch.arange(48, 0, -1) / 64.0
    elif special.startswith("no-columns"):
        x, gate = x[:, :0], gate[:, :0]  # every logit is 0
        if special.endswith("-2"):
            x = x[:2]
    return x, gate, bias, 6, 1, 1, _SCALE, True


def moe_route_sort(
    generator: torch.Generator,
    special: str = "",
    expert_range: tuple[int, int] | None = None,
    **options: Any,
) -> tuple[Any, ...]:
    """The arguments of a `moe_route` case, and the local experts."""
    args = moe_route_special(generator, special) if special else moe_route(generator, **options)
    return *args, None if expert_range is None else list(expert_range)


def moe_select(generator: torch.Generator, special: str = "", **options: Any) -> tuple[Any, ...]:
    """The logits of a `moe_route` case."""
    if special:
        x, gate, *rest = moe_route_special(generator, special)
    else:
        x, gate, *rest = moe_route(generator, **options)
    return x.float() @ gate.float().T, *rest


def moe_sort(
    generator: torch.Generator,
    tokens: int,
    experts: int,
    top_k: int,
    routing: str = "uniform",
    expert_range: tuple[int, int] | None = None,
) -> tuple[Any, ...]:
    """The ids of `routed_ids`."""
    ids = routed_ids(generator, tokens, experts, top_k, routing)
    return ids, experts, None if expert_range is None else list(expert_range)


def routed_ids(
    generator: torch.Generator, tokens: int, experts: int, top_k: int, routing: str
) -> Tensor:
    """``[T, K]`` int32: uniform, skewed to the first experts, all on one, or with foreign ids."""
    chance = torch.ones(experts)
    if routing == "skewed":
        chance = 1 / torch.arange(1, experts + 1) ** 1.5
    ids = torch.multinomial(chance.expand(max(tokens, 1), -1), top_k, generator=generator)
    ids = ids[:tokens].int()
    if routing == "one-expert":
        ids[:] = experts - 1  # every choice of every token, more than a router would do
    if routing == "foreign":
        ids[::2, 0] = -1
        ids[1::3, -1] = experts + 5
        ids[2::5] = 2**31 - 1
    return ids


def moe_experts_int4(
    generator: torch.Generator,
    tokens: int,
    experts: int,
    top_k: int,
    d: int = 128,
    f: int = 64,
    dtype: torch.dtype = BF16,
    routing: str = "uniform",
    shared: int = 0,
    expert_range: tuple[int, int] | None = None,
    scale_dtype: torch.dtype = BF16,
    weights_dtype: torch.dtype = torch.float32,
) -> tuple[Any, ...]:
    """Extreme nibbles and scales in the first rows; NaN scales where no token goes."""
    ids = routed_ids(generator, tokens, experts, top_k, routing)
    first, last = expert_range or (0, experts)
    local = last - first
    gate_up, gate_up_scale = weights(generator, local, 2 * f, d, scale_dtype=scale_dtype)
    down, down_scale = weights(generator, local, d, f, scale_dtype=scale_dtype)
    for expert in range(local):
        if not bool((ids == expert + first).any()):
            gate_up_scale[expert] = torch.nan
            down_scale[expert] = torch.nan
    return (
        normal(generator, tokens, d, dtype=dtype),
        gate_up,
        gate_up_scale,
        down,
        down_scale,
        torch.rand((tokens, top_k), generator=generator, dtype=weights_dtype) * _SCALE,
        ids,
        normal(generator, 2 * shared, d, dtype=dtype, std=d**-0.5) if shared else None,
        normal(generator, d, shared, dtype=dtype, std=shared**-0.5) if shared else None,
        None if expert_range is None else list(expert_range),
    )


_KIMI: dict[str, Any] = {"d": 7168, "experts": 384, "top_k": 8}
for _dtype, _name in DTYPE_NAMES.items():
    _small: dict[str, Any] = {"tokens": 9, "d": 256, "experts": 64, "top_k": 8, "dtype": _dtype}
    add("moe_route", f"{_name}-9x64", moe_route, **_small)
    _small = {"tokens": 9, "experts": 8, "top_k": 3, "dtype": _dtype}
    add("moe_experts_int4", f"{_name}-9", moe_experts_int4, **_small)
for _op, _build in (("moe_route", moe_route), ("moe_select", moe_select)):
    add(_op, "bf16-kimi-1", _build, tokens=1, **_KIMI)
    add(_op, "bf16-kimi-17", _build, tokens=17, **_KIMI)
    add(_op, "bf16-kimi-256", _build, tokens=256, **_KIMI, full=True)
    add(_op, "bf16-257", _build, tokens=257, d=64, experts=48, top_k=6, work=1 << 20)
    add(_op, "bf16-none", _build, tokens=0, d=64, experts=16, top_k=2)
    add(_op, "bf16-all", _build, tokens=5, d=64, experts=8, top_k=8)
    add(_op, "bf16-one-expert", _build, tokens=5, d=64, experts=1, top_k=1)
    add(_op, "bf16-144", _build, tokens=33, d=96, experts=144, top_k=6)
    add(_op, "bf16-1024", _build, tokens=3, d=128, experts=1024, top_k=32, normalize=False)
    add(_op, "bf16-groups", _build, tokens=33, d=128, experts=64, top_k=8, groups=(8, 4))
    add(_op, "bf16-groups-of-1", _build, tokens=9, d=64, experts=8, top_k=2, groups=(8, 3))
_SPECIALS = ("ties", "nan-rows", "one-nan-expert", "masked-experts", "saturated", "near-one",
             "nan-in-kept-group", "masked-in-kept-group")  # fmt: skip
for _special in _SPECIALS:
    add("moe_route", _special, moe_route_special, special=_special)
    add("moe_select", _special, moe_select, special=_special)
for _special in ("no-columns", "no-columns-2"):
    add("moe_route", _special, moe_route_special, special=_special)

# The router has the hostile rows; these are the sizes and ranges that the tables depend on.
_RS = moe_route_sort
for _dtype, _name in DTYPE_NAMES.items():
    add("moe_route_sort", f"{_name}-9x64", _RS, tokens=9, d=256, experts=64, top_k=8, dtype=_dtype,
        full=_name != "bf16")  # fmt: skip
for _special in ("ties", "nan-rows"):
    add("moe_route_sort", _special, _RS, special=_special, expert_range=(5, 30))
add("moe_route_sort", "bf16-kimi-1", _RS, tokens=1, **_KIMI, full=True)
add("moe_route_sort", "bf16-none", _RS, tokens=0, d=64, experts=16, top_k=2)
add("moe_route_sort", "bf16-one-expert", _RS, tokens=5, d=64, experts=1, top_k=1, full=True)
add("moe_route_sort", "bf16-4", _RS, tokens=4, d=96, experts=144, top_k=6, expert_range=(100, 144))
add("moe_route_sort", "bf16-16", _RS, tokens=16, d=64, experts=384, top_k=8, expert_range=(0, 48),
    full=True)  # fmt: skip
add("moe_route_sort", "bf16-64", _RS, tokens=64, d=64, experts=384, top_k=8)
add("moe_route_sort", "bf16-65", _RS, tokens=65, d=64, experts=48, top_k=6)
add("moe_route_sort", "bf16-64-32", _RS, tokens=64, d=64, experts=96, top_k=32, groups=(4, 3),
    full=True)  # fmt: skip
add("moe_route_sort", "bf16-1024", _RS, tokens=3, d=128, experts=1024, top_k=32, groups=(2, 1),
    expert_range=(1000, 1024), full=True)  # fmt: skip
add("moe_route_sort", "bf16-empty-range", _RS, tokens=9, d=64, experts=48, top_k=6,
    expert_range=(7, 7), full=True)  # fmt: skip

for _routing in ("uniform", "skewed", "one-expert", "foreign"):
    add("moe_sort", _routing, moe_sort, tokens=65, experts=48, top_k=6, routing=_routing)
    add("moe_sort", f"{_routing}-range", moe_sort, tokens=33, experts=48, top_k=6,
        routing=_routing, expert_range=(8, 20))  # fmt: skip
    add("moe_experts_int4", f"bf16-{_routing}", moe_experts_int4, tokens=33, experts=8, top_k=3,
        routing=_routing)  # fmt: skip
add("moe_sort", "none", moe_sort, tokens=0, experts=8, top_k=2)
add("moe_sort", "one", moe_sort, tokens=1, experts=384, top_k=8)
add("moe_sort", "kimi-1025", moe_sort, tokens=1025, experts=384, top_k=8, routing="skewed",
    work=1 << 21)  # fmt: skip
add("moe_sort", "empty-range", moe_sort, tokens=5, experts=8, top_k=2, expert_range=(3, 3))

_E = moe_experts_int4
add("moe_experts_int4", "bf16-none", _E, tokens=0, experts=4, top_k=2)
add("moe_experts_int4", "bf16-one", _E, tokens=1, experts=16, top_k=4)
add("moe_experts_int4", "bf16-shared", _E, tokens=17, experts=8, top_k=3, shared=96)
# The shared expert's columns: several whole chunks of 256 and a rest, by two warps; one and a rest.
add("moe_experts_int4", "bf16-shared-long", _E, tokens=2, experts=3, top_k=2, d=1056, f=32,
    shared=264, work=1 << 18)  # fmt: skip
add("moe_experts_int4", "bf16-range", _E, tokens=17, experts=12, top_k=3, shared=64,
    expert_range=(4, 8))  # fmt: skip
add("moe_experts_int4", "bf16-empty-range", _E, tokens=3, experts=12, top_k=3,
    expert_range=(4, 4))  # fmt: skip
add("moe_experts_int4", "bf16-odd-groups", _E, tokens=5, experts=4, top_k=2, d=160, f=96)
add("moe_experts_int4", "bf16-300", _E, tokens=300, experts=3, top_k=2, d=64, f=32, shared=32)
add("moe_experts_int4", "bf16-no-width", _E, tokens=3, experts=3, top_k=2, d=64, f=0, shared=32)
add("moe_experts_int4", "bf16-scale-fp16", _E, tokens=5, experts=4, top_k=2,
    scale_dtype=torch.float16)  # fmt: skip
add("moe_experts_int4", "bf16-scale-fp32", _E, tokens=5, experts=4, top_k=2,
    scale_dtype=torch.float32, weights_dtype=torch.float64)  # fmt: skip
add("moe_experts_int4", "bf16-129", _E, tokens=129, experts=4, top_k=2, d=256, f=128)
add("moe_experts_int4", "bf16-steps", _E, tokens=20, experts=3, top_k=2, d=512, f=128,
    routing="foreign")  # fmt: skip
add("moe_experts_int4", "fp16-steps", _E, tokens=17, experts=6, top_k=2, d=256, f=256, shared=64,
    dtype=torch.float16, scale_dtype=torch.float16, expert_range=(1, 5))  # fmt: skip
add("moe_experts_int4", "bf16-kimi-width-256", _E, tokens=3, experts=4, top_k=2, d=7168, f=256)
add("moe_experts_int4", "bf16-kimi-2", _E, tokens=2, experts=4, top_k=2, d=7168, f=2048,
    shared=2048, full=True)  # fmt: skip
add("moe_experts_int4", "bf16-kimi-65", _E, tokens=65, experts=4, top_k=2, d=7168, f=2048,
    full=True)  # fmt: skip
