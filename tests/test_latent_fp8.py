"""The fp8 format of the latent cache: its bytes, its rounding against a search among all codes, and
the conversions of the Triton kernels, bit for bit against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kimi_ops._dispatch import get_op
from kimi_ops.quant import latent_fp8
from kimi_ops.reference.mla_latent_write import mla_latent_write
from kimi_ops.testing.inputs import mla
from kimi_ops.testing.latent_fp8 import compare_written, with_plain_cache

CODES = torch.arange(256, dtype=torch.uint8)
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def _parts(cache, rank):
    codes = cache[..., :rank]
    scales = cache[..., rank : rank + 16].clone().view(torch.float32)
    return codes, scales, cache[..., rank + 16 :].clone().view(torch.bfloat16)


def _nearest_codes(y):
    """By search: the code nearest to each value, of two equally near ones the even one."""
    values = CODES.view(torch.float8_e4m3fn).double()
    finite = (CODES & 0x7F) != 0x7F
    distance = (y.double()[..., None] - values).abs().masked_fill(~finite, torch.inf)
    near = distance == distance.amin(-1, keepdim=True)
    signed = (CODES >= 128) == torch.signbit(y)[..., None]
    rank = 2 * (CODES % 2 == 0).int() + signed.int()
    return rank.expand_as(near).masked_fill(~near, -1).argmax(-1).byte()


@pytest.mark.parametrize("dtype", FLOATS)
def test_codes_are_the_nearest_ones(dtype):
    entry = torch.randn(64, 48 + 8).to(dtype)
    entry *= torch.exp2(torch.arange(64) % 20 - 14.0)[:, None].to(dtype)
    cache = latent_fp8.pack(entry, 48)
    assert cache.dtype == torch.uint8
    assert cache.shape == (64, latent_fp8.entry_bytes(48, 8)) == (64, 48 + 16 + 16)
    codes, scales, rope = _parts(cache, 48)
    latent = entry[:, :48].float()
    scale = latent.abs().amax(-1) / 448
    assert torch.equal(scales, scale[:, None].expand(-1, 4))
    assert torch.equal(codes, _nearest_codes(latent * (1 / scale)[:, None]))
    assert (codes.view(torch.float8_e4m3fn).float().abs().amax(-1) == 448).all()
    assert torch.equal(rope, entry[:, 48:].bfloat16())
    wide = torch.promote_types(dtype, torch.float32)
    values = codes.view(torch.float8_e4m3fn).to(wide) * scale[:, None].to(wide)
    assert torch.equal(latent_fp8.unpack(cache, 48, dtype)[:, :48], values.to(dtype))


def test_ties_go_to_even_codes():
    y = torch.tensor([448.0, 17, 19, 1.0625, 1.1875, 2**-10, 3 * 2**-10, -(2**-10), -17, 0])
    codes, scales, _ = _parts(latent_fp8.pack(F.pad(y, (0, 4)), 10), 10)
    assert (scales == 1).all()
    values = codes.view(torch.float8_e4m3fn).float().tolist()
    assert values == [448, 16, 20, 1, 1.25, 0, 2**-8, 0, -16, 0]


def test_worked_example():
    entry = torch.tensor([0.0, 896.0, -2.0, 2**-8, 1.0, -0.5])
    cache = latent_fp8.pack(entry, 4)
    assert bytes(cache.tolist()).hex(" ") == (
        "00 7e b8 01 " + "00 00 00 40 " * 4 + "80 3f 00 bf"  # codes; 2.0 four times; 1, -0.5
    )
    assert torch.equal(latent_fp8.unpack(cache, 4, torch.float32), entry)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_visible(bad):
    entry = torch.randn(3, 32 + 4).bfloat16()
    entry[1, 7], entry[2, 33] = bad, bad
    cache = latent_fp8.pack(entry, 32)
    codes, scales, rope = _parts(cache, 32)
    assert (codes[1] == 0x7F).all()
    assert scales[1].isnan().all()
    values = latent_fp8.unpack(cache, 32)
    assert values[1, :32].isnan().all()
    assert values[[0, 2], :32].isfinite().all()
    assert torch.equal(rope.nan_to_num(7), entry[:, 32:].nan_to_num(7))


def test_zeros_and_tiny_rows():
    tiny = torch.zeros(4, 16)
    tiny[1, 0] = 2.0**-149  # float32's smallest number
    tiny[2, :2] = torch.tensor([448 * 2.0**-126, 2.0**-130])
    tiny[3, :2] = torch.tensor([-(2.0**-126), 2.0**-135])
    cache = latent_fp8.pack(tiny, 16)
    codes, scales, _ = _parts(cache, 16)
    assert (scales == latent_fp8.SMALLEST_SCALE).all()
    assert not codes[:2].any()
    expected = tiny.clone()
    expected[1] = 0
    assert torch.equal(latent_fp8.unpack(cache, 16, torch.float32), expected)


def test_the_first_scale_counts_and_every_code_has_its_value():
    cache = latent_fp8.pack(torch.zeros(1, 256 + 2), 256)
    cache[0, :256] = CODES
    cache[0, 256:260] = torch.tensor([0.5]).view(torch.uint8)
    cache[0, 260:272] = 255
    expected = CODES.view(torch.float8_e4m3fn).float() / 2
    values = latent_fp8.unpack(cache, 256, torch.float32)[0]
    torch.testing.assert_close(values[:256], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("rank", "rope"), [(1, 0), (5, 1), (512, 64)])
@pytest.mark.parametrize("lead", [(), (0,), (2, 3)])
def test_any_widths_and_leading_dimensions(rank, rope, lead):
    entry = torch.randn(*lead, rank + rope)
    cache = latent_fp8.pack(entry, rank)
    assert cache.shape == (*lead, latent_fp8.entry_bytes(rank, rope))
    values = latent_fp8.unpack(cache, rank, torch.float32)
    largest = entry[..., :rank].abs().amax(-1, keepdim=True)
    assert ((values - entry).abs() <= 2**-4 * entry.abs() + 2**-17 * largest).all()


def test_k25_takes_656_bytes():
    assert latent_fp8.entry_bytes(512, 64) == 656


def test_what_does_not_fit_is_said():
    with pytest.raises(TypeError, match="entry must be a float tensor, got uint8"):
        latent_fp8.pack(torch.zeros(2, 8, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match=r"with C = 9 of at least 1, got \[2, 8\]"):
        latent_fp8.pack(torch.zeros(2, 8), 9)
    with pytest.raises(ValueError, match="with C = 0 of at least 1"):
        latent_fp8.pack(torch.zeros(2, 8), 0)
    with pytest.raises(TypeError, match="cache must be uint8 and dtype a float one, got int8"):
        latent_fp8.unpack(torch.zeros(2, 32, dtype=torch.int8), 4)
    with pytest.raises(ValueError, match=r"must be \[..., C\+16\+2\*R\] with C = 4 .* \[2, 23\]"):
        latent_fp8.unpack(torch.zeros(2, 23, dtype=torch.uint8), 4)


# The comparison with the oracle: what it must refuse.


def _written():
    args = list(
        mla.mla_latent_write(torch.Generator().manual_seed(3), 12, (96, 32, 16), 4, fp8=True)
    )
    op = get_op("mla_latent_write")
    results = []
    for exact in (False, True):
        plain = with_plain_cache(op, args)
        if exact:
            plain = [a.double() if getattr(a, "is_floating_point", bool)() else a for a in plain]
        mla_latent_write(*plain)
        results.append(plain[6])
    actual = args[6].clone()
    mla_latent_write(*args[:6], actual, args[7])
    return op, args, actual, *results


def _slot(args, token):
    return divmod(int(args[5][token]), args[6].shape[1])


CHANGES = {
    "a code one step off": lambda x: x[:1].add_(1),
    "the first scale": lambda x: x[34:35].add_(2),
    "a copy of the scale": lambda x: x[36:37].add_(1),
    "a rope value": lambda x: x[49:50].add_(1),
    "codes shifted": lambda x: x[:32].copy_(x[:32].roll(1)),
    "NaN": lambda x: x[35:36].fill_(0x7F),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_wrong_byte_is_noticed(change):
    op, args, actual, baseline, oracle = _written()
    assert len(compare_written("cache", op, args, actual, baseline, oracle)) == 2
    CHANGES[change](actual[_slot(args, 8)])
    with pytest.raises(AssertionError, match="cache"):
        compare_written("cache", op, args, actual, baseline, oracle)


def test_truncated_codes_and_bytes_beside_are_noticed():
    op, args, actual, baseline, oracle = _written()
    codes = actual[_slot(args, 8)][:32]
    latent = baseline[_slot(args, 8)][:32].float()
    values = codes.view(torch.float8_e4m3fn).float() * (latent.abs().amax() / 448)
    grew = values.abs() > latent.abs() * (1 + 2**-8)
    codes[grew] -= 1
    with pytest.raises(AssertionError, match="over budget"):
        compare_written("cache", op, args, actual, baseline, oracle)
    op, args, actual, baseline, oracle = _written()
    actual[0, 0, 5] ^= 1
    slots = args[5].tolist()
    if 0 in slots:
        args[5][slots.index(0)] = -1
    with pytest.raises(AssertionError, match="changed unasked"):
        compare_written("cache", op, args, actual, baseline, oracle)


# The conversions of the Triton kernels.
triton = pytest.importorskip("triton", reason="needs triton: pip install 'triton>=3.4'")
import triton.language as tl  # noqa: E402

from kimi_ops.kernels._e4m3 import CODE_UNIT, from_e4m3, to_e4m3  # noqa: E402
from kimi_ops.testing.runner import emulated  # noqa: E402
from kimi_ops.testing.triton_interpreter import interpreted  # noqa: E402


@triton.jit
def _to_kernel(x_ptr, code_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(code_ptr + offs, to_e4m3(tl.load(x_ptr + offs)).to(tl.uint8))


@triton.jit
def _from_kernel(code_ptr, value_ptr, N: tl.constexpr, ASSEMBLY: tl.constexpr):
    offs = tl.arange(0, N)
    value = from_e4m3(tl.load(code_ptr + offs), value_ptr.dtype.element_ty, ASSEMBLY)
    tl.store(value_ptr + offs, value)


def _ways():
    yield lambda: interpreted(seed=1)
    yield from (lambda arch=arch: emulated(arch=arch) for arch in (80, 90))


def test_kernels_round_as_torch_does():
    """All codes, what lies half way between two, and the float32 numbers next to those."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    half_way = (values[1:] + values[:-1]) / 2
    edges = torch.cat((values, half_way, torch.tensor([448.00003, 463.9])))
    near = [edges, edges.nextafter(torch.tensor(torch.inf)), edges.nextafter(torch.tensor(0.0))]
    x = torch.cat((*near, torch.rand(200) * 448, torch.tensor([2.0**-149, 2.0**-11])))
    x = torch.cat((x, -x))
    x = F.pad(x, (0, 2048 - len(x)))
    expected = x.to(torch.float8_e4m3fn).view(torch.uint8)
    for way in _ways():
        codes = torch.zeros(2048, dtype=torch.uint8)
        with way():
            _to_kernel[(1,)](x, codes, N=2048)
        assert torch.equal(codes, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_widen_every_code_exactly(dtype):
    expected = CODES.view(torch.float8_e4m3fn).to(dtype) / CODE_UNIT.value
    nan = expected.isnan()
    assert nan.sum() == 2
    for number, way in enumerate([*_ways(), *_ways()]):
        values = torch.zeros(256, dtype=dtype)
        with way():
            _from_kernel[(1,)](CODES, values, N=256, ASSEMBLY=number > 3)
        assert torch.equal(values[~nan].view(torch.int16), expected[~nan].view(torch.int16))
