"""The check before the clock: a part of a call's result against the reference in float64.

At the sizes of a benchmark the oracle of the whole result would take minutes. Every element depends
on few others, so that a part is looked at, of some tokens, sequences or heads, together with all
that it is made of. The tolerance is that of the tests (`kimi_ops.testing.oracle`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kimi_ops._dispatch import Op
from kimi_ops.testing.check import RELATIVE, copied, reference_results
from kimi_ops.testing.latent_fp8 import compare_written, is_written_fp8, with_plain_cache
from kimi_ops.testing.oracle import assert_close_to_oracle

Args = list[Any]
Results = tuple[Tensor, ...]
_TOKENS, _QUERIES, _SEQUENCES, _HEADS = 4, 32, 2, 2


def _some(count: int, most: int) -> Tensor:
    """Indices from the first to the last."""
    rows: Tensor = torch.linspace(0, max(count - 1, 0), min(count, most)).round().long().unique()
    return rows


def _tokens(*which: int, most: int = _TOKENS) -> Callable[[Args, Results], tuple[Args, Results]]:
    """Rows of the arguments at these places, and of all results."""

    def part(args: Args, results: Results) -> tuple[Args, Results]:
        rows = _some(len(results[0]), most)
        args = [arg[rows] if place in which else arg for place, arg in enumerate(args)]
        return args, tuple(result[rows] for result in results)

    return part


def _decode(args: Args, results: Results) -> tuple[Args, Results]:
    q, cache, table, lengths, *rest = args
    rows = _some(len(q), _SEQUENCES)
    heads = slice(0, _HEADS)
    page = cache.shape[1]
    used = [-(-int(lengths[row]) // page) for row in rows]
    pages = torch.cat([table[row, :n] for row, n in zip(rows, used, strict=True)])
    mine = torch.zeros(len(rows), max([*used, 1]), dtype=torch.int32)
    first = 0
    for place, n in enumerate(used):
        mine[place, :n] = torch.arange(first, first + n)
        first += n
    if isinstance(rest[0], Tensor):  # mla_decode_value's w_uv
        rest[0] = rest[0][heads]
    args = [q[rows][:, :, heads], cache[pages.long()], mine, lengths[rows], *rest]
    return args, tuple(result[rows][:, :, heads] for result in results)


def _prefill(args: Args, results: Results) -> tuple[Args, Results]:
    """The last queries of the last sequence: they see every key of it."""
    q, k, v, ends_q, ends_k, *_, scale, causal = args
    q0, q1, k0, k1 = (int(n) for n in (*ends_q[-2:], *ends_k[-2:]))
    q0 = max(q0, q1 - _QUERIES) if causal else q0
    heads = slice(0, _HEADS)
    ends = [torch.tensor([0, n], dtype=torch.int32) for n in (q1 - q0, k1 - k0)]
    args = [q[q0:q1, heads], k[k0:k1, heads], v[k0:k1, heads], *ends, q1 - q0, k1 - k0, scale,
            causal]  # fmt: skip
    return args, tuple(result[q0:q1, heads] for result in results)


def _pictures(args: Args, results: Results) -> tuple[Args, Results]:
    """A head of the last picture."""
    q, k, v, ends, _, scale = args
    first, last = int(ends[-2]), int(ends[-1])
    rows, heads = slice(first, last), slice(0, 1)
    end = torch.tensor([0, last - first], dtype=torch.int32)
    args = [*(x[rows, heads] for x in (q, k, v)), end, last - first, scale]
    return args, tuple(result[rows, heads] for result in results)


def _experts(args: Args, results: Results) -> tuple[Args, Results]:
    x, gate_up, gate_up_scale, down, down_scale, weights, ids, *shared, span = args
    rows = _some(len(x), _TOKENS)
    ids = ids[rows].long() - (span[0] if span else 0)
    local = (ids >= 0) & (ids < len(gate_up))
    used = ids[local].unique()
    renamed = torch.where(local, torch.searchsorted(used, ids.clamp(min=0)), -1).int()
    packed = (tensor[used] for tensor in (gate_up, gate_up_scale, down, down_scale))
    return [x[rows], *packed, weights[rows], renamed, *shared, None], (results[0][rows],)


def _whole(args: Args, results: Results) -> tuple[Args, Results]:
    return args, results


_PARTS: dict[str, Callable[[Args, Results], tuple[Args, Results]]] = {
    "add_rms_norm": _tokens(0, 1, most=64),
    "int4_linear": _tokens(0),
    "merge_attention": _tokens(0, 1, 2, 3, most=64),
    "mla_absorb_query": _tokens(0, 2),
    "mla_decode": _decode,
    "mla_decode_value": _decode,
    "mla_prefill": _prefill,
    "mla_project_value": _tokens(0),
    "moe_experts_int4": _experts,
    "moe_route": _tokens(0, most=64),
    "moe_select": _tokens(0, most=64),
    "rms_norm": _tokens(0, most=64),
    "silu_mul": _tokens(0, most=64),
    "vision_attention": _pictures,
}


def check(op: Op, args: Sequence[Any], results: Results) -> float:
    """The largest share of the tolerance that a call has used.

    Args:
        op: what was called.
        args: its arguments as they were before, on any device.
        results: outputs, then written arguments.

    Raises:
        AssertionError: a wrong result, with its worst element.
    """
    here = [arg.cpu() if isinstance(arg, Tensor) else arg for arg in args]
    found = tuple(result.cpu() for result in results)
    part, found = _PARTS.get(op.name, _whole)(here, found)
    fp8 = is_written_fp8(op, part)
    plain = with_plain_cache(op, part) if fp8 else part
    oracle = reference_results(op, copied(plain, "cpu", exact=True))
    baseline = reference_results(op, copied(plain, "cpu"))
    outputs = len(oracle) - len(op.mutates)
    worst = 0.0
    for number, tensors in enumerate(zip(found, baseline, oracle, strict=True)):
        title = f"{op.name} result {number}"
        if fp8 and number >= outputs:
            compared = compare_written(title, op, copied(part, "cpu"), *tensors)
        else:
            compared = [assert_close_to_oracle(title, *tensors, relative=op.name in RELATIVE)]
        worst = max([worst, *(one.ratio for one in compared if one.budget)])
    return worst
