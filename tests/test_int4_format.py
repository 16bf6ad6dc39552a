"""The int4 format, bit for bit against compressed-tensors and the checkpoint's worked examples."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import (
    pack_to_int32,
    unpack_from_int32,
)
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.quantization.lifecycle.forward import dequantize as library_dequantize
from compressed_tensors.quantization.lifecycle.forward import quantize as library_quantize
from compressed_tensors.quantization.utils import calculate_qparams

from kimi_ops.quant import int4

ARGS = QuantizationArgs(
    num_bits=4, symmetric=True, strategy=QuantizationStrategy.GROUP, group_size=32
)


def _values(kind, shape):
    if kind == "random":
        return torch.randint(-8, 8, shape, dtype=torch.int8)
    return torch.full(shape, {"all -8": -8, "all 7": 7, "zero": 0}[kind], dtype=torch.int8)


@pytest.mark.parametrize("kind", ["random", "all -8", "all 7", "zero"])
@pytest.mark.parametrize("shape", [(1, 32), (5, 96), (4096, 7168), (7168, 2048)])
def test_packing_equals_the_library(kind, shape):
    q = _values(kind, shape)
    packed = int4.pack(q)
    assert packed.dtype == torch.int32
    assert torch.equal(packed, pack_to_int32(q, 4))
    assert torch.equal(int4.unpack(packed), q)
    assert torch.equal(int4.unpack(packed), unpack_from_int32(packed, 4, torch.Size(shape)))


def test_any_words_unpack_as_the_library_does():
    info = torch.iinfo(torch.int32)
    packed = torch.randint(info.min, info.max + 1, (257, 64)).to(torch.int32)
    packed[0, :4] = torch.tensor([info.min, info.max, -1, 0])
    assert torch.equal(int4.unpack(packed), unpack_from_int32(packed, 4, torch.Size((257, 512))))
    assert torch.equal(int4.pack(int4.unpack(packed)), packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scales", ["ordinary", "zero", "subnormal", "largest"])
def test_dequantising_equals_the_library(dtype, scales):
    packed = int4.pack(_values("random", (64, 256)))
    scale = (torch.rand(64, 8) + 0.5).to(dtype)
    info = torch.finfo(dtype)
    scale *= {"ordinary": 0.01, "zero": 0, "subnormal": 0, "largest": info.max / 16}[scales]
    if scales == "subnormal":
        scale += info.smallest_normal / 8
        assert 0 < scale[0, 0] < info.smallest_normal
    q = int4.unpack(packed).to(dtype)
    theirs = library_dequantize(q, scale, args=ARGS, dtype=dtype)
    assert torch.equal(int4.dequantize(packed, scale, dtype), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("std", [1.0, 0.02, 1e-3])
def test_quantising_equals_the_library(dtype, std):
    weight = (torch.randn(48, 160) * std).to(dtype)
    weight[0] = 0  # a group of zeros
    weight[1, :32] = weight[1, 0].abs()  # a group of one value
    weight[2, 5] *= 50
    packed, scale = int4.quantize(weight)
    groups = weight.unflatten(-1, (-1, 32))
    their_scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), ARGS)
    assert torch.equal(scale, their_scale)
    q = library_quantize(weight, their_scale, zero, ARGS, dtype=torch.int8)
    assert torch.equal(int4.unpack(packed), q)


def test_first_worked_example():
    q = torch.stack((torch.arange(64) % 16 - 8, 7 - torch.arange(64) % 16)).to(torch.int8)
    scale = torch.tensor([[0.5, 0.25], [0.125, 2.0]]).bfloat16()
    packed = int4.pack(q)
    words = [[1985229328, -19088744] * 4, [-1985229329, 19088743] * 4]
    assert packed.tolist() == words
    octets = packed[:, :2].contiguous().view(torch.uint8).tolist()
    assert bytes(octets[0]).hex(" ") == "10 32 54 76 98 ba dc fe"
    assert bytes(octets[1]).hex(" ") == "ef cd ab 89 67 45 23 01"
    weight = int4.dequantize(packed, scale)
    assert weight.dtype == torch.bfloat16
    assert [weight[0, 0].item(), weight[0, 32].item()] == [-4, -2]
    assert [weight[1, 0].item(), weight[1, 32].item()] == [0.875, 14]


def test_second_worked_example():
    torch.manual_seed(0)
    weight = torch.randn(3, 64).bfloat16()
    given = [-1.125, -1.15625, -0.25, -0.43359375, 0.84765625, 0.69140625, -0.31640625, -2.109375]
    assert weight[0, :8].tolist() == given
    packed, scale = int4.quantize(weight)
    assert scale[0, 0].item() == 0.28125
    assert int4.unpack(packed)[0, :8].tolist() == [-4, -4, -1, -2, 3, 2, -1, -8]
    assert packed[0, 0].item() == 0x07AB6744
    expected = [-1.125, -1.125, -0.28125, -0.5625, 0.84375, 0.5625, -0.28125, -2.25]
    assert int4.dequantize(packed, scale)[0, :8].tolist() == expected


def test_stacked_experts():
    weight = torch.randn(3, 16, 64)
    packed, scale = int4.quantize(weight)
    assert (packed.shape, scale.shape) == ((3, 16, 8), (3, 16, 2))
    for expert in range(3):
        one = int4.quantize(weight[expert])
        assert torch.equal(packed[expert], one[0])
        assert torch.equal(scale[expert], one[1])


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"int4: q must hold whole groups of 32 .* got \[2, 40\]"):
        int4.pack(torch.zeros(2, 40, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"packed must hold .* multiple of 4\), got \[2, 5\]"):
        int4.unpack(torch.zeros(2, 5, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"weight must hold whole groups .* got \[\]"):
        int4.quantize(torch.ones(()))
    with pytest.raises(
        ValueError, match=r"scale must be \[2, 1\] for packed \[2, 4\], got \[2, 2\]"
    ):
        int4.dequantize(torch.zeros(2, 4, dtype=torch.int32), torch.ones(2, 2))


def test_values_and_dtypes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"q must be in -8 .. 7, got 0 .. 8"):
        int4.pack(torch.arange(32, dtype=torch.int8).clamp(max=8))
    with pytest.raises(ValueError, match="not finite"):
        int4.quantize(torch.full((1, 32), torch.nan))
    with pytest.raises(TypeError, match=r"q must be int8, got \[1, 32\] int32"):
        int4.pack(torch.zeros(1, 32, dtype=torch.int32))
    with pytest.raises(TypeError, match="packed must be int32"):
        int4.unpack(torch.zeros(1, 4))
    with pytest.raises(TypeError, match="weight must be bfloat16"):
        int4.quantize(torch.zeros(1, 32).double())
