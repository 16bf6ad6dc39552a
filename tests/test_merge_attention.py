"""`merge_attention`: every backend against the oracle; merging chunks gives the whole."""

from __future__ import annotations

import torch

from kimi_ops.reference.merge_attention import merge_attention
from kimi_ops.reference.mla_prefill import mla_prefill
from kimi_ops.testing import check_op

OP = "merge_attention"


def test_matches_oracle(backend, case):
    check_op(OP, case.args(), backend)


def test_chunks_of_keys_merge_to_the_whole():
    n, m = 6, 50
    q, k, v = (torch.randn(size, 3, 16, dtype=torch.float64) for size in (n, m, m))

    def attend(part):
        ends = [torch.tensor([0, size], dtype=torch.int32) for size in (n, len(k[part]))]
        return mla_prefill(q, k[part], v[part], *ends, n, m, 0.25, causal=False)

    out, lse = attend(slice(0, 0))
    for start, stop in ((0, 1), (1, 20), (20, 20), (20, 50)):
        out, lse = merge_attention(out, lse, *attend(slice(start, stop)))
    expected, expected_lse = attend(slice(0, m))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_far_apart_sides_neither_overflow_nor_mix():
    out_a, out_b = torch.full((1, 4), 2.0), torch.full((1, 4), 5.0)
    out, lse = merge_attention(out_a, torch.tensor([-2e4]), out_b, torch.tensor([3e4]))
    assert torch.equal(out, out_b)
    assert lse.item() == 3e4
