"""`mla_absorb_query`: every backend against the oracle; absorbed equals un-absorbed attention."""

from __future__ import annotations

import torch

from kimi_ops.reference._rotate import rope
from kimi_ops.reference.mla_absorb_query import mla_absorb_query
from kimi_ops.reference.mla_decode import mla_decode
from kimi_ops.reference.mla_prefill import mla_prefill
from kimi_ops.reference.mla_project_value import mla_project_value
from kimi_ops.testing import check_op

OP = "mla_absorb_query"


def test_matches_oracle(backend, case):
    check_op(OP, case.args(), backend)


def test_absorbed_attention_equals_the_materialised_one():
    """The identity that the whole decode path rests on, over a shuffled paged cache."""
    h, n, r, v, c, length, page = 3, 16, 8, 12, 24, 37, 5
    torch.set_default_dtype(torch.float64)
    try:
        kv_b = torch.randn(h, n + v, c)
        w_uk, w_uv = kv_b[:, :n], kv_b[:, n:]
        latent, key = torch.randn(length, c), torch.randn(length, r)
        q = torch.randn(length, h, n + r)
        positions, inv_freq = torch.arange(length), torch.rand(r // 2)
        scale = 0.3

        key = rope(key, positions, inv_freq)
        k = torch.cat(
            (torch.einsum("hnc,tc->thn", w_uk, latent), key[:, None].expand(-1, h, -1)), 2
        )
        value = torch.einsum("hvc,tc->thv", w_uv, latent)
        turned = torch.cat((q[..., :n], rope(q[..., n:], positions, inv_freq)), 2)
        ends = torch.tensor([0, length], dtype=torch.int32)
        expected, expected_lse = mla_prefill(
            turned, k, value, ends, ends, length, length, scale, causal=True
        )

        pages = torch.randperm(-(-length // page))
        cache = torch.zeros(len(pages), page, c + r)
        for t in range(length):
            cache[pages[t // page], t % page] = torch.cat((latent[t], key[t]))
        out, lse = mla_decode(
            mla_absorb_query(q, w_uk, positions, inv_freq)[None],
            cache,
            pages[None].int(),
            torch.tensor([length], dtype=torch.int32),
            scale,
            c,
        )
        torch.testing.assert_close(mla_project_value(out[0], w_uv), expected)
        torch.testing.assert_close(lse[0], expected_lse)
    finally:
        torch.set_default_dtype(torch.float32)
