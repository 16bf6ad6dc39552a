"""`merge_attention`: every backend against the oracle; merging chunks gives the whole."""

from __future__ import annotations

import pytest
import torch

from kimi_ops.reference.merge_attention import merge_attention
from kimi_ops.reference.mla_prefill import mla_prefill
from kimi_ops.testing import check_op
from kimi_ops.testing.runner import emulated

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


def test_undefined_lse_is_seen(backend):
    """NaN or +inf in an lse is a fault of the caller's: NaN, where the formula has it."""
    inf, nan = torch.inf, torch.nan
    lse_a = torch.tensor([nan, inf, inf, 1.0, -inf, nan, -inf, 88.0])
    lse_b = torch.tensor([0.0, 0.0, inf, nan, -inf, -inf, inf, -88.0])
    out_a, out_b = torch.randn(8, 40).bfloat16(), torch.randn(8, 40).bfloat16()
    check_op(OP, (out_a, lse_a, out_b, lse_b), backend)


def test_rows_of_several_steps(backend):
    out_a, out_b = torch.randn(3, 2, 600), torch.randn(3, 2, 600)
    check_op(OP, (out_a, torch.randn(3, 2), out_b, torch.randn(3, 2)), backend)


@pytest.mark.parametrize("arch", [80, 90])
def test_kernel_moves_each_byte_once(arch):
    from kimi_ops.kernels import merge_attention as kernel

    sides = [torch.randn(16, 8, 128).bfloat16() for _ in range(2)]
    sums = [torch.randn(16, 8) for _ in range(2)]
    results = torch.empty_like(sides[0]), torch.empty_like(sums[0])
    with emulated(arch=arch) as emulation:
        kernel.launch(results, sides[0], sums[0], sides[1], sums[1])
    ((_, report),) = emulation.launches
    assert report.unique_read_bytes == 2 * 16 * 8 * (256 + 4)
    assert report.unique_written_bytes == 16 * 8 * (256 + 4)
    assert report.total.global_sectors == report.total.global_sectors_ideal
