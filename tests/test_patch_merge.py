"""`patch_merge`: every backend against the oracle, the oracle against transformers' encoder tail
and projector norm."""

from __future__ import annotations

import pytest
import torch
from transformers.models.kimi_k25.modeling_kimi_k25 import get_vision_temporal_merge_index

from kimi_ops.reference.patch_merge import patch_merge
from kimi_ops.testing import check_op
from kimi_ops.testing.runner import emulated

OP = "patch_merge"


def test_matches_oracle(backend, case):
    check_op(OP, case.args(), backend)


def test_oracle_picture_by_picture():
    grids, d = ((1, 4, 6), (3, 2, 4), (4, 6, 2)), 20
    x = torch.randn(sum(t * h * w for t, h, w in grids), d, dtype=torch.float64)
    norms = [torch.randn(d, dtype=torch.float64) for _ in range(4)]
    expected, start = [], 0
    for t, h, w in grids:
        y = torch.layer_norm(x[start : start + t * h * w], (d,), *norms[:2], 1e-5)
        start += t * h * w
        y = y.view(t, h // 2, 2, w // 2, 2, d).mean(0).permute(0, 2, 1, 3, 4)
        expected.append(torch.layer_norm(y, (d,), *norms[2:], 1e-5).reshape(h * w // 4, 4 * d))
    merged = sum(h * w // 4 for _, h, w in grids)
    ours = patch_merge(x, torch.tensor(grids), merged, *norms, 1e-5)
    torch.testing.assert_close(ours, torch.cat(expected))


def test_oracle_gathers_as_transformers_does():
    grid = torch.tensor([[3, 4, 6], [3, 8, 2]])
    x = torch.randn(int(grid.prod(1).sum()), 12, dtype=torch.float64)
    one, zero = torch.ones(12, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)
    index = get_vision_temporal_merge_index(grid, 2, 2)
    normal = torch.layer_norm(x, (12,), one, zero, 1e-5)
    theirs = torch.layer_norm(normal[index].mean(1), (12,), one, zero, 1e-5).flatten(1)
    ours = patch_merge(x, grid, len(index), one, zero, one, zero, 1e-5)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("arch", [80, 90])
def test_triton_kernel_moves_each_byte_once_in_one_launch(arch):
    from kimi_ops.kernels import patch_merge as kernel

    grid, width = torch.tensor([[1, 16, 16], [2, 8, 8]]), 1152
    x = torch.randn(384, width).bfloat16()
    norms = [torch.randn(width).bfloat16() for _ in range(4)]
    y = torch.empty(80, 4 * width, dtype=torch.bfloat16)
    with emulated(arch=arch) as emulation:
        kernel.launch(y, x, grid, 80, *norms, 1e-5)
    ((_, report),) = emulation.launches
    read = 2 * x.numel() + 4 * 2 * width + grid.numel() * 8
    assert report.unique_read_bytes <= read + 32  # the last sector of the table
    assert report.total.global_store_bytes == report.unique_written_bytes == 2 * y.numel()
    assert report.total.global_sectors <= 1.1 * report.total.global_sectors_ideal
