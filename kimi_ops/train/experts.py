"""The routed experts with trainable weights: what `kimi_ops.moe_experts_int4` computes from frozen
ones, with gradients to all of it.

Pairs of a token and an expert that it chose are sorted by expert once, so that each expert's are
neighbouring rows of one array; the products are torch's own, one expert after the other. All that
happens to an expert's rows happens while they are in the cache, which is faster on a CPU than one
operation after the other over all rows (by about a fifth for 4,096 tokens, 4 of 32 experts each, of
width 96).

With ``h = gate_up x[t]``, ``a = silu_mul(h)`` and ``g = down^T dy[t]`` of a pair of weight w, the
result is the sum over a token's pairs of ``down (w a)``, and::

    dw = g . a,   ddown += dy[t] (w a)^T
    dh = silu_mul's gradient of w g,   dgate_up += dh x[t]^T,   dx[t] += gate_up^T dh
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kimi_ops
from kimi_ops._autograd import _FirstDerivative
from kimi_ops.autograd.silu_mul import through_silu_mul
from kimi_ops.model.errors import KimiError
from kimi_ops.model.tensor_arguments import check_tensor
from kimi_ops.reference import widen

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def moe_experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor,
    *,
    recompute: bool = True,
) -> Tensor:
    """``y[t] = sum_k weights[t, k] * down[e] silu_mul(gate_up[e] x[t])`` with ``e = ids[t, k]``.

    Reads the number of tokens of each expert on the host. Both values of ``recompute`` give the
    same bits, and so does every repetition.

    Args:
        x: ``[T, D]`` bfloat16, float16, float32 or float64; T = 0 allowed.
        gate_up: ``[E, 2F, D]``, dtype of ``x``, the F gate rows of an expert first.
        down: ``[E, D, F]``, dtype of ``x``.
        weights: ``[T, K]`` float32 or float64, from `kimi_ops.moe_route`.
        ids: ``[T, K]`` int32 or int64, likewise. An id outside 0 .. E-1 (-1, say, for an expert of
            another rank) contributes nothing, and its weight has gradient 0. An expert chosen
            twice by a token contributes twice.
        recompute: keep the arguments alone for the backward, and compute gate_up's product again
            there; else keep that product too, ``[T*K, 2F]``.

    Returns:
        ``[T, D]``, dtype of ``x``; products and sums are accumulated in at least float32.

    Raises:
        KimiError: a shape, dtype or device other than stated.

    Gradients: to ``x``, ``gate_up``, ``down`` and ``weights``, once; 0 for an expert that no token
    chose.

    Source: DeepSeek-V3, arXiv 2412.19437 section 2.1.2; the recomputation: Kimi K2, arXiv
    2507.20534 section 2.4.3 (SwiGLU).
    """
    _check(x, gate_up, down, weights, ids)
    apply: Any = _MoeExperts.apply
    y: Tensor = apply(x, gate_up, down, weights, ids, recompute)
    return y


def _check(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> None:
    floats = {
        "x": (x, "[T, D]"),
        "gate_up": (gate_up, "[E, 2F, D]"),
        "down": (down, "[E, D, F]"),
        "weights": (weights, "[T, K]"),
    }
    for name, (value, shape) in floats.items():
        check_tensor(name, value, f"{shape} floats")
    check_tensor("ids", ids, "[T, K] integers")
    if x.dtype not in _DTYPES:
        raise KimiError(f"x must be bfloat16, float16, float32 or float64, got {x.dtype}")
    if weights.dtype not in _DTYPES[2:]:
        raise KimiError(f"weights must be float32 or float64, got {weights.dtype}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise KimiError(f"ids must be int32 or int64, got {ids.dtype}")
    experts, width, inner = len(gate_up), x.shape[1], down.shape[2]
    for name, value, expected in (
        ("gate_up", gate_up, (experts, 2 * inner, width)),
        ("down", down, (experts, width, inner)),
    ):
        if value.shape != expected or value.dtype != x.dtype or not value.numel():
            raise KimiError(
                f"{name} must be {list(expected)} and {x.dtype} beside the others, with no size 0, "
                f"got {list(value.shape)} {value.dtype}"
            )
    if weights.shape != ids.shape or len(ids) != len(x) or not ids.shape[1]:
        raise KimiError(
            f"weights and ids must be [{len(x)}, K], K at least 1, "
            f"got {list(weights.shape)} and {list(ids.shape)}"
        )
    for name, value in (("gate_up", gate_up), ("down", down), ("weights", weights), ("ids", ids)):
        if value.device != x.device:
            raise KimiError(f"{name} must be on {x.device} like x, got {value.device}")


class _Pairs:
    """The pairs sorted by expert, those of no expert last, and work space for one expert's.

    Space is kept because fresh memory for each product would cost more than what is written to it:
    blocks of this size come from the system and go back to it.
    """

    def __init__(self, order: Tensor, starts: list[int], weights: Tensor) -> None:
        spans = enumerate(itertools.pairwise(starts))
        self.spans = [(e, slice(start, stop)) for e, (start, stop) in spans if start < stop]
        self.valid = starts[-1]
        self.tokens = order // weights.shape[1]
        self.weights = weights.flatten()[order.long()][:, None]
        self.most = max((s.stop - s.start for _, s in self.spans), default=0)

    def space(self, like: Tensor, width: int) -> Tensor:
        return like.new_empty(self.most, width)

    def rows(self, x: Tensor, span: slice, space: Tensor) -> Tensor:
        """Rows of ``x`` of one expert's pairs."""
        out = space[: span.stop - span.start]
        return torch.index_select(x, 0, self.tokens[span], out=out)

    def total(self, y: Tensor, places: Tensor) -> Tensor:
        """Each token's sum over its pairs, in a fixed order and at least float32: ``[T, D]``."""
        y[self.valid :] = 0
        return F.embedding_bag(places, y, mode="sum")


class _MoeExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        weights: Tensor,
        ids: Tensor,
        recompute: bool,
    ) -> Tensor:
        experts = len(gate_up)
        # Clamped first: an int64 id far out would come back into the range as an int32.
        order, offsets = kimi_ops.moe_sort(ids.clamp(-1, experts).int(), experts)
        places = torch.empty_like(order)
        places[order.long()] = torch.arange(len(order), dtype=order.dtype, device=order.device)
        places = places.view(ids.shape)
        starts = offsets.tolist()
        pairs = _Pairs(order, starts, weights)
        rows_space = pairs.space(x, x.shape[1])
        h_space = pairs.space(x, gate_up.shape[1])
        h_all = None if recompute else x.new_empty(len(order), gate_up.shape[1])
        y = x.new_empty(len(order), x.shape[1])
        for expert, span in pairs.spans:
            rows = pairs.rows(x, span, rows_space)
            h = torch.mm(rows, gate_up[expert].T, out=h_space[: len(rows)])
            if h_all is not None:
                h_all[span] = h
            inner = kimi_ops.silu_mul(widen(h)).mul_(pairs.weights[span]).to(x.dtype)
            torch.mm(inner, down[expert].T, out=y[span])
        ctx.save_for_backward(x, gate_up, down, weights, order, places, h_all)
        ctx.starts = starts
        return pairs.total(y, places)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = _gradients(ctx, dy)
        if torch.is_grad_enabled():  # create_graph=True
            once: Any = _FirstDerivative.apply
            sources = (*ctx.saved_tensors[:4], dy)
            found = tuple(d if d is None else once("moe_experts", d, *sources) for d in found)
        return (*found, None, None)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """To x, gate_up, down and weights; None where none is wanted."""
    x, gate_up, down, weights, order, places, h_all = ctx.saved_tensors
    to_x, to_gate_up, to_down, to_weights = ctx.needs_input_grad[:4]
    pairs = _Pairs(order, ctx.starts, weights)
    rows_space, dy_space = pairs.space(x, x.shape[1]), pairs.space(x, x.shape[1])
    h_space, g_space = pairs.space(x, gate_up.shape[1]), pairs.space(x, down.shape[2])
    dx = x.new_empty(len(order), x.shape[1]) if to_x else None
    dgate_up = torch.empty_like(gate_up) if to_gate_up else None
    ddown = torch.empty_like(down) if to_down else None
    dweights = weights.new_zeros(len(order)) if to_weights else None
    for expert, span in pairs.spans:
        rows = pairs.rows(x, span, rows_space)
        if h_all is None:
            h = torch.mm(rows, gate_up[expert].T, out=h_space[: len(rows)])
        else:
            h = h_all[span]
        dy_rows = pairs.rows(dy, span, dy_space)
        g = widen(torch.mm(dy_rows, down[expert], out=g_space[: len(rows)]))
        weight = pairs.weights[span]
        if dweights is not None or ddown is not None:
            inner = kimi_ops.silu_mul(widen(h))
            if dweights is not None:
                dweights[span] = (g * inner).sum(1)
            if ddown is not None:
                torch.mm(dy_rows.T, inner.mul_(weight).to(x.dtype), out=ddown[expert])
        if dx is None and dgate_up is None:
            continue
        dh = through_silu_mul(g.mul_(weight), h)
        if dgate_up is not None:
            torch.mm(dh.T, rows, out=dgate_up[expert])
        if dx is not None:
            torch.mm(dh, gate_up[expert], out=dx[span])
    used = {expert for expert, _ in pairs.spans}
    for expert in set(range(len(gate_up))) - used:
        for gradient in (dgate_up, ddown):
            if gradient is not None:
                gradient[expert] = 0
    return (
        None if dx is None else pairs.total(dx, places),
        dgate_up,
        ddown,
        None if dweights is None else dweights[places.long()],
    )
