"""`mla_absorb_query`: every backend against the oracle; absorbed equals un-absorbed attention."""

from __future__ import annotations

import pytest
import torch

import kimi_ops
from kimi_ops.reference._rotate import rope
from kimi_ops.reference.mla_absorb_query import mla_absorb_query
from kimi_ops.reference.mla_decode import mla_decode
from kimi_ops.reference.mla_prefill import mla_prefill
from kimi_ops.reference.mla_project_value import mla_project_value
from kimi_ops.testing import check_op
from kimi_ops.testing.inputs import mla
from kimi_ops.testing.runner import emulated
from kimi_ops.testing.ways import ways_of, with_way

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


@pytest.mark.parametrize("way", ways_of(OP), ids=lambda way: way.name)
def test_batch_invariant_mode_gives_the_same_bits_at_every_size(way):
    generator = torch.Generator().manual_seed(5)
    q, w_uk, positions, inv_freq = mla.mla_absorb_query(generator, 70, 2, widths=(40, 8, 72))
    with (
        with_way(OP, way) as backend,
        kimi_ops.use_backend(f"{OP}={backend}"),
        kimi_ops.batch_invariant(),
    ):
        whole = kimi_ops.mla_absorb_query(q, w_uk, positions, inv_freq)
        for rows in (slice(0, 1), slice(3, 20), slice(60, 70)):
            part = kimi_ops.mla_absorb_query(q[rows], w_uk, positions[rows], inv_freq)
            assert torch.equal(part, whole[rows])


def test_no_rope_values(backend):
    q, w_uk = torch.randn(3, 2, 32).bfloat16(), torch.randn(2, 32, 48).bfloat16()
    check_op(OP, (q, w_uk, torch.arange(3), torch.empty(0)), backend)


@pytest.mark.parametrize("arch", [80, 90])
def test_kernel_reads_the_weights_once(arch):
    from kimi_ops.kernels import mla_absorb_query as kernel

    q, w_uk = torch.randn(2, 2, 192).bfloat16(), torch.randn(2, 128, 512).bfloat16()
    result = torch.empty(2, 2, 576).bfloat16()
    with emulated(arch=arch) as emulation:
        kernel.launch(result, q, w_uk, torch.arange(2), torch.rand(32))
    ((_, report),) = emulation.launches
    floor = 2 * (q.numel() + w_uk.numel()) + 4 * 32 + 32  # positions: a sector
    assert report.unique_read_bytes == floor
    # Asked for again are only the queries, once for each part of the columns.
    assert report.total.global_load_bytes < 1.1 * 2 * w_uk.numel()
    assert report.unique_written_bytes == 2 * result.numel()
    assert report.total.global_sectors == report.total.global_sectors_ideal
