"""`vision_rope`: every backend against the oracle, the oracle against transformers and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import Kimi_K25VisionConfig
from transformers.models.kimi_k25.modeling_kimi_k25 import (
    Kimi_K25VisionRotaryEmbedding,
    apply_rotary_pos_emb_vision,
)
from transformers.vision_utils import get_vision_position_ids

import kimi_ops
from kimi_ops.reference.vision_rope import vision_rope
from kimi_ops.testing import check_op

OP = "vision_rope"
GRIDS = ((1, 6, 10), (3, 4, 8), (1, 2, 30))


def test_matches_oracle(backend, case):
    check_op(OP, case.args(), backend)


def test_frequencies_of_head_dim_72():
    # Patch (row 1, column 0): the odd pairs turn by p_i, the even ones stay.
    qkv = torch.zeros(4, 3, 1, 72, dtype=torch.float64)
    qkv[..., 0::2] = 1
    q = vision_rope(qkv, torch.tensor([[1, 2, 2]]))[2, 0, 0]
    assert q[0::4].eq(1).all()
    angle = torch.atan2(q[3::4], q[2::4])
    for i, digits in {0: "1.000000", 1: "0.599484", 2: "0.359381", 17: "0.0001668101"}.items():
        half_a_digit = 0.5 * 10.0 ** -len(digits.partition(".")[2])
        assert angle[i].item() == pytest.approx(float(digits), rel=0, abs=half_a_digit)
    # Patch (row 0, column 1): the other way round.
    q = vision_rope(qkv, torch.tensor([[1, 2, 2]]))[1, 0, 0]
    assert q[2::4].eq(1).all()
    assert math.atan2(q[1], q[0]) == pytest.approx(1.0)


def test_oracle_is_transformers_rotation():
    config = Kimi_K25VisionConfig(hidden_size=144, num_attention_heads=2)
    grid = torch.tensor(GRIDS)
    qkv = torch.randn(int(grid.prod(1).sum()), 3, 2, 72)
    order = torch.cat((torch.arange(0, 72, 2), torch.arange(1, 72, 2)))
    positions = get_vision_position_ids(grid, spatial_merge_size=1)
    cos, sin = Kimi_K25VisionRotaryEmbedding(config)(qkv, positions)
    q, k = apply_rotary_pos_emb_vision(qkv[:, 0][..., order], qkv[:, 1][..., order], cos, sin)
    ours = vision_rope(qkv, grid)
    torch.testing.assert_close(ours[:, 0][..., order], q, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[:, 1][..., order], k, rtol=1e-5, atol=1e-5)


def test_values_and_rows_past_the_last_entry_stay(backend):
    qkv = torch.randn(11, 3, 2, 8).bfloat16()
    before = qkv.clone()
    with kimi_ops.use_backend(vision_rope=backend):
        assert kimi_ops.vision_rope(qkv, torch.tensor([[1, 2, 4]])) is None
    assert torch.equal(qkv[:, 2], before[:, 2])
    assert torch.equal(qkv[8:], before[8:])
    assert not torch.equal(qkv[:8, :2], before[:8, :2])
