"""Expert selection from given router logits."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops._dispatch import define_op

# The rules that both forms of the router share, in the letters E and the arguments' names.
ROUTER_RULES = {
    "E": "1 <= E <= 1024",
    "n_group": "n_group >= 1",
    "n_group and E": "E % n_group == 0",
    "topk_group": "1 <= topk_group <= n_group",
    "top_k": "1 <= top_k <= min(32, E // n_group * topk_group)",
}


def outputs(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    weights = torch.empty(shape, dtype=logits.dtype, device=logits.device)
    return weights, torch.empty(shape, dtype=torch.int32, device=logits.device)


_op = define_op(
    "moe_select(Tensor logits, Tensor bias, int top_k, int n_group=1, int topk_group=1,"
    " float scale=1.0, bool normalize=True) -> (Tensor, Tensor)",
    checks={
        "logits": "[T, E] float32|float64",
        "bias": "[E] like logits",
        **ROUTER_RULES,
    },
    outputs=outputs,
)


def moe_select(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    *,
    n_group: int = 1,
    topk_group: int = 1,
    scale: float = 1.0,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """`moe_route` from its logits on: sigmoid, selection by biased score, weights without bias.

    Args:
        logits: ``[T, E]`` float32 or float64, E at most 1024.
        bias: ``[E]``, dtype of ``logits``, steers the selection only.
        top_k: K experts per token, at most 32 and at most the experts of the kept groups.
        n_group: groups of E / n_group neighbouring experts.
        topk_group: groups kept per token, by the sum of their two best biased scores.
        scale: factor on the weights (2.827 in Kimi K2.5).
        normalize: divide the weights by their sum plus 1e-20 before scaling.

    Returns:
        ``weights [T, K]``, dtype of ``logits``, and ``ids [T, K]`` int32, best first. Equal scores
        go to the lower id. A NaN score ranks below every number, -inf included, so a row of NaN
        yields the ids 0 .. K-1 (with NaN weights): ids are always valid and distinct, and always
        of the kept groups.

    Raises:
        ValueError, TypeError: a shape, dtype, device or number other than stated.

    Gradients: none; an argument that requires grad is an error.

    Source: DeepSeek-V3, arXiv 2412.19437 section 2.1.2 (auxiliary-loss-free balancing).
    """
    weights, ids = _op(logits, bias, top_k, n_group, topk_group, scale, normalize)
    return weights, ids
