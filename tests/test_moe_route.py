"""`moe_route`: every backend against the oracle, the oracle against transformers' router."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from kimi_ops.reference.moe_route import moe_route
from kimi_ops.testing import cases, check_op

OP = "moe_route"


def test_matches_oracle(backend, case):
    check_op(OP, case.args(), backend)


@pytest.mark.parametrize(
    "name", ["bf16-kimi-17", "bf16-144", "bf16-groups", "bf16-kimi-1", "fp32-9x64", "bf16-1024"]
)
def test_reference_is_transformers_router(name):
    case = next(c for c in cases(OP) if c.name == name)
    x, gate, bias, top_k, n_group, topk_group, scale, normalize = case.args()
    config = DeepseekV3Config(
        hidden_size=x.shape[1],
        n_routed_experts=len(gate),
        num_experts_per_tok=top_k,
        n_group=n_group,
        topk_group=topk_group,
        routed_scaling_factor=scale,
        norm_topk_prob=normalize,
    )
    router = DeepseekV3TopkRouter(config)
    router.weight.data, router.e_score_correction_bias = gate, bias
    with torch.no_grad():
        _, theirs, their_ids = router(x)
    weights, ids = moe_route(x, gate, bias, top_k, n_group, topk_group, scale, normalize)
    # Their order is unspecified, so both are put in the order of ids.
    ids, order = ids.long().sort(-1)
    their_ids, their_order = their_ids.sort(-1)
    assert torch.equal(ids, their_ids)
    torch.testing.assert_close(weights.gather(1, order), theirs.gather(1, their_order))


def test_gate_is_a_float32_product():
    # Rounded to bfloat16, both logits would be 1 and the tie would go to expert 0.
    x = torch.ones(1, 32).bfloat16()
    gate = torch.full((2, 32), 1 / 32).bfloat16()
    gate[1, 0] += 2**-11
    assert moe_route(x, gate, torch.zeros(2), 1)[1].tolist() == [[1]]
