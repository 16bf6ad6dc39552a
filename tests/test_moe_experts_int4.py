"""`moe_experts_int4`: every backend against the oracle, the oracle against transformers' experts,
pair by pair, and split over ranks."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from kimi_ops.quant import int4
from kimi_ops.reference.moe_experts_int4 import moe_experts_int4
from kimi_ops.testing import cases, check_op

OP = "moe_experts_int4"


def _exact(case):
    args = case.args()
    return [a.double() if getattr(a, "is_floating_point", bool)() else a for a in args]


def test_matches_oracle(backend, case):
    check_op(OP, case.args(), backend)


def test_oracle_pair_by_pair(case):
    x, gate_up, gu_scale, down, d_scale, weights, ids, s_gate_up, s_down, span = _exact(case)
    first, last = span or (0, len(gate_up))
    expected = torch.zeros_like(x)

    @functools.cache
    def weight(expert):
        both = (gate_up[expert], gu_scale[expert]), (down[expert], d_scale[expert])
        return [int4.unpack(w).double() * s.repeat_interleave(32, 1) for w, s in both]

    for t, row in enumerate(ids.tolist()):
        for k, expert in enumerate(row):
            if first <= expert < last:
                w_in, w_out = weight(expert - first)
                gate, up = (w_in @ x[t]).chunk(2)
                expected[t] += weights[t, k] * (w_out @ (F.silu(gate) * up))
        if s_gate_up is not None:
            gate, up = (s_gate_up @ x[t]).chunk(2)
            expected[t] += s_down @ (F.silu(gate) * up)
    torch.testing.assert_close(moe_experts_int4(*_exact(case)), expected)


def test_reference_is_transformers_experts_on_dequantised_weights():
    case = next(c for c in cases(OP) if c.name == "bf16-skewed")
    x, gate_up, gu_scale, down, d_scale, weights, ids, *_ = case.args()
    config = DeepseekV3Config(
        hidden_size=x.shape[1], moe_intermediate_size=down.shape[2] * 8, n_routed_experts=len(down)
    )
    experts = DeepseekV3Experts(config)
    experts.gate_up_proj.data = int4.dequantize(gate_up, gu_scale, torch.float32)
    experts.down_proj.data = int4.dequantize(down, d_scale, torch.float32)
    with torch.no_grad():
        theirs = experts(x.float(), ids.long(), weights)
    ours = moe_experts_int4(x.float(), gate_up, gu_scale, down, d_scale, weights, ids)
    torch.testing.assert_close(ours, theirs)


def test_ranks_of_experts_add_up_to_the_whole():
    case = next(c for c in cases(OP) if c.name == "bf16-shared")
    x, *experts, weights, ids, s_gate_up, s_down, _ = _exact(case)
    whole = moe_experts_int4(x, *experts, weights, ids, s_gate_up, s_down)
    parts = torch.zeros_like(x)
    for first, last in ((0, 3), (3, 3), (3, 8)):
        local = [w[first:last] for w in experts]
        shared = (s_gate_up, s_down) if first == 0 else (None, None)
        parts += moe_experts_int4(x, *local, weights, ids, *shared, (first, last))
    torch.testing.assert_close(parts, whole)
