"""Rounding to the released int4 format that lets gradients through."""

from __future__ import annotations

import pytest
import torch

from kimi_ops.quant import int4

F64, BF16 = torch.float64, torch.bfloat16


def test_is_the_released_format_and_lets_gradients_through():
    for dtype in (BF16, torch.float16, torch.float32):
        g = torch.Generator().manual_seed(0)
        weight = (torch.randn(3, 5, 64, generator=g) / 8).to(dtype)
        weight[0, 0] = 0
        weight = weight.transpose(0, 1).requires_grad_()
        rounded = int4.fake_quantize(weight)
        packed, scale = int4.quantize(weight.detach())
        assert torch.equal(rounded, int4.dequantize(packed, scale, dtype))
        grad = torch.randn(rounded.shape, generator=g).to(dtype)
        assert torch.equal(torch.autograd.grad(rounded, weight, grad)[0], grad)
        # Rounding what is rounded changes nothing, as long as a group has its -8.
        with torch.no_grad():
            assert not int4.fake_quantize(weight).requires_grad


def test_compiles_and_checks_its_argument():
    weight = torch.randn(4, 64).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(int4.fake_quantize, backend="aot_eager", fullgraph=True)(weight)
    assert torch.equal(compiled, int4.fake_quantize(weight))
    compiled.sum().backward()
    assert weight.grad.eq(1).all()
    with pytest.raises(ValueError, match="int4: weight must hold whole groups of 32"):
        int4.fake_quantize(torch.ones(4, 40))
    with pytest.raises(TypeError, match=r"int4: weight must be bfloat16\|float16\|float32"):
        int4.fake_quantize(torch.ones(4, 32, dtype=F64))
    broken = torch.ones(2, 64)
    broken[0, 40] = torch.nan
    assert int4.fake_quantize(broken).isnan().sum() == 32


def test_int4_training_lowers_a_loss():
    """The loss is that of the rounded weights; the gradient moves the weights behind them."""
    g = torch.Generator().manual_seed(0)
    x, target = torch.randn(64, 32, generator=g), torch.randn(32, 8, generator=g)
    weight = torch.nn.Parameter(torch.zeros(8, 32))
    optimizer = torch.optim.Adam([weight], lr=0.05)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (x @ int4.fake_quantize(weight).T - x @ target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
