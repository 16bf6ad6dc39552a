"""Int4 products in CUDA C++: which form is chosen, what it moves, and what the batch-invariant mode
promises."""

from __future__ import annotations

import pytest
import torch
from op_calls import experts_call

from kimi_ops import _target
from kimi_ops._batch_invariant import batch_invariant
from kimi_ops.cuda import _int4, moe_experts_int4
from kimi_ops.reference.moe_experts_int4 import moe_experts_int4 as reference
from kimi_ops.testing.oracle import assert_close_to_oracle
from kimi_ops.testing.runner import emulated, target_of

BF16 = torch.bfloat16
STAGES = ("prepare", "gate_up", "down", "sum")


@pytest.mark.parametrize(
    ("expected", "form"),
    [
        (8 / 384, (8, 2, False)),
        (64 * 8 / 384, (8, 2, False)),
        (512 * 8 / 384, (64, 0, True)),
    ],
)
def test_the_form_follows_from_what_an_expert_expects(expected, form):
    x, other = torch.empty(1, 64).to(BF16), torch.empty(1, 2)
    assert _int4.form_of(x, x, expected) == _int4.Form(*form)
    assert _int4.form_of(x, other, expected) == _int4.Form(2, 2, many=False)
    with batch_invariant():
        assert _int4.form_of(x, x, expected).many


@pytest.mark.parametrize(("groups", "blocks", "split"), [(224, 512, 1), (224, 64, 4), (32, 8, 2)])
def test_few_blocks_share_k_among_more_warps(groups, blocks, split):
    with _target.targeting(target_of(90)):
        assert _int4.split_of(torch.empty(0), groups, blocks) == split
        with batch_invariant():
            assert _int4.split_of(torch.empty(0), groups, blocks) == 1


@pytest.mark.parametrize(("tokens", "d", "f", "many"), [(1, 1024, 64, False), (40, 512, 256, True)])
def test_experts_read_each_weight_once_in_whole_sectors(tokens, d, f, many):
    args = experts_call(tokens=tokens, experts=1, top_k=1, d=d, f=f)
    y = torch.empty(tokens, d).to(BF16)
    with emulated(arch=80) as run:
        moe_experts_int4.launch(y, *args)
    names = [
        name.removeprefix("moe_experts_int4_").replace("_many", "") for name, _ in run.launches
    ]
    assert names == [f"{stage}_kernel_bf16" for stage in STAGES]
    for (name, report), (codes, scales), k in (
        (run.launches[1], args[1:3], d),
        (run.launches[2], args[3:5], f),
    ):
        assert ("_many_" in name) == many
        weights = codes.nbytes + scales.nbytes
        x = tokens * k * 2 if many else k * 2 + k // 32 * 8 + 512  # starts and factors, zeros
        tables = tokens * 4 + 5 * 32
        assert weights <= report.unique_read_bytes <= weights + x + tables
        assert report.total.global_sectors <= 1.1 * report.total.global_sectors_ideal
        assert report.total.atomics == 0
        if many:
            assert report.total.shared_wavefronts <= 1.05 * report.total.shared_wavefronts_ideal


@pytest.mark.parametrize("seed", [1, *(pytest.param(s, marks=pytest.mark.full) for s in range(20))])
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float16, "scale_dtype": torch.float16, "tokens": 35, "routing": "foreign"},
        {"tokens": 67, "shared": 40, "expert_range": (1, 4)},
    ],
)
def test_many_tokens_under_any_schedule_of_warps(options, seed):
    """Blocks of 16, 32 and 64 tokens; K that is no whole step, rows of scales that are no whole
    pieces."""
    args = experts_call(experts=4, top_k=2, d=160, f=96, **options)
    exact = [a.double() if getattr(a, "is_floating_point", bool)() else a for a in args]
    y = torch.full_like(args[0], torch.nan)
    with emulated(arch=80, uninitialised=(y,), seed=seed) as run:
        moe_experts_int4.launch(y, *args)
    assert "_many_" in run.launches[1][0]
    assert_close_to_oracle("y", y, reference(*args), reference(*exact))


def test_groups_of_x_far_apart():
    """A group of x is lifted by itself, however large it or another one is."""
    args = experts_call(tokens=2, experts=3, top_k=1, d=96, f=64)
    args[0][0, :32] *= 2.0**40  # h is the square of it
    args[0][1, 32:64] *= 2.0**-60
    args[0][1, 64:] = 0
    exact = [a.double() if getattr(a, "is_floating_point", bool)() else a for a in args]
    y = torch.empty(2, 96).to(BF16)
    with emulated(arch=80):
        moe_experts_int4.launch(y, *args)
    assert_close_to_oracle("y", y, reference(*args), reference(*exact))


def test_a_token_alone_gets_the_same_expert_bits_in_batch_invariant_mode():
    args = list(experts_call(tokens=40, experts=3, top_k=2, d=96, f=64, shared=64))
    whole, alone = torch.empty(40, 96).to(BF16), torch.empty(1, 96).to(BF16)
    with batch_invariant(), emulated(arch=80):
        moe_experts_int4.launch(whole, *args)
        args[0], args[5], args[6] = (args[i][7:8] for i in (0, 5, 6))
        moe_experts_int4.launch(alone, *args)
    assert torch.equal(whole[7], alone[0])
