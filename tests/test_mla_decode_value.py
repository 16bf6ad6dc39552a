"""`mla_decode_value`: every backend against the oracle, and the oracle against plain loops."""

from __future__ import annotations

import pytest
import torch

from kimi_ops._batch_invariant import batch_invariant
from kimi_ops._target import Target, targeting
from kimi_ops.kernels import mla_decode_value as kernels
from kimi_ops.reference.mla_decode import mla_decode
from kimi_ops.reference.mla_decode_value import mla_decode_value
from kimi_ops.testing import cases, check_op
from kimi_ops.testing.inputs import mla
from kimi_ops.testing.oracle import assert_close_to_oracle
from kimi_ops.testing.runner import run_triton, target_of
from kimi_ops.testing.triton_interpreter import interpreted

OP = "mla_decode_value"


def test_matches_oracle(backend, case):
    check_op(OP, case.args(), backend)


def test_oracle_head_by_head():
    case = next(c for c in cases(OP) if c.name == "bf16-h3-s2")
    q, cache, table, lengths, w_uv, scale, rank = case.args()
    args = (q.double(), cache.double(), table, lengths)
    out, _ = mla_decode(*args, scale, rank)
    value = mla_decode_value(*args, w_uv.double(), scale, rank)
    for h in range(3):
        torch.testing.assert_close(value[:, :, h], out[:, :, h] @ w_uv[h].double().T)


def test_splits_are_joined_in_the_kernel_that_projects():
    """Two launches with splits and without; fewer heads or tokens than a tile has room for."""
    for lengths, name in (((200, 3), "mla_decode_value_combine"), ((9, 3), "mla_project_value")):
        args = mla.mla_decode_value(
            torch.Generator().manual_seed(4), lengths, 3, 24, widths=(32, 16), page=8
        )
        value = torch.empty(len(lengths), 1, 3, 24, dtype=torch.bfloat16)
        with targeting(target_of(80)), interpreted(seed=2) as report:
            kernels.launch(value, *args)
        first, second = (launch.kernel for launch in report.launches)
        assert first.startswith("mla_decode_split")
        assert second.startswith(name)
        exact = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
                 for a in args]  # fmt: skip
        assert_close_to_oracle(name, value, mla_decode_value(*args), mla_decode_value(*exact))


def test_batch_invariant_mode_gives_the_same_bits_in_any_batch():
    """With one split and with several, next to others and alone."""
    q, cache, table, lengths, *rest = mla.mla_decode_value(
        torch.Generator().manual_seed(6), (1030, 3, 70), 2, 16, widths=(32, 16)
    )

    def run(rows, columns):
        value = torch.empty(len(q[rows]), 1, 2, 16, dtype=torch.bfloat16)
        with targeting(target_of(80)), interpreted(seed=1), batch_invariant():
            kernels.launch(value, q[rows], cache, table[rows, :columns], lengths[rows], *rest)
        return value

    together = run(slice(0, 3), None)
    for b, columns in ((0, None), (1, 1), (2, 2)):
        assert torch.equal(run(slice(b, b + 1), columns)[0], together[b])


@pytest.mark.parametrize("tokens", [1, 3])
def test_second_stage_reads_each_weight_once(tokens):
    """K2.5's widths, sm_90: bytes and sectors against the floor, partials once per tile of V."""
    splits, heads = 4, 2
    gpu = Target("cuda", 90, 2 * heads, 227 << 10)  # as if two of its programs were for each head
    tile = kernels.Tile.of(gpu, splits, tokens, heads, 128, 512)
    assert tile.tokens >= tokens or tile.columns == 128
    stage = kernels.FirstStage(kernels.TILES["sm_80"][0], kernels.Plan(1, splits, 1, splits))
    part, part_lse = torch.randn(tokens, splits, heads, 512), torch.randn(tokens, heads, splits)
    lengths = torch.full((tokens,), 128, dtype=torch.int32)
    w_uv, value = torch.randn(heads, 128, 512).bfloat16(), torch.empty(tokens, 1, heads, 128)
    value = value.bfloat16()
    arguments = kernels._arguments(value, part, part_lse, lengths, w_uv, 128, stage, tile)
    grid = (-(-tokens // tile.tokens), heads * (128 // tile.columns))
    report = run_triton(
        kernels.mla_decode_value_combine_kernel, grid, **arguments, num_warps=kernels.WARPS,
        num_stages=1, arch=90,
    )  # fmt: skip
    weight = part_lse.softmax(-1)[..., None]
    out = (part * weight.transpose(1, 2)).sum(1).bfloat16()
    expected = torch.einsum("thc,hvc->thv", out.float(), w_uv.float())
    assert (value[:, 0].float() - expected).abs().max() <= 2**-7 * expected.abs().max()
    floor = w_uv.nbytes * grid[0] + part.nbytes * (128 // tile.columns)
    assert 32 * report.total.global_sectors <= 1.05 * floor
    assert report.total.global_sectors <= 1.10 * report.total.global_sectors_ideal
    assert report.total.shared_wavefronts <= 1.25 * report.total.shared_wavefronts_ideal


def test_tiles_cover_every_call():
    gpu = target_of(90)
    for partials in (1, 2, 16, 64, 128):
        for tokens in (1, 3, 16, 300):
            for heads in (1, 8, 64):
                tile = kernels.Tile.of(gpu, partials, tokens, heads, 128, 512)
                assert tile.tokens * partials * tile.depth <= kernels.PARTIALS_IN_FLIGHT
                assert min(tile.columns, tile.depth) >= 16
    with batch_invariant():
        tiles = {kernels.Tile.of(gpu, 32, n, h, 128, 512) for n in (1, 9, 400) for h in (1, 64)}
    assert len(tiles) == 1
