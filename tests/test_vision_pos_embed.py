"""`vision_pos_embed`: every backend against the oracle, the oracle against torch's bicubic
interpolation and transformers' embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import Kimi_K25VisionConfig
from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25VisionPositionEmbeddings

from kimi_ops.reference.vision_pos_embed import vision_pos_embed
from kimi_ops.testing import check_op

OP = "vision_pos_embed"
GRIDS = ((1, 6, 10), (1, 64, 64), (3, 4, 8), (4, 90, 2), (1, 2, 2), (2, 20, 14))


def test_matches_oracle(backend, case):
    check_op(OP, case.args(), backend)


def test_oracle_is_torchs_bicubic_and_the_sinusoid():
    d = 12
    table = torch.randn(64, 64, d, dtype=torch.float64)
    expected = []
    for t, h, w in GRIDS:
        plane = F.interpolate(
            table.permute(2, 0, 1)[None], (h, w), mode="bicubic", align_corners=False
        )
        plane = plane[0].permute(1, 2, 0).reshape(h * w, d)
        for frame in range(t):
            angle = frame * 10000.0 ** (-torch.arange(d // 2).double() * 2 / d)
            time = torch.cat((angle.sin(), angle.cos())) if t > 1 else torch.zeros(d)
            expected.append(plane + time)
    expected = torch.cat(expected)
    x = torch.randn_like(expected)
    torch.testing.assert_close(vision_pos_embed(x, table, torch.tensor(GRIDS)), x + expected)


def test_own_size_is_the_table_itself():
    table = torch.randn(64, 64, 8)
    y = vision_pos_embed(torch.zeros(4096, 8), table, torch.tensor([[1, 64, 64]]))
    assert torch.equal(y, table.flatten(0, 1))


def test_oracle_is_transformers_embedding():
    config = Kimi_K25VisionConfig(hidden_size=16, num_attention_heads=2)
    module = Kimi_K25VisionPositionEmbeddings(config).double()
    torch.nn.init.normal_(module.position_embeddings)
    grid = torch.tensor(GRIDS)
    x = torch.randn(int(grid.prod(1).sum()), 16, dtype=torch.float64)
    theirs = module(x, grid).detach()
    ours = vision_pos_embed(x, module.position_embeddings.detach(), grid)
    # They compute source coordinates, up to 64, in float32: off by 64 * 2^-24, times a slope and
    # sixteen taps of order one.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=16 * 64 * 2**-24)
