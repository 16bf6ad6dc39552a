"""The CUDA C++ kernels of `mla_decode` beyond the body that every backend runs."""

from __future__ import annotations

import pytest
import torch

from kimi_ops._batch_invariant import batch_invariant
from kimi_ops._mla_plan import Plan
from kimi_ops._target import targeting
from kimi_ops.cuda import mla_decode as launcher
from kimi_ops.cuda._launcher import SOURCES
from kimi_ops.quant import latent_fp8
from kimi_ops.reference.mla_decode import mla_decode
from kimi_ops.testing.oracle import assert_close_to_oracle

pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: pip install 'kimi-ops[compile]'")

from kimi_ops.testing.runner import emulated, target_of
from kimi_ops.testing.static import assert_no_spills, assert_uses
from kimi_ops.testing.static.cuda_source import report_cuda


def _call(lengths, heads, *, new=1, page=64, widths=(512, 64), columns=0, fp8=False):
    """Arguments of one call; sequence b depends on ``lengths[b]`` alone."""
    rank, rope = widths
    columns = max(columns, *(-(-n // page) for n in lengths), 1)
    cache = torch.full((len(lengths) * columns, page, rank + rope), torch.nan).bfloat16()
    table = torch.arange(len(cache)).flip(0).int().view(len(lengths), columns)
    queries = []
    for b, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(length)
        values = torch.randn(length, rank + rope, generator=generator).bfloat16()
        for first in range(0, length, page):
            chunk = values[first : first + page]
            cache[table[b, first // page], : len(chunk)] = chunk
        queries.append(torch.randn(new, heads, rank + rope, generator=generator).bfloat16() / 4)
    if fp8:
        cache = latent_fp8.pack(cache, rank)
    return torch.stack(queries), cache, table, torch.tensor(lengths).int(), 0.1446796, rank


def _emulate(args, seed=None):
    """Outputs and reports by kernel of one call in the emulator."""
    out = torch.empty(*args[0].shape[:3], args[5], dtype=args[0].dtype)
    lse = torch.empty(args[0].shape[:3])
    with emulated(arch=80, seed=seed) as emulation:
        launcher.launch((out, lse), *args)
    return out, lse, [report for _, report in emulation.launches]


def _assert_right(args, out, lse):
    cache = args[1] if args[1].dtype == torch.uint8 else args[1].double()
    exact = mla_decode(args[0].double(), cache, *args[2:])
    for result, naive, oracle in zip((out, lse), mla_decode(*args), exact, strict=True):
        assert_close_to_oracle("mla_decode", result, naive.to(result.dtype), oracle)


@pytest.mark.parametrize(
    "arch",
    ["sm_80", *(pytest.param(a, marks=pytest.mark.full) for a in ("sm_90a", "sm_100a", "sm_120"))],
)
def test_compiles_without_spills_for_tensor_cores(arch, request):
    if request.node.get_closest_marker("full") and not request.config.getoption("--full"):
        pytest.skip("part of the full grid: --full")
    reports = report_cuda(SOURCES / "mla_decode.cu", arch)
    reports |= report_cuda(SOURCES / "mla_decode_value.cu", arch)
    for name, report in reports.items():
        assert_no_spills(report)
        if "split" in name or "value" in name:
            assert_uses(report, "HMMA")
            assert_uses(report, "LDSM")
            assert_uses(report, "LDGSTS")


@pytest.mark.parametrize("heads", [16, 32, 64])
def test_the_cache_is_read_once_without_bank_conflicts(heads, monkeypatch):
    args = _call((256,), heads)
    monkeypatch.setattr(launcher, "plan_of", lambda *_, **__: Plan(1, 2, 1, 2))
    out, lse, (split, combine) = _emulate(args)
    _assert_right(args, out, lse)
    q, cache, *_ = args
    assert split.total.global_load_bytes <= 1.03 * (cache.nbytes + 2 * q.nbytes)
    for report in (split, combine):
        assert report.total.shared_wavefronts == report.total.shared_wavefronts_ideal
        assert report.total.global_sectors <= 1.01 * report.total.global_sectors_ideal
    # Per 32 tokens: what the header of mla_decode_split.cuh plans, and the queries once.
    assert split.total.shared_wavefronts <= {16: 1100, 32: 2000, 64: 3100}[heads] * 256 / 32


def test_batch_invariant_mode():
    """A sequence alone, in a batch and with a longer page table: the same bits, several splits."""
    lengths = (520, 3)
    with batch_invariant():
        wide = _call(lengths, 4, page=8, widths=(32, 16), columns=128)
        together = _emulate(wide, seed=1)
        for b, length in enumerate(lengths):
            alone = _emulate(_call((length,), 4, page=8, widths=(32, 16)), seed=b)
            for one, many in zip(alone[:2], together[:2], strict=True):
                assert torch.equal(one[0], many[b]), f"length {length}"
    _assert_right(wide, *together[:2])


@pytest.mark.parametrize("fp8", [False, True])
def test_no_schedule_changes_a_bit(fp8, request, monkeypatch):
    """One split of three steps, so that both tiles are refilled; 20 schedules in the full grid."""
    monkeypatch.setattr(launcher, "plan_of", lambda *_, **__: Plan(1, 1, 1, 1))
    args = _call((70, 0), 20, widths=(32, 16), fp8=fp8)
    out, lse, _ = _emulate(args)
    _assert_right(args, out, lse)
    for seed in range(20 if request.config.getoption("--full") else 2):
        again = _emulate(args, seed=seed)
        assert torch.equal(out, again[0])
        assert torch.equal(lse, again[1])


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("widths", [(33, 6), (40, 0)])
def test_rows_that_no_16_byte_access_reaches(widths, fp8):
    q, cache, *rest = _call((40, 3), 3, page=5, widths=widths, fp8=fp8)
    q = torch.cat((q[..., :1], q), dim=-1)[..., 1:]
    wide = torch.full((*cache.shape[:2], 2 * cache.shape[2] + 1), 7).to(cache.dtype)
    wide[..., 1::2] = cache
    args = (q, wide[..., 1::2], *rest)
    out, lse, _ = _emulate(args)
    _assert_right(args, out, lse)


def test_tiles_fit_the_gpus_that_they_are_chosen_for():
    for arch, rows in ((80, 64), (86, 32), (89, 32), (90, 64), (100, 64), (120, 32)):
        assert launcher.tile_of(target_of(arch), 128).rows == rows
        assert launcher.tile_of(target_of(arch), 5).rows == 16


def test_limits_are_said():
    small = _call((5,), 2, page=8, widths=(32, 16))
    with targeting(target_of(80)):
        assert launcher.unsupported(*small) is None
        single = (small[0].float(), small[1].float(), *small[2:])
        assert "bfloat16, float16; x is float32" in launcher.unsupported(*single)
        wide = _call((5,), 2, page=8, widths=(1024, 16))
        assert "C up to 512" in launcher.unsupported(*wide)
        table = torch.empty(1, 1 << 27, dtype=torch.int32, device="meta")
        assert "2^30" in launcher.unsupported(*small[:2], table, *small[3:])
