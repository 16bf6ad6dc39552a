"""The Gluon form of `moe_experts_int4` and `int4_linear` for many tokens: when it is chosen, what
it reads, and that neither batch nor neighbours change a token's bits."""

from __future__ import annotations

import pytest
import torch
from op_calls import experts_call

from kimi_ops import _target
from kimi_ops._batch_invariant import batch_invariant
from kimi_ops.kernels import _int4_many_plan, int4_linear, moe_experts_int4
from kimi_ops.kernels._int4_product import tile_for
from kimi_ops.quant import int4
from kimi_ops.testing.runner import emulated, target_of
from kimi_ops.testing.static import (
    assert_no_spills,
    assert_shared_memory_fits,
    assert_uses,
    assert_wide_loads,
    compile_case,
    triton_cases_of,
)
from kimi_ops.testing.triton_interpreter import interpreted


@pytest.mark.parametrize(
    ("tokens", "block"), [(8, 2), (64, 8), (128, 8), (512, 16), (2048, 64), (8192, 64)]
)
def test_a_block_holds_what_most_experts_get(tokens, block):
    device = torch.device("cpu")
    with _target.targeting(target_of(90)):
        tile = tile_for(device, tokens, 8 * tokens, 384, gluon=True)
        assert (tile.tokens, tile.gluon) == (block, block >= 8)
        with batch_invariant():
            assert tile_for(device, tokens, 8 * tokens, 384, gluon=True).tokens == 16


def test_what_the_form_is_not_for_goes_to_plain_triton():
    x, scale = torch.empty(2, 256).bfloat16(), torch.empty(8, 8).bfloat16()

    def fits(scale=scale, dense=()):
        return _int4_many_plan.fits(x, [scale], dense)

    with _target.targeting(target_of(80)):
        assert fits()
        assert not fits(scale[:, :7])  # columns that are no whole steps
        assert not fits(scale.float())
        assert not fits(torch.empty(8, 12).bfloat16()[:, :8])  # rows 24 bytes apart
        assert not fits(torch.empty(65).bfloat16()[1:].view(8, 8))  # not at 16 bytes
        assert not fits(dense=[torch.empty(8, 96).bfloat16()])
        with interpreted():
            assert not fits()
    with _target.targeting(_target.Target("hip", 942, 304, 64 << 10)):
        assert not fits()


@pytest.mark.parametrize("arch", [80, 90])
def test_each_weight_is_read_once_in_whole_sectors(arch):
    """Twelve tokens of one expert: codes and scales, nothing twice, no bank conflict."""
    args = experts_call(tokens=12, experts=1, top_k=1, d=512, f=128)
    y = torch.empty(12, 512, dtype=torch.bfloat16)
    with emulated(arch=arch) as run:
        moe_experts_int4.launch(y, *args)
    for (name, report), (codes, scales), k in (
        (run.launches[1], args[1:3], 512),
        (run.launches[2], args[3:5], 128),
    ):
        assert name.endswith("_gluon_kernel")
        weights = codes.nbytes + scales.nbytes
        assert weights <= report.unique_read_bytes <= weights + 12 * k * 2 + 5 * 32
        assert report.total.global_sectors <= 1.1 * report.total.global_sectors_ideal
        assert report.total.shared_wavefronts <= 1.25 * report.total.shared_wavefronts_ideal
        assert report.total.atomics == 0


@pytest.mark.parametrize("arch", [80, 90])
def test_a_token_alone_gets_the_same_bits_in_batch_invariant_mode(arch):
    """And with x as a view that is not aligned; under another schedule of warps."""
    packed, scale = int4.quantize(torch.randn(64, 256).bfloat16())
    x = torch.randn(20, 257).bfloat16()[:, 1:]
    whole, alone = torch.empty(20, 64).bfloat16(), torch.empty(1, 64).bfloat16()
    with batch_invariant():
        with emulated(arch=arch, seed=1) as run:
            int4_linear.launch(whole, x, packed, scale)
        with emulated(arch=arch, seed=2):
            int4_linear.launch(alone, x[7:8], packed, scale)
    assert run.launches[1][0] == "int4_linear_gluon_kernel"
    assert torch.equal(whole[7], alone[0])


@pytest.mark.parametrize(("arch", "instruction"), [("sm_80", "HMMA"), ("sm_90a", "HGMMA")])
def test_compiled_without_spills_and_on_tensor_cores(arch, instruction):
    """At the widths of Kimi K2.5; `kimi-ops compile moe_experts_int4` does all tiles."""
    name = "gluon_gate_up_bfloat16_7168x2048_16_"
    (case,) = (
        c
        for c in triton_cases_of("moe_experts_int4")
        if c.name.startswith(name) and arch in c.arches
    )
    report = compile_case(case, arch)
    assert_no_spills(report)
    assert_shared_memory_fits(report)
    assert_uses(report, instruction)
    assert_wide_loads(report, min_bits=128, in_hottest_loop=True)
