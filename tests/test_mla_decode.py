"""`mla_decode`: every backend against the oracle, and the oracle against plain loops."""

from __future__ import annotations

import torch

import kimi_ops
from kimi_ops.reference.mla_decode import mla_decode
from kimi_ops.testing import cases, check_op

OP = "mla_decode"


def test_matches_oracle(backend, case):
    check_op(OP, case.args(), backend)


def _query_by_query(q, cache, table, lengths, scale, rank):
    batch, new, heads, _ = q.shape
    out = torch.zeros(batch, new, heads, rank, dtype=q.dtype)
    lse = torch.full((batch, new, heads), -torch.inf, dtype=q.dtype)
    for b in range(batch):
        length = min(int(lengths[b]), table.shape[1] * cache.shape[1])
        keys = [
            cache[table[b, t // cache.shape[1]], t % cache.shape[1]] for t in range(max(length, 0))
        ]
        for s in range(new):
            seen = keys[: max(length - (new - 1 - s), 0)]
            if seen:
                kv = torch.stack(seen)
                score = q[b, s] @ kv.T * scale
                out[b, s] = score.softmax(-1) @ kv[:, :rank]
                lse[b, s] = score.exp().sum(-1).log()
    return out, lse


def test_oracle_query_by_query():
    for name in ("bf16-h16-s4", "bf16-h5-page-1", "bf16-small", "bf16-negative-length"):
        case = next(c for c in cases(OP) if c.name == name)
        q, cache, table, lengths, scale, rank = case.args()
        args = (q.double(), cache.double(), table, lengths, scale, rank)
        for ours, theirs in zip(mla_decode(*args), _query_by_query(*args), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_length_beyond_the_page_table_is_what_the_table_holds(backend):
    cache = torch.randn(2, 4, 24).bfloat16()
    table = torch.tensor([[1, 0]], dtype=torch.int32)
    q = torch.randn(1, 1, 2, 24).bfloat16()
    with kimi_ops.use_backend(mla_decode=backend):
        results = [
            kimi_ops.mla_decode(
                q, cache, table, torch.tensor([n], dtype=torch.int32), 0.1, kv_lora_rank=16
            )
            for n in (8, 2**31 - 1)
        ]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_lost_page_is_nan_for_its_sequence_alone(backend):
    case = next(c for c in cases(OP) if c.name == "bf16-lost-page")
    with kimi_ops.use_backend(mla_decode=backend):
        *args, rank = case.args()
        out, lse = kimi_ops.mla_decode(*args, kv_lora_rank=rank)
    assert out[0].isfinite().all()
    assert lse[0].isfinite().all()
    assert out[1].isnan().all()
    assert lse[1].isnan().all()
