"""`mla_prefill`: every backend against the oracle, the oracle against torch's attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from kimi_ops.reference.mla_prefill import mla_prefill
from kimi_ops.testing import check_op

OP = "mla_prefill"


def test_matches_oracle(backend, case):
    check_op(OP, case.args(), backend)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 7), (3, 11), (1300, 1301)])
@pytest.mark.parametrize("causal", [True, False])
def test_oracle_is_torchs_attention(n, m, causal):
    q = torch.randn(n, 2, 24, dtype=torch.float64)
    k, v = (torch.randn(m, 2, w, dtype=torch.float64) for w in (24, 16))
    out, lse = mla_prefill(
        q,
        k,
        v,
        torch.tensor([0, n], dtype=torch.int32),
        torch.tensor([0, m], dtype=torch.int32),
        n,
        m,
        0.2,
        causal=causal,
    )
    # Values padded to the width of the keys, which torch's fused kernels want equal.
    mask = causal_lower_right(n, m) if causal else None
    theirs = F.scaled_dot_product_attention(
        *(F.pad(x, (0, 24 - x.shape[-1])).transpose(0, 1)[None] for x in (q, k, v)),
        attn_mask=mask,
        scale=0.2,
    )
    torch.testing.assert_close(out, theirs[0].transpose(0, 1)[..., :16])
    score = torch.einsum("nhw,mhw->nhm", q, k) * 0.2
    if causal:
        hidden = torch.arange(m) > torch.arange(n)[:, None] + m - n
        score = score.masked_fill(hidden[:, None], -torch.inf)
    torch.testing.assert_close(lse, score.exp().sum(-1).log())
