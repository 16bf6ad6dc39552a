"""The CUDA C++ kernels of `mla_decode` beyond the body that every backend runs."""

from __future__ import annotations

import pytest
import torch
from op_calls import assert_mla_decode as _assert_right
from op_calls import mla_decode_call as _call
from op_calls import run_mla_decode

from kimi_ops._batch_invariant import batch_invariant
from kimi_ops._mla_plan import Plan
from kimi_ops._target import targeting
from kimi_ops.cuda import mla_decode as launcher
from kimi_ops.cuda import mla_decode_value
from kimi_ops.cuda._launcher import SOURCES
from kimi_ops.reference.mla_decode_value import mla_decode_value as reference
from kimi_ops.testing.inputs import mla
from kimi_ops.testing.oracle import assert_close_to_oracle

pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: pip install 'kimi-ops[compile]'")

from kimi_ops.testing.runner import emulated, target_of
from kimi_ops.testing.static import assert_no_spills, assert_uses
from kimi_ops.testing.static.cuda_source import report_cuda

FULL = pytest.mark.full


def _emulate(args, seed=None, arch=80):
    """Outputs and reports by kernel of one call in the emulator."""
    out, lse, launches = run_mla_decode(launcher, args, arch, seed)
    return out, lse, [report for _, report in launches]


@pytest.mark.parametrize(
    "arch",
    ["sm_80", *(pytest.param(a, marks=pytest.mark.full) for a in ("sm_90a", "sm_100a", "sm_120"))],
)
def test_compiles_without_spills_for_tensor_cores(arch):
    reports = report_cuda(SOURCES / "mla_decode.cu", arch)
    reports |= report_cuda(SOURCES / "mla_decode_value.cu", arch)
    for name, report in reports.items():
        assert_no_spills(report)
        if "split" in name or "value" in name:
            assert_uses(report, "HGMMA" if name.endswith("sm90") else "HMMA")
            assert_uses(report, "LDSM")
            assert_uses(report, "LDGSTS")
    assert any(name.endswith("sm90") for name in reports) == (arch == "sm_90a")


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


# What wgmma's path takes on sm_90: Kimi K2.5's widths, more than 16 rows, a cache that is not fp8.
def test_on_sm_90_all_products_are_wgmma_and_the_cache_is_read_once(monkeypatch):
    args = _call((256,), 64)
    monkeypatch.setattr(launcher, "plan_of", lambda *_, **__: Plan(1, 2, 1, 2))
    out, lse, (split, combine) = _emulate(args, arch=90)
    _assert_right(args, out, lse)
    q, cache, *_ = args
    assert set(split.total.tensor) == {"wgmma bf16.f32"}
    assert split.total.global_load_bytes <= 1.03 * (cache.nbytes + 2 * q.nbytes)
    assert split.total.shared_wavefronts == split.total.shared_wavefronts_ideal
    for report in (split, combine):
        assert report.total.global_sectors <= 1.01 * report.total.global_sectors_ideal
    # Per 32 tokens: 1,284 in long splits, and what each of two short ones begins and ends with.
    moved = split.total.shared_wavefronts + split.total.matrix_shared_wavefronts
    assert moved <= 1500 * 256 / 32


@pytest.mark.parametrize(
    ("lengths", "heads", "new", "page", "dtype"),
    [
        ((130, 0, -3), 17, 1, 64, torch.float16),
        ((66, 1), 10, 2, 1, torch.bfloat16),
        ((33, 65), 20, 4, 7, torch.bfloat16),
    ],
)
def test_on_sm_90_hostile_lengths_and_pages(lengths, heads, new, page, dtype, monkeypatch):
    """Two splits, of which the first one of 130 tokens ends in the middle of a tile."""
    plan = Plan(-(-new * heads // 64), 2, 1, 2)
    monkeypatch.setattr(launcher, "plan_of", lambda *_, **__: plan)
    q, cache, table, _, *rest = _call([max(n, 0) for n in lengths], heads, new=new, page=page)
    table = torch.cat((table, torch.full_like(table, 2**31 - 1)), dim=1)
    args = (q.to(dtype), cache.to(dtype), table, torch.tensor(lengths).int(), *rest)
    out, lse, reports = _emulate(args, arch=90)
    assert reports[0].kernel.endswith("sm90")
    _assert_right(args, out, lse)


def test_on_sm_90_rows_that_no_16_byte_access_reaches():
    """The same bits as of aligned ones: the path must not depend on where tensors lie."""
    q, cache, *rest = _call((70, 3), 20, page=5)
    aligned = _emulate((q, cache, *rest), arch=90)
    q = torch.cat((q[..., :1], q), dim=-1)[..., 1:]
    wide = torch.full((*cache.shape[:2], 2 * cache.shape[2] + 1), 7.0).bfloat16()
    wide[..., 1::2] = cache
    strided = _emulate((q, wide[..., 1::2], *rest), arch=90)
    assert strided[2][0].kernel.endswith("sm90")
    for one, other in zip(aligned[:2], strided[:2], strict=True):
        assert torch.equal(one, other)
    _assert_right((q, cache, *rest), *aligned[:2])


def test_on_sm_90_lost_page_and_tile_of_lost_pages():
    q, cache, table, *rest = _call((70, 200, 70), 33, page=16)
    table[1, 12], table[2] = -1, 10**6
    out, lse, _ = _emulate((q, cache, table, *rest), arch=90)
    assert out[0].isfinite().all()
    assert lse[0].isfinite().all()
    assert out[1:].isnan().all()
    assert lse[1:].isnan().all()


@pytest.mark.parametrize(("heads", "new"), [(20, 1), (6, 3)])
def test_on_sm_90_the_stage_that_projects_joins_what_wgmma_left(heads, new):
    """More than 16 rows, of one new token and of three; two splits of the longest sequence."""
    args = mla.mla_decode_value(
        torch.Generator().manual_seed(heads), (130, 0, 33), heads, 24, new=new, page=16
    )
    value = torch.full((3, new, heads, 24), torch.nan).bfloat16()
    with emulated(arch=90, uninitialised=(value,)) as run:
        mla_decode_value.launch(value, *args)
    (first, _), (second, _) = run.launches
    assert first == "mla_decode_split_kernel_bf16_sm90"
    assert second.startswith("mla_decode_value_combine_kernel_bf16")
    exact = [a.double() if getattr(a, "is_floating_point", bool)() else a for a in args]
    assert_close_to_oracle("value", value, reference(*args), reference(*exact))


@FULL
def test_on_sm_90_batch_invariant_mode():
    lengths = (530, 3)
    with batch_invariant():
        wide = _call(lengths, 20, columns=20)
        together = _emulate(wide, seed=1, arch=90)
        for b, length in enumerate(lengths):
            alone = _emulate(_call((length,), 20), seed=b, arch=90)
            for one, many in zip(alone[:2], together[:2], strict=True):
                assert torch.equal(one[0], many[b]), f"length {length}"
    _assert_right(wide, *together[:2])


@pytest.mark.parametrize(
    ("lengths", "heads", "new"),
    [
        ((300, 0), 64, 1),
        pytest.param((130, 64, 65), 20, 3, marks=FULL),
        pytest.param((33, 400), 17, 1, marks=FULL),
    ],
)
def test_on_sm_90_no_schedule_changes_a_bit(lengths, heads, new, request, monkeypatch):
    """One split, so that both tiles are refilled; 20 schedules in the full grid."""
    monkeypatch.setattr(launcher, "plan_of", lambda *_, **__: Plan(1, 1, 1, 1))
    args = _call(lengths, heads, new=new)
    out, lse, _ = _emulate(args, arch=90)
    _assert_right(args, out, lse)
    for seed in range(20 if request.config.getoption("--full") else 2):
        again = _emulate(args, seed=seed, arch=90)
        assert torch.equal(out, again[0])
        assert torch.equal(lse, again[1])


def test_tiles_fit_the_gpus_that_they_are_chosen_for():
    for arch, rows in ((80, 64), (86, 32), (89, 32), (90, 64), (100, 64), (120, 32)):
        assert launcher.tile_of(target_of(arch), 128).rows == rows
        assert launcher.tile_of(target_of(arch), 5).rows == 16
        wgmma = arch == 90
        assert (launcher.tile_of(target_of(arch), 17, usual=True) == launcher.TILE_SM90) == wgmma
    assert launcher.tile_of(target_of(90), 16, usual=True).rows == 16
    assert launcher.TILE_SM90.shared_bytes <= target_of(90).shared_bytes


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
