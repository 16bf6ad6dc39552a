"""Comparison of what was written into a cache in the fp8 format with the oracle.

Codes cannot be compared as integers: where the latent in 16 bits is rounded the other way, a code
may be the neighbouring one. So the oracle is the latent before it is quantised, and a code may add
to the latent's ordinary budget what rounding to nearest can add, half a step of e4m3::

    |code * scale - latent| <= step(latent / scale) / 2 * scale + budget of a 16-bit latent
    |448 * scale - max|latent|| <= the largest budget in the row

A truncated code or the scale of another row is outside. The rope values are an ordinary result, and
what is not written must keep its bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kimi_ops._dispatch import Op
from kimi_ops.quant.latent_fp8 import LARGEST, SCALE_BYTES, SMALLEST_SCALE, pack, unpack
from kimi_ops.testing.oracle import (
    Comparison,
    assert_close_to_oracle,
    assert_no_lean,
    budget_of,
    worst_within,
)

_FLOAT32 = 2.0**-22  # two roundings of float32 for the scale, and two for its reciprocal


def is_written_fp8(op: Op, args: Sequence[Any]) -> bool:
    """Whether a call writes a cache in the fp8 format."""
    return any(args[op.params.index(name)].dtype == torch.uint8 for name in op.mutates)


def with_plain_cache(op: Op, args: Sequence[Any]) -> list[Any]:
    """The arguments of `mla_latent_write` with a cache in the dtype of the activations."""
    named = dict(zip(op.params, args, strict=True))
    width = len(named["kv_norm_weight"]) + 2 * len(named["inv_freq"])
    shape = (*named["kv_cache"].shape[:2], width)
    return list((named | {"kv_cache": named["qkv_a"].new_zeros(shape)}).values())


def compare_written(
    name: str, op: Op, args: Sequence[Any], actual: Tensor, baseline: Tensor, oracle: Tensor
) -> list[Comparison]:
    """Asserts that a cache in the fp8 format holds what it should.

    Args:
        name: for the messages.
        op, args: the call of `mla_latent_write`, its cache as it was before.
        actual: ``[num_pages, P, C+16+2R]`` uint8, the cache afterwards.
        baseline, oracle: ``[num_pages, P, C+R]``, what plain torch and the reference in float64
            write into a cache of their dtype.

    Returns:
        The worst latent and the worst rope value.

    Raises:
        AssertionError: what was wrong, with the element.
    """
    named = dict(zip(op.params, args, strict=True))
    rank, slots = len(named["kv_norm_weight"]), named["slot_mapping"].long()
    before, flat = named["kv_cache"].flatten(0, 1), actual.flatten(0, 1)
    slots = slots[(slots >= 0) & (slots < len(flat))]
    kept = torch.ones(len(flat), dtype=torch.bool).index_fill(0, slots, False)
    assert torch.equal(flat[kept], before[kept]), f"{name}: a token's bytes changed unasked"
    if len(slots) == 0:
        return []
    entry, naive, exact = (x.flatten(0, 1)[slots] for x in (actual, baseline, oracle))
    rope = entry[:, rank + SCALE_BYTES :].contiguous().view(torch.bfloat16)
    worst_rope = assert_close_to_oracle(
        f"{name} rope", rope, naive[:, rank:].bfloat16(), exact[:, rank:]
    )
    return [_compare_latents(name, entry, rank, naive[:, :rank], exact[:, :rank]), worst_rope]


def _compare_latents(
    name: str, entry: Tensor, rank: int, baseline: Tensor, oracle: Tensor
) -> Comparison:
    codes = entry[:, :rank].contiguous().view(torch.float8_e4m3fn).double()
    scales = entry[:, rank : rank + SCALE_BYTES].contiguous().view(torch.float32).double()
    scale = scales[:, :1]
    bits = entry[:, rank : rank + SCALE_BYTES].contiguous().view(torch.int32)
    assert torch.equal(bits, bits[:, :1].expand_as(bits)), f"{name}: copies of a scale differ"
    finite = oracle.to(baseline.dtype).isfinite().all(-1)
    assert torch.equal(finite, scale[:, 0].isfinite()), f"{name}: NaN scales misplaced"
    assert torch.equal(finite[:, None].expand_as(codes), codes.isfinite()), f"{name}: NaN codes"

    codes, scale, baseline, oracle = (x[finite] for x in (codes, scale, baseline, oracle))
    if len(codes) == 0:
        return Comparison(name, (), 0.0, 0.0, 0.0, 0.0, 0)
    plain = budget_of(baseline.double() - oracle, oracle, baseline.dtype)
    largest = oracle.abs().amax(-1, keepdim=True)
    expected = (largest / LARGEST).clamp(min=SMALLEST_SCALE)
    allowed = plain.amax(-1, keepdim=True) / LARGEST + _FLOAT32 * expected
    worst_within(f"{name} scale", scale, expected, scale - expected, allowed)

    exponent = (oracle.abs() / scale).log2().floor().clamp(-6, 8)
    half_step = torch.exp2(exponent - 4) * scale
    values = codes * scale
    budget = half_step + plain + _FLOAT32 * oracle.abs()
    worst = worst_within(f"{name} latent", values, oracle, values - oracle, budget)
    naive = unpack(pack(baseline, rank), rank, torch.float64) - oracle
    rounding = torch.finfo(baseline.dtype).eps / 2
    assert_no_lean(f"{name} latent", values - oracle, naive, oracle, rounding)
    return worst
