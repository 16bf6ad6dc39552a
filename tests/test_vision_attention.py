"""`vision_attention`: every backend against the oracle, the oracle against torch's attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kimi_ops.reference.vision_attention import vision_attention
from kimi_ops.testing import check_op

OP = "vision_attention"


def test_matches_oracle(backend, case):
    check_op(OP, case.args(), backend)


def test_oracle_is_torchs_attention_segment_by_segment():
    lengths = (5, 0, 1, 1100)
    q, k, v = (torch.randn(sum(lengths) + 3, 2, 72, dtype=torch.float64) for _ in range(3))
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).int()
    out = vision_attention(q, k, v, cu_seqlens, max(lengths), 72**-0.5)
    start = 0
    for n in lengths:
        part = [x[start : start + n].transpose(0, 1)[None] for x in (q, k, v)]
        if n:
            theirs = F.scaled_dot_product_attention(*part)[0].transpose(0, 1)
            torch.testing.assert_close(out[start : start + n], theirs)
        start += n
    assert out[start:].eq(0).all()
