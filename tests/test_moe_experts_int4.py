"""`moe_experts_int4`: every backend against the oracle, the oracle against transformers' experts,
pair by pair, and split over ranks."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from op_calls import experts_call
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

import kimi_ops
from kimi_ops import _target
from kimi_ops._batch_invariant import batch_invariant
from kimi_ops.kernels import moe_experts_int4 as kernels
from kimi_ops.kernels._int4_product import tile_for
from kimi_ops.quant import int4
from kimi_ops.reference.moe_experts_int4 import moe_experts_int4
from kimi_ops.testing import cases, check_op
from kimi_ops.testing.oracle import assert_close_to_oracle
from kimi_ops.testing.runner import emulated, target_of
from kimi_ops.testing.static import (
    assert_avoids,
    assert_no_spills,
    assert_shared_memory_fits,
    assert_uses,
    compile_case,
    triton_cases_of,
)
from kimi_ops.testing.triton_interpreter import interpreted

OP = "moe_experts_int4"


def _exact(case):
    args = case.args()
    return [a.double() if getattr(a, "is_floating_point", bool)() else a for a in args]


def test_matches_oracle(backend, case):
    check_op(OP, case.args(), backend)


def test_oracle_pair_by_pair(case):
    x, gate_up, gu_scale, down, d_scale, weights, ids, s_gate_up, s_down, span = _exact(case)
    first, last = span or (0, len(gate_up))
    expected = torch.zeros_like(x)

    @functools.cache
    def weight(expert):
        both = (gate_up[expert], gu_scale[expert]), (down[expert], d_scale[expert])
        return [int4.unpack(w).double() * s.repeat_interleave(32, 1) for w, s in both]

    for t, row in enumerate(ids.tolist()):
        for k, expert in enumerate(row):
            if first <= expert < last:
                w_in, w_out = weight(expert - first)
                gate, up = (w_in @ x[t]).chunk(2)
                expected[t] += weights[t, k] * (w_out @ (F.silu(gate) * up))
        if s_gate_up is not None:
            gate, up = (s_gate_up @ x[t]).chunk(2)
            expected[t] += s_down @ (F.silu(gate) * up)
    torch.testing.assert_close(moe_experts_int4(*_exact(case)), expected)


def test_reference_is_transformers_experts_on_dequantised_weights():
    case = next(c for c in cases(OP) if c.name == "bf16-skewed")
    x, gate_up, gu_scale, down, d_scale, weights, ids, *_ = case.args()
    config = DeepseekV3Config(
        hidden_size=x.shape[1], moe_intermediate_size=down.shape[2] * 8, n_routed_experts=len(down)
    )
    experts = DeepseekV3Experts(config)
    experts.gate_up_proj.data = int4.dequantize(gate_up, gu_scale, torch.float32)
    experts.down_proj.data = int4.dequantize(down, d_scale, torch.float32)
    with torch.no_grad():
        theirs = experts(x.float(), ids.long(), weights)
    ours = moe_experts_int4(x.float(), gate_up, gu_scale, down, d_scale, weights, ids)
    torch.testing.assert_close(ours, theirs)


def test_ranks_of_experts_add_up_to_the_whole():
    case = next(c for c in cases(OP) if c.name == "bf16-shared")
    x, *experts, weights, ids, s_gate_up, s_down, _ = _exact(case)
    whole = moe_experts_int4(x, *experts, weights, ids, s_gate_up, s_down)
    parts = torch.zeros_like(x)
    for first, last in ((0, 3), (3, 3), (3, 8)):
        local = [w[first:last] for w in experts]
        shared = (s_gate_up, s_down) if first == 0 else (None, None)
        parts += moe_experts_int4(x, *local, weights, ids, *shared, (first, last))
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("arch", [80, 90])
def test_each_weight_is_read_once_in_whole_sectors(arch):
    """One token of one expert: codes and scales, nothing twice."""
    args = experts_call(tokens=1, experts=1, top_k=1, d=512, f=512)
    y = torch.empty(1, 512, dtype=torch.bfloat16)
    with emulated(arch=arch) as run:
        kernels.launch(y, *args)
    names = [name.removeprefix("moe_experts_int4_") for name, _ in run.launches]
    names = [name.replace("direct_", "") for name in names]  # Gluon, where this Triton has it
    assert names == ["prepare_kernel", "gate_up_kernel", "down_kernel", "sum_kernel"]
    reports = dict(zip(names, (report for _, report in run.launches), strict=True))
    for name, (codes, scales) in (
        ("gate_up_kernel", args[1:3]),
        ("down_kernel", args[3:5]),
    ):
        report = reports[name]
        weights = codes.nbytes + scales.nbytes
        x = 512 * 2 + 16 * 8 + 512  # rearranged x, its bias and factors, zeros
        tables = 5 * 32
        assert weights <= report.unique_read_bytes <= weights + x + tables
        assert report.total.global_sectors <= 1.1 * report.total.global_sectors_ideal
        assert report.total.shared_wavefronts <= 1.25 * report.total.shared_wavefronts_ideal
        assert report.total.atomics == 0


_BF16, _FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("arch", "tokens", "experts", "top_k", "d", "f", "options"),
    [
        (90, 1, 2, 2, 1024, 64, {}),  # whole steps, of four tiles and of none
        (80, 2, 40, 2, 160, 96, {"shared": 96, "expert_range": (3, 40), "routing": "foreign"}),
        (90, 2, 3, 1, 256, 64, {"dtype": _FP16, "scale_dtype": _FP16, "shared": 64}),
        (80, 1, 2, 1, 96, 128, {"scale_dtype": torch.float32}),
    ],
)
def test_one_or_two_tokens_a_block(arch, tokens, experts, top_k, d, f, options):
    """In Gluon on a Triton that has it; x of one group far above that of another."""
    build = next(c for c in cases(OP) if c.name == "bf16-9").build.func
    generator = torch.Generator().manual_seed(5)
    args = build(generator, tokens=tokens, experts=experts, top_k=top_k, d=d, f=f, **options)
    high, low = (2.0**60, 2.0**-60) if args[0].dtype == _BF16 else (16.0, 2.0**-20)
    args[0][-1, :32] *= low
    args[0][-1, 32:64] *= high if tokens == 1 else low
    exact = [a.double() if getattr(a, "is_floating_point", bool)() else a for a in args]
    y = torch.full((tokens, d), torch.nan, dtype=args[0].dtype)
    with emulated(arch=arch, uninitialised=(y,)):
        kernels.launch(y, *args)
    assert_close_to_oracle("y", y, moe_experts_int4(*args), moe_experts_int4(*exact))


def test_many_tokens_over_several_steps_along_k():
    """Registers that a product still reads must not be written by the next step: wgmma's hazard."""
    args = experts_call(tokens=20, experts=2, top_k=1, d=288, f=160)
    y = torch.empty(20, 288, dtype=torch.bfloat16)
    with emulated(arch=90):
        kernels.launch(y, *args)
    oracle = moe_experts_int4(*(a.double() if i in (0, 2, 4, 5) else a for i, a in enumerate(args)))
    assert_close_to_oracle("y", y, moe_experts_int4(*args), oracle)


def test_a_token_alone_gets_the_same_bits_in_batch_invariant_mode():
    args = list(experts_call(tokens=20, experts=3, top_k=2, d=64, f=64))
    whole, alone = torch.empty(20, 64).bfloat16(), torch.empty(1, 64).bfloat16()
    with batch_invariant(), _target.targeting(target_of(80)), interpreted(seed=1):
        kernels.launch(whole, *args)
        for at in (0, 6, 7):
            args[at] = None if args[at] is None else args[at][7:8]
        args[0], args[5], args[6] = (experts_call(20, 3, 2, 64, 64)[i][7:8] for i in (0, 5, 6))
        kernels.launch(alone, *args)
    assert torch.equal(whole[7], alone[0])


@pytest.mark.parametrize(
    ("tokens", "experts", "block"),
    [(1, 384, 1), (2, 384, 2), (8, 384, 2), (64, 384, 8), (512, 384, 32), (64, 4, 64), (1, 1, 1)],
)
def test_a_block_holds_what_an_expert_gets_under_even_routing(tokens, experts, block):
    device = torch.device("cpu")
    with _target.targeting(target_of(90)):
        assert tile_for(device, tokens, 8 * tokens, experts).tokens == block
        with batch_invariant():
            assert tile_for(device, tokens, 8 * tokens, experts).tokens == 16


def test_offsets_beyond_31_bits():
    """Experts more than 2^31 elements apart: all but two rows of the storage are never touched."""
    d, f, apart = 64, 64, 2**30 + 64  # in words: 2^31 of the kernel's units and more
    args = list(experts_call(tokens=3, experts=2, top_k=2, d=d, f=f))
    near = args[1]
    storage = torch.empty(apart + near[0].numel(), dtype=torch.int32)
    far = storage.as_strided(near.shape, (apart, d // 8, 1))
    far.copy_(near)
    expected, y = torch.empty(3, d).bfloat16(), torch.empty(3, d).bfloat16()
    with _target.targeting(target_of(80)), interpreted(seed=0):
        kernels.launch(expected, *args)
        args[1] = far
        kernels.launch(y, *args)
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("stage", "tokens", "arch", "instruction"),
    [
        ("gate_up", 1, "sm_80", "HMMA"),
        ("down", 1, "sm_90a", "HMMA"),  # never HGMMA: see _int4_product
        ("gate_up", 32, "sm_90a", "HMMA"),
        ("down", 8, "sm_100a", "HMMA"),
    ],
)
def test_compiled_without_spills_and_on_tensor_cores(stage, tokens, arch, instruction):
    """At the widths of Kimi K2.5; `kimi-ops compile moe_experts_int4` does all tiles."""
    name = f"{stage}_bfloat16_7168x2048_{tokens}_"
    (case,) = (c for c in triton_cases_of(OP) if c.name.startswith(name) and arch in c.arches)
    report = compile_case(case, arch)
    assert_no_spills(report)
    assert_shared_memory_fits(report)
    assert_uses(report, instruction)
    assert_avoids(report, "HGMMA")


def test_refusals_name_the_limit():
    args = list(experts_call(tokens=1, experts=2, top_k=1, d=64, f=64))
    with _target.targeting(target_of(80)):
        assert kernels.unsupported(*args) is None
        shifted = list(args)
        shifted[1] = torch.zeros(args[1].numel() + 1, dtype=torch.int32)[1:].view(args[1].shape)
        assert "multiple of 16 bytes" in kernels.unsupported(*shifted)
        assert "x is float32" in kernels.unsupported(args[0].float(), *args[1:])
    with (
        pytest.raises(kimi_ops._dispatch.BackendError, match="run on a GPU"),
        kimi_ops.use_backend(moe_experts_int4="triton"),
    ):
        kimi_ops.moe_experts_int4(*args[:7])
