"""`int4_linear`: every backend against the oracle, the oracle against compressed-tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

from kimi_ops.reference.int4_linear import int4_linear
from kimi_ops.testing import cases, check_op

OP = "int4_linear"


def test_matches_oracle(backend, case):
    check_op(OP, case.args(), backend)


def test_oracle_is_a_linear_layer_on_the_librarys_weights(case):
    x, packed, scale = case.args()
    q = unpack_from_int32(packed, 4, torch.Size((packed.shape[0], x.shape[-1])))
    weight = q.double() * scale.double().repeat_interleave(32, dim=1)
    torch.testing.assert_close(int4_linear(x.double(), packed, scale), F.linear(x.double(), weight))


def test_case_list_holds_the_formats_extremes():
    packed, scale = cases(OP)[0].args()[1:]
    assert packed[0].eq(0).all()
    assert packed[1].eq(-1).all()
    assert scale[2].eq(0).all()
    assert 0 < scale[3].max() < torch.finfo(scale.dtype).smallest_normal
