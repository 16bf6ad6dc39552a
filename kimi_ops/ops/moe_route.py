"""The router: gate GEMM, sigmoid, biased selection of K experts, weights."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops._dispatch import define_op
from kimi_ops.ops.moe_select import ROUTER_RULES


def outputs(
    x: Tensor,
    gate_weight: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], top_k)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weights = torch.empty(shape, dtype=dtype, device=x.device)
    return weights, torch.empty(shape, dtype=torch.int32, device=x.device)


_op = define_op(
    "moe_route(Tensor x, Tensor gate_weight, Tensor bias, int top_k, int n_group=1,"
    " int topk_group=1, float scale=1.0, bool normalize=True) -> (Tensor, Tensor)",
    checks={
        "x": "[T, D] float",
        "gate_weight": "[E, D] float",
        "bias": "[E] float32|float64",
        **ROUTER_RULES,
    },
    outputs=outputs,
)


def moe_route(
    x: Tensor,
    gate_weight: Tensor,
    bias: Tensor,
    top_k: int,
    *,
    n_group: int = 1,
    topk_group: int = 1,
    scale: float = 1.0,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """Which K experts see each token, and with what weight::

        s   = sigmoid(float32(x) @ float32(gate_weight)^T)
        ids = the K largest of s + bias                (within the kept groups)
        w   = s[ids];  w = w / (sum(w) + 1e-20)  if normalize;  w = w * scale

    The bias steers the selection and never enters a weight.

    Args:
        x: ``[T, D]`` bfloat16, float16, float32 or float64.
        gate_weight: ``[E, D]``, same choice of dtypes, E at most 1024.
        bias: ``[E]`` float32 or float64 (``e_score_correction_bias``), rounded to the dtype of the
            scores.
        top_k: K experts per token, at most 32 and at most the experts of the kept groups.
        n_group: groups of E / n_group neighbouring experts; 1 in Kimi K2.5.
        topk_group: groups kept per token, by the sum of their two best biased scores.
        scale: ``routed_scaling_factor``, 2.827 in Kimi K2.5.
        normalize: ``norm_topk_prob``.

    Returns:
        ``weights [T, K]`` float32 (float64 for float64 ``x``) and ``ids [T, K]`` int32, best
        first. Equal scores go to the lower id. A NaN score ranks below every number, -inf
        included, so a row of NaN yields the ids 0 .. K-1 (with NaN weights): ids are always valid
        and distinct, and always of the kept groups.

    Raises:
        ValueError, TypeError: a shape, dtype, device or number other than stated.

    Gradients: to ``x`` and ``gate_weight`` through ``weights``; the selection is a constant.

    Source: DeepSeek-V3, arXiv 2412.19437 section 2.1.2 (auxiliary-loss-free balancing).
    """
    weights, ids = _op(x, gate_weight, bias, top_k, n_group, topk_group, scale, normalize)
    return weights, ids
