"""`mla_project_value`: every backend against the oracle, and the oracle head by head."""

from __future__ import annotations

import pytest
import torch

import kimi_ops
from kimi_ops._target import targeting
from kimi_ops.kernels import _head_product
from kimi_ops.kernels import mla_project_value as kernel
from kimi_ops.reference.mla_project_value import mla_project_value
from kimi_ops.testing import check_op
from kimi_ops.testing.inputs import mla
from kimi_ops.testing.runner import target_of
from kimi_ops.testing.ways import WAYS, ways_of, with_way

OP = "mla_project_value"


def test_matches_oracle(backend, case):
    check_op(OP, case.args(), backend)


def test_oracle_head_by_head():
    out, w_uv = torch.randn(5, 3, 16).double(), torch.randn(3, 7, 16).double()
    expected = torch.stack([out[:, h] @ w_uv[h].T for h in range(3)], dim=1)
    torch.testing.assert_close(mla_project_value(out, w_uv), expected)


# Tiles that small cases do not choose, the widest and the one of batch-invariant mode, with wgmma
# and with mma.sync. Widths are no multiple of any block.
@pytest.mark.parametrize(("number", "arch"), [(0, 90), (2, 90), (0, 80)])
def test_large_tiles_where_nothing_divides(number, arch, monkeypatch):
    tile = _head_product._TILES[number]
    monkeypatch.setattr(kernel, "tile_for", lambda *sizes: tile)
    generator = torch.Generator().manual_seed(3)
    args = mla.mla_project_value(generator, tile.tokens + 1, heads=2, widths=(140, 136))
    way = next(way for way in WAYS if way.name == f"triton[sm_{arch}]")
    with with_way(OP, way) as backend:
        check_op(OP, args, backend, repeats=1)


def test_every_tile_of_the_table_is_chosen_by_some_call():
    chosen = set()
    for tokens in (1, 16, 17, 40, 64, 128, 256, 4096):
        for heads in (1, 8, 16, 64, 128):
            with targeting(target_of(90)):
                for columns in (128, 512):
                    tile = _head_product.tile_for(torch.device("cpu"), tokens, heads, columns)
                    assert tile.tokens < max(2 * tokens, 17)
                    chosen.add(tile)
    assert chosen == set(_head_product._TILES)


@pytest.mark.parametrize("way", ways_of(OP), ids=lambda way: way.name)
def test_batch_invariant_mode_gives_the_same_bits_at_every_size(way):
    out, w_uv = mla.mla_project_value(torch.Generator().manual_seed(5), 70, 2, widths=(24, 72))
    with (
        with_way(OP, way) as backend,
        kimi_ops.use_backend(f"{OP}={backend}"),
        kimi_ops.batch_invariant(),
    ):
        whole = kimi_ops.mla_project_value(out, w_uv)
        for rows in (slice(0, 1), slice(3, 20), slice(60, 70)):
            part = kimi_ops.mla_project_value(out[rows], w_uv)
            assert torch.equal(part, whole[rows])


def test_batch_invariant_mode_has_one_tile():
    with targeting(target_of(90)), kimi_ops.batch_invariant():
        sizes = ((1, 8), (16, 64), (17, 1), (4096, 64))
        tiles = {_head_product.tile_for(torch.device("cpu"), t, h, 512) for t, h in sizes}
    assert len(tiles) == 1
