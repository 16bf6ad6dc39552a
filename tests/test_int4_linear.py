"""`int4_linear`: every backend against the oracle, the oracle against compressed-tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

import kimi_ops
from kimi_ops.kernels import int4_linear as kernels
from kimi_ops.quant import int4
from kimi_ops.reference.int4_linear import int4_linear
from kimi_ops.testing import cases, check_op
from kimi_ops.testing.runner import emulated

OP = "int4_linear"


def test_matches_oracle(backend, case):
    check_op(OP, case.args(), backend)


def test_oracle_is_a_linear_layer_on_the_librarys_weights(case):
    x, packed, scale = case.args()
    if len(packed) == 0:  # the library cannot unpack nothing
        assert int4_linear(x, packed, scale).shape == (*x.shape[:-1], 0)
        return
    q = unpack_from_int32(packed, 4, torch.Size((packed.shape[0], x.shape[-1])))
    weight = q.double() * scale.double().repeat_interleave(32, dim=1)
    torch.testing.assert_close(int4_linear(x.double(), packed, scale), F.linear(x.double(), weight))


def test_case_list_holds_the_formats_extremes():
    packed, scale = cases(OP)[0].args()[1:]
    assert packed[0].eq(0).all()
    assert packed[1].eq(-1).all()
    assert scale[2].eq(0).all()
    assert 0 < scale[3].max() < torch.finfo(scale.dtype).smallest_normal


def test_extreme_rows_are_exact(backend):
    """Small integers in, powers of two as scales: nothing rounds, so every row must be equal."""
    q = torch.randint(-8, 8, (5, 256), dtype=torch.int8)
    q[0], q[1] = -8, 7
    scale = torch.ones(5, 8).bfloat16()
    scale[2], scale[3] = 0, 2.0**-100
    x = torch.randint(-2, 3, (9, 256)).bfloat16()
    x[0] = torch.arange(256) % 2
    with kimi_ops.use_backend(int4_linear=backend):
        y = kimi_ops.int4_linear(x, int4.pack(q), scale)
    exact = x.double() @ (q.double() * scale.double()[:, :1]).T
    assert torch.equal(y, exact.bfloat16())
    assert y[:, 2].eq(0).all()
    assert y[0, :2].tolist() == [-8 * 128, 7 * 128]


@pytest.mark.parametrize("rows", [1, 2])
def test_weights_are_read_once_in_whole_sectors(rows):
    packed, scale = int4.quantize(torch.randn(64, 512).bfloat16())
    y = torch.empty(rows, 64).bfloat16()
    with emulated(arch=80) as run:
        kernels.launch(y, torch.randn(rows, 512).bfloat16(), packed, scale)
    (_, _), (_, report) = run.launches
    weights = packed.nbytes + scale.nbytes
    assert weights <= report.unique_read_bytes <= weights + rows * (512 * 2 + 16 * 4) + 32
    assert report.total.global_sectors <= 1.1 * report.total.global_sectors_ideal
