"""`mla_latent_write`: every backend against the oracle, the oracle token by token and against
transformers' rotary embedding."""

from __future__ import annotations

import pytest
import torch
from op_calls import on_device
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

import kimi_ops
from kimi_ops.reference._rotate import rope
from kimi_ops.reference.mla_latent_write import mla_latent_write
from kimi_ops.testing import cases, check_op
from kimi_ops.testing.inputs import mla
from kimi_ops.testing.runner import emulated

OP = "mla_latent_write"


def test_matches_oracle(backend, case):
    check_op(OP, case.args(), backend)


def test_oracle_token_by_token():
    case = next(c for c in cases(OP) if c.name == "bf16-page-7")
    args = [a.double() if getattr(a, "is_floating_point", bool)() else a for a in case.args()]
    qkv_a, q_weight, kv_weight, positions, inv_freq, slots, cache, eps = args
    expected = cache.clone()
    q_a = mla_latent_write(*args)
    for t, slot in enumerate(slots.tolist()):
        q, c, k = qkv_a[t].split((1536, 512, 64))
        if slot == -1 or 0 <= slot < cache.shape[0] * cache.shape[1]:
            q = q * (q.square().mean() + eps) ** -0.5 * q_weight
            torch.testing.assert_close(q_a[t], q)
        else:
            assert q_a[t].isnan().all()
            continue
        if slot == -1:
            continue
        turned = torch.view_as_complex(k.view(32, 2).contiguous())
        turned = turned * torch.polar(torch.ones(32).double(), positions[t] * inv_freq)
        c = c * (c.square().mean() + eps) ** -0.5 * kv_weight
        entry = torch.cat((c, torch.view_as_real(turned).flatten()))
        expected[slot // cache.shape[1], slot % cache.shape[1]] = entry
    torch.testing.assert_close(cache, expected, equal_nan=True)


def test_rope_is_transformers_up_to_the_order_of_pairs():
    x, positions = torch.randn(7, 3, 64).double(), torch.randint(0, 5000, (7,))
    inv_freq = 50000.0 ** (-torch.arange(0, 64, 2) / 64.0)
    angle = positions[:, None].double() * inv_freq.double()
    cos, sin = (f(torch.cat((angle, angle), -1))[None] for f in (torch.cos, torch.sin))
    theirs, _ = apply_rotary_pos_emb_interleave(
        x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin
    )
    theirs = theirs[0].transpose(0, 1)  # all first halves of the pairs, then all second ones
    ours = rope(x, positions, inv_freq)
    torch.testing.assert_close(ours[..., 0::2], theirs[..., :32])
    torch.testing.assert_close(ours[..., 1::2], theirs[..., 32:])


def test_angles_are_not_rounded_to_the_activations_dtype():
    # In bfloat16 position 262,143 would be 262,144: one radian off.
    x = torch.tensor([[1.0, 0.0]]).bfloat16()
    y = rope(x, torch.tensor([262143]), torch.ones(1))
    expected = torch.tensor([262143.0]).double()
    torch.testing.assert_close(
        y[0].double(), torch.cat((expected.cos(), expected.sin())), atol=2**-8, rtol=2**-8
    )


def _arguments(tokens, **options):
    with torch.device("cpu"):  # where the generator is
        return mla.mla_latent_write(torch.Generator().manual_seed(7), tokens, **options)


def test_widths_that_are_no_powers_of_two(backend):
    check_op(OP, _arguments(5, widths=(100, 36, 12), page=3), backend)


def test_no_rope_values(backend):
    check_op(OP, _arguments(3, widths=(32, 16, 0), page=4), backend)


def test_a_token_does_not_depend_on_the_batch(backend):
    whole = list(on_device(_arguments(6, page=4)))
    with kimi_ops.use_backend(mla_latent_write=backend):
        q_a = kimi_ops.mla_latent_write(*whole)
        for t in (0, 2, 5):
            part = list(on_device(_arguments(6, page=4)))
            for i in (0, 3, 5):  # qkv_a, positions, slot_mapping
                part[i] = part[i][t : t + 1]
            alone = kimi_ops.mla_latent_write(*part)
            assert torch.equal(alone[0].view(torch.int16), q_a[t].view(torch.int16))
            page, row = divmod(int(part[5]), 4)
            assert torch.equal(part[6][page, row], whole[6][page, row])


@pytest.mark.parametrize("arch", [80, 90])
def test_kernel_moves_each_byte_once_in_one_launch(arch):
    from kimi_ops.kernels import mla_latent_write as kernel

    args = _arguments(4)  # fewer than 5: all slots are in the cache
    with emulated(arch=arch) as emulation:
        kernel.launch(torch.empty(4, 1536).bfloat16(), *args)
    ((_, report),) = emulation.launches
    rows, weights = 4 * 4224, 4096 + 128
    assert report.unique_read_bytes == rows + weights + 2 * 32  # positions and slots: a sector
    assert report.unique_written_bytes == rows
    assert report.total.global_sectors == report.total.global_sectors_ideal


@pytest.mark.parametrize("arch", [80, 90])
def test_angles_do_not_go_through_approximate_sines(arch):
    from kimi_ops.kernels import mla_latent_write as kernel
    from kimi_ops.testing.runner import compile_triton

    arguments, warps = kernel._arguments(torch.empty(1, 1536).bfloat16(), *_arguments(1))
    ptx = compile_triton(kernel.mla_latent_write_kernel, arguments, arch=arch, num_warps=warps).ptx
    for word in ("sin.approx", "cos.approx", ".local"):
        assert word not in ptx, word
    assert "ld.global.v4" in ptx


@pytest.mark.parametrize("arch", [80, 90])
def test_fp8_cache_is_written_in_the_same_launch(arch):
    from kimi_ops.kernels import mla_latent_write as kernel

    args = _arguments(4, fp8=True)
    before = args[6].clone()
    with emulated(arch=arch) as emulation:
        kernel.launch(torch.empty(4, 1536).bfloat16(), *args)
    ((_, report),) = emulation.launches
    assert report.total.global_store_bytes == 4 * (2 * 1536 + 656)
    # Every other token starts in the middle of a sector.
    assert report.total.global_sectors <= 1.05 * report.total.global_sectors_ideal
    kernels = args[6].clone()
    args[6].copy_(before)
    mla_latent_write(*args)
    assert (kernels != args[6]).float().mean() < 0.01
    slots = args[5].long()
    # Given the same latent the bytes are the same: zeros, NaN and the scale's four copies.
    for token in (0, 2):
        page, row = divmod(int(slots[token]), 64)
        assert torch.equal(kernels[page, row, :528], args[6][page, row, :528])
