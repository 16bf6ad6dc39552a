"""`mla_decode`: every backend against the oracle, and the oracle against plain loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from op_calls import assert_mla_decode, mla_decode_call, on_device, run_mla_decode

import kimi_ops
from kimi_ops._batch_invariant import batch_invariant
from kimi_ops._mla_plan import MAX_SPLITS, Plan, plan_of, splits_of
from kimi_ops.reference.mla_decode import mla_decode
from kimi_ops.testing import cases, check_op

OP = "mla_decode"


def test_matches_oracle(backend, case):
    check_op(OP, case.args(), backend)


def _query_by_query(q, cache, table, lengths, scale, rank):
    batch, new, heads, _ = q.shape
    out = torch.zeros(batch, new, heads, rank, dtype=q.dtype)
    lse = torch.full((batch, new, heads), -torch.inf, dtype=q.dtype)
    for b in range(batch):
        length = min(int(lengths[b]), table.shape[1] * cache.shape[1])
        keys = [
            cache[table[b, t // cache.shape[1]], t % cache.shape[1]] for t in range(max(length, 0))
        ]
        for s in range(new):
            seen = keys[: max(length - (new - 1 - s), 0)]
            if seen:
                kv = torch.stack(seen)
                score = q[b, s] @ kv.T * scale
                out[b, s] = score.softmax(-1) @ kv[:, :rank]
                lse[b, s] = score.exp().sum(-1).log()
    return out, lse


def test_oracle_query_by_query():
    for name in ("bf16-h16-s4", "bf16-h5-page-1", "bf16-small", "bf16-negative-length"):
        case = next(c for c in cases(OP) if c.name == name)
        q, cache, table, lengths, scale, rank = case.args()
        args = (q.double(), cache.double(), table, lengths, scale, rank)
        for ours, theirs in zip(mla_decode(*args), _query_by_query(*args), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_length_beyond_the_page_table_is_what_the_table_holds(backend):
    cache = torch.randn(2, 4, 24).bfloat16()
    table = torch.tensor([[1, 0]], dtype=torch.int32)
    q = torch.randn(1, 1, 2, 24).bfloat16()
    with kimi_ops.use_backend(mla_decode=backend):
        results = [
            kimi_ops.mla_decode(
                q, cache, table, torch.tensor([n], dtype=torch.int32), 0.1, kv_lora_rank=16
            )
            for n in (8, 2**31 - 1)
        ]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_lost_page_is_nan_for_its_sequence_alone(backend):
    case = next(c for c in cases(OP) if c.name == "bf16-lost-page")
    with kimi_ops.use_backend(mla_decode=backend):
        *args, rank = on_device(case.args())
        out, lse = kimi_ops.mla_decode(*args, kv_lora_rank=rank)
    assert out[0].isfinite().all()
    assert lse[0].isfinite().all()
    assert out[1].isnan().all()
    assert lse[1].isnan().all()


# The Triton kernels beyond the common body.
triton = pytest.importorskip("triton", reason="needs triton: pip install 'triton>=3.4'")

from kimi_ops._target import targeting  # noqa: E402
from kimi_ops.kernels import _gluon  # noqa: E402
from kimi_ops.kernels import mla_decode as kernels  # noqa: E402
from kimi_ops.kernels._mla_plan import TILES  # noqa: E402
from kimi_ops.testing.runner import target_of  # noqa: E402
from kimi_ops.testing.static import (  # noqa: E402
    assert_no_spills,
    assert_shared_memory_fits,
    assert_uses,
    assert_wide_loads,
    compile_case,
    triton_cases_of,
)

GLUON = _gluon.compiles()
TENSOR_INSTRUCTION = {"sm_90a": "HGMMA", "sm_100a": "UTCHMMA", "gfx942": "v_mfma"}
# The heaviest use of each tile: page ids per token. Page 64 where there is no other.
STATIC = [
    (case, arch)
    for case in kernels.static_cases()
    for arch in case.arches
    if "_512_" in case.name or "combine" in case.name
]
HEAVY = ("_page_1_splits_8", "64x64_w8_512_page_64_splits_8", "combine_splits_64")
USUAL_ARCHES = ("sm_90a", "sm_100a", "sm_120")


def _emulate(args, arch, seed=None):
    """Outputs and reports by kernel of one call in the emulator."""
    out, lse, launches = run_mla_decode(kernels, args, arch, seed)
    return out, lse, dict(launches)


@pytest.mark.parametrize(
    ("built", "arch"),
    [
        pytest.param(
            case,
            arch,
            marks=[] if case.name.endswith(HEAVY) and arch in USUAL_ARCHES else pytest.mark.full,
            id=f"{case.name}-{arch}",
        )
        for case, arch in STATIC
    ],
)
def test_every_tile_compiles_without_spills_for_its_tensor_cores(built, arch):
    report = compile_case(built, arch)
    assert_no_spills(report)
    assert_shared_memory_fits(report)
    if built.name.startswith("split"):
        old = "fp8_sm_100" in built.name  # 32 rows: too few for tcgen05, whose tiles spilled
        assert_uses(report, "HMMA" if old else TENSOR_INSTRUCTION.get(arch, "HMMA"))
        if arch != "gfx942":
            assert_wide_loads(report, narrow_allowed=100)


@pytest.mark.skipif(not GLUON, reason="Gluon kernels are for other versions of Triton")
@pytest.mark.parametrize("tile", [t for t in TILES["sm_90"] if t.gluon], ids=lambda t: t.gluon)
@pytest.mark.parametrize("splits", [1, 8])
def test_gluon_kernels_compile_without_spills(tile, splits):
    name = f"gluon_{tile.rows}x{tile.tokens}_splits_{splits}"
    (case,) = [case for case in triton_cases_of(OP) if case.name == name]
    report = compile_case(case, "sm_90a")
    assert_no_spills(report)
    assert_shared_memory_fits(report, blocks=tile.per_sm)
    assert_uses(report, "HGMMA")


@pytest.mark.parametrize(
    ("arch", "heads", "multiprocessors"),
    # The last one has a block of 128 tokens for each multiprocessor, the one before it has not.
    [(80, 16, 108), (80, 64, 108), (90, 16, 132), (90, 64, 132), (90, 64, 4)],
)
def test_the_cache_is_read_once_in_whole_sectors(arch, heads, multiprocessors):
    """512 tokens of K2.5's widths in two splits: bytes, sectors, wavefronts against the floor."""
    args = mla_decode_call((512,), heads=heads)
    with (
        targeting(replace(target_of(arch), multiprocessors=multiprocessors)),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(kernels, "plan_of", lambda tile, *_, **__: Plan(1, 2, 1, 2))
        out, lse, reports = _emulate(args, arch)
    assert_mla_decode(args, out, lse)
    combine = reports.pop("mla_decode_combine_kernel")
    ((_, split),) = reports.items()
    q, cache, table, lens, *_ = args
    if arch == 90:
        assert split.total.shared_wavefronts <= 1300 * 512 / 32
    floor = cache.nbytes + 2 * (q.nbytes + lens.nbytes) + table.nbytes
    assert split.total.global_load_bytes <= 1.05 * floor
    assert split.unique_read_bytes <= 1.01 * (cache.nbytes + q.nbytes) + 64
    for report in (split, combine):
        assert report.total.global_sectors <= 1.10 * report.total.global_sectors_ideal
        assert report.total.shared_wavefronts <= 1.25 * report.total.shared_wavefronts_ideal or (
            report is combine
        )


@pytest.mark.parametrize(
    ("arch", "heads", "page"),
    [(80, 4, 8), (90, 8, 64), pytest.param(90, 40, 64, marks=pytest.mark.full)],
)
def test_batch_invariant_mode(arch, heads, page):
    """A sequence alone, in a batch and with a longer page table: the same bits, several splits."""
    widths = (32, 16) if arch == 80 else (512, 64)
    lengths = (1030, 5, 70) if arch == 80 else (520, 3)
    with batch_invariant():
        wide = mla_decode_call(lengths, heads, page=page, widths=widths, columns=1 + 2048 // page)
        together = _emulate(wide, arch, seed=1)
        for b, length in enumerate(lengths):
            alone = _emulate(
                mla_decode_call((length,), heads, page=page, widths=widths), arch, seed=b
            )
            for one, many in zip(alone[:2], together[:2], strict=True):
                assert torch.equal(one[0], many[b]), f"length {length}"
    assert_mla_decode(wide, *together[:2])


@pytest.mark.parametrize(("arch", "seeds"), [(80, 20), (90, 2)])
def test_no_schedule_changes_a_bit(arch, seeds):
    lengths, widths = ((40, 9, 0), (32, 16)) if arch == 80 else ((130, 0), (512, 64))
    args = mla_decode_call(lengths, 8, page=64, widths=widths)
    out, lse, _ = _emulate(args, arch)
    assert_mla_decode(args, out, lse)
    for seed in range(seeds):
        again = _emulate(args, arch, seed=seed)
        assert torch.equal(out, again[0])
        assert torch.equal(lse, again[1])


@pytest.mark.parametrize("heads", [8, 64])
def test_one_split_writes_the_results_itself_empty_sequences_too(heads):
    args = mla_decode_call((0, 64, 3), heads)
    out, lse, reports = _emulate(args, 90, seed=0)
    assert len(reports) == 1
    assert_mla_decode(args, out, lse)
    assert not out[0].any()
    assert (lse[0] == -torch.inf).all()


def test_splits_fill_the_gpu_and_no_more():
    for groups in (1, 3, 64, 200, 5000):
        for blocks in (0, 1, 2, 64, 4096):
            splits = splits_of(groups, blocks, 132)
            assert 1 <= splits <= max(1, min(blocks, MAX_SPLITS))
            if groups >= 132 * 4:
                assert splits == 1
    assert splits_of(1, 512, 132) >= 64
    # What decides the order of a sequence's sums does not see the batch in batch-invariant mode.
    for tile in (tile for tiles in TILES.values() for tile in tiles):
        plans = {plan_of(tile, 132, b, 64, 65536, invariant=True) for b in (1, 7, 500)}
        assert len(plans) == 1


def test_limits_are_said():
    small = mla_decode_call((5,), 2, page=8, widths=(32, 16))
    with targeting(target_of(80)):
        assert kernels.unsupported(*small) is None
        assert "float32" in kernels.unsupported(small[0].float(), small[1].float(), *small[2:])
        wide = mla_decode_call((5,), 2, page=8, widths=(1024, 16))
        assert "C up to 512" in kernels.unsupported(*wide)
        table = torch.empty(1, 1 << 27, dtype=torch.int32, device="meta")
        assert "2^30" in kernels.unsupported(*small[:2], table, *small[3:])
