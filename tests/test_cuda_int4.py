"""Int4 products in CUDA C++: what they move, and what the batch-invariant mode promises."""

from __future__ import annotations

import torch

from kimi_ops._batch_invariant import batch_invariant
from kimi_ops.cuda import int4_linear, moe_experts_int4
from kimi_ops.quant import int4
from kimi_ops.testing import cases
from kimi_ops.testing.runner import emulated


def _layer(**options):
    case = next(c for c in cases("moe_experts_int4") if c.name == "bf16-9")
    return case.build.func(torch.Generator().manual_seed(7), **options)


def test_experts_read_each_weight_once_in_whole_sectors():
    args = _layer(tokens=1, experts=1, top_k=1, d=1024, f=64)
    y = torch.empty(1, 1024, dtype=torch.bfloat16)
    with emulated(arch=80) as run:
        moe_experts_int4.launch(y, *args)
    names = [name.removeprefix("moe_experts_int4_") for name, _ in run.launches]
    assert names == [f"{s}_kernel_bf16" for s in ("prepare", "gate_up", "down", "sum")]
    for (_, report), (codes, scales) in zip(run.launches[1:3], (args[1:3], args[3:5]), strict=True):
        weights = codes.nbytes + scales.nbytes
        x = 1024 * 2 + 32 * 4 + 512  # rearranged x, sums of its groups, zeros
        assert weights <= report.unique_read_bytes <= weights + x + 5 * 32
        assert report.total.global_sectors <= 1.1 * report.total.global_sectors_ideal
        assert report.total.atomics == 0


def test_a_token_alone_gets_the_same_bits_in_batch_invariant_mode():
    packed, scale = int4.quantize(torch.randn(48, 608).bfloat16())
    x = torch.randn(11, 608).bfloat16()
    whole, alone = torch.empty(11, 48).bfloat16(), torch.empty(1, 48).bfloat16()
    with batch_invariant(), emulated(arch=80):
        int4_linear.launch(whole, x, packed, scale)
        int4_linear.launch(alone, x[9:10], packed, scale)
    assert torch.equal(whole[9], alone[0])
