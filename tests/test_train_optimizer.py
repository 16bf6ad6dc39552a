"""Muon against formulations that share no code with it, and the schedule at its corners."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from checkpoint_files import small_config

from kimi_ops.model.errors import KimiError
from kimi_ops.model.kimi import KimiK25
from kimi_ops.train.muon import Muon, make_optimizers, newton_schulz, split_parameters
from kimi_ops.train.schedule import WarmupStableDecay

SHAPES = [(48, 16), (16, 48), (24, 24), (5, 20, 12), (1, 7)]
BAND = (0.68, 1.21)  # of five steps of the default coefficients, from 0.002 on


def _polynomial(s: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """What the iteration makes of a singular value of a matrix of Frobenius norm 1."""
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


def _by_svd(matrix: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz in another way: the polynomial of the singular values of each matrix."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    return u @ (_polynomial(s)[..., None] * vt)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_newton_schulz_moves_singular_values_alone(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    found = newton_schulz(matrix, dtype=torch.float64, eps=0)
    torch.testing.assert_close(found, _by_svd(matrix), rtol=0, atol=1e-11)
    values = torch.linalg.svdvals(newton_schulz(matrix))
    assert BAND[0] <= values.min()
    assert values.max() <= BAND[1]


def test_newton_schulz_band_covers_small_singular_values():
    u, _, vt = torch.linalg.svd(torch.randn(40, 60, dtype=torch.float64), full_matrices=False)
    s = torch.logspace(-2.5, 0, 40, dtype=torch.float64)
    values = torch.linalg.svdvals(newton_schulz(u @ (s[:, None] * vt)))
    # The first three are below 0.002 of the norm and still rise by hundreds.
    inside = s / s.norm() >= 2e-3
    assert ((values >= BAND[0]) & (values <= BAND[1])).sum() >= inside.sum() >= 35


def test_newton_schulz_takes_coefficients_steps_and_dtype():
    matrix = torch.randn(12, 20, dtype=torch.float64)
    cubic = newton_schulz(matrix, coefficients=(1.5, -0.5, 0.0), steps=30, dtype=torch.float64)
    torch.testing.assert_close(cubic @ cubic.mT, torch.eye(12, dtype=torch.float64))
    rough = newton_schulz(matrix, dtype=torch.bfloat16)
    assert rough.dtype == matrix.dtype
    exact = newton_schulz(matrix)
    assert 1e-4 < (rough - exact).norm() / exact.norm() < 0.05
    assert not newton_schulz(torch.zeros(3, 4)).any()
    assert torch.equal(
        newton_schulz(matrix, steps=0, eps=0, dtype=torch.float64).norm().round(), _1
    )


_1 = torch.tensor(1.0, dtype=torch.float64)


def _closed_form(
    w: torch.Tensor,
    gradients: Sequence[torch.Tensor],
    rows: Sequence[int],
    *,
    lr: float,
    decay: float,
    momentum: float,
    nesterov: bool,
) -> torch.Tensor:
    """Muon from sums over all gradients so far and an SVD of each matrix."""
    for t in range(len(gradients)):
        ages = [momentum ** (t - k) for k in range(t + 1)]
        total = sum(a * g for a, g in zip(ages, gradients, strict=False))
        if nesterov:
            total = gradients[t] + momentum * total
        parts = total.split(list(rows), dim=-2)
        o = torch.cat([_by_svd(p) * 0.2 * math.sqrt(max(p.shape[-2:])) for p in parts], dim=-2)
        w = w - lr * (o + decay * w)
    return w


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    ("shape", "rows"),
    [*((s, None) for s in SHAPES), ((30, 12), (20, 10)), ((4, 24, 10), (12, 12))],
    ids=str,
)
def test_muon_is_its_definition(shape, rows, nesterov):
    start = torch.randn(shape, dtype=torch.float64)
    gradients = [torch.randn(shape, dtype=torch.float64) for _ in range(4)]
    w = torch.nn.Parameter(start.clone())
    optimizer = Muon(
        [w], lr=0.03, momentum=0.9, nesterov=nesterov, rows=rows, eps=0, dtype=torch.float64
    )
    for gradient in gradients:
        w.grad = gradient
        optimizer.step()
    expected = _closed_form(
        start,
        gradients,
        rows or shape[-2:-1],
        lr=0.03,
        decay=0.1,
        momentum=0.9,
        nesterov=nesterov,
    )
    torch.testing.assert_close(w.detach(), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (24, 24)], ids=str)
def test_muon_is_that_of_torch(shape, nesterov):
    """torch's keeps momentum as a mean, not a sum; the direction is the same."""
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    same = {"lr": 0.05, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    start = ours.detach().clone()
    optimizers = (
        Muon([ours], dtype=torch.bfloat16, **same),
        torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **same),
    )
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(shape)
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - start).norm()
    # Both iterate in bfloat16, on momentum of another scale: 0.018 to 0.024 apart. A mistake in
    # momentum or Nesterov is worth over 0.1 here.
    assert (ours - theirs).norm() < 0.03 * moved


@pytest.mark.parametrize("shape", [(128, 32), (32, 128), (64, 64), (6, 48, 96)], ids=str)
def test_update_has_the_rms_of_adamw(shape):
    w = torch.nn.Parameter(torch.zeros(shape))
    w.grad = torch.randn(shape) * 1e-3
    Muon([w], lr=1.0, weight_decay=0.0).step()
    for matrix in w.detach().view(-1, *shape[-2:]):
        assert 0.2 * BAND[0] < matrix.square().mean().sqrt() < 0.2 * BAND[1]


def test_decay_is_decoupled():
    start, gradient = torch.randn(2, 20, 10, dtype=torch.float64)
    found = []
    for decay, lr in itertools.product((0.0, 0.5), (0.1, 0.2)):
        w = torch.nn.Parameter(start.clone())
        optimizer = Muon([w], lr=lr, weight_decay=decay, dtype=torch.float64)
        w.grad = gradient
        optimizer.step()
        found.append((w.detach(), optimizer.state[w]["momentum_buffer"]))
    for (plain, m0), (decayed, m1), lr in zip(found[:2], found[2:], (0.1, 0.2), strict=True):
        torch.testing.assert_close(plain - decayed, lr * 0.5 * start, rtol=1e-12, atol=1e-14)
        assert torch.equal(m0, m1)  # it enters no momentum


def test_experts_do_not_see_each_other():
    stack = torch.nn.Parameter(torch.randn(5, 12, 8))
    alone = [torch.nn.Parameter(w.clone()) for w in stack.detach()]
    gradient = torch.randn(5, 12, 8) * torch.tensor([1e-4, 1, 1e3, 0, 1])[:, None, None]
    stack.grad = gradient
    Muon([stack], rows=(6, 6)).step()
    for w, g in zip(alone, gradient, strict=True):
        w.grad = g
    Muon(alone, rows=(6, 6)).step()
    torch.testing.assert_close(stack.detach(), torch.stack([w.detach() for w in alone]))


def test_a_closure_and_parameters_without_gradient():
    w, idle = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3, 2))
    optimizer = Muon([w, idle])

    def closure() -> torch.Tensor:
        loss = w.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 6
    assert torch.equal(idle, torch.ones(3, 2))
    assert not optimizer.state[idle]


@pytest.mark.parametrize(
    ("shape", "arguments", "words"),
    [
        ((4,), {}, r"\[n, m\] or \[E, n, m\], got \[4\]"),
        ((2, 2, 2, 2), {}, "got .2, 2, 2, 2."),
        ((6, 4), {"rows": (4, 4)}, r"add up to .* \(6\), got \(4, 4\)"),
        ((6, 4), {"lr": -1.0}, "lr must be at least 0"),
        ((6, 4), {"lr": math.nan}, "lr must be at least 0"),
        ((6, 4), {"momentum": 1.0}, "momentum must be in 0 .. 1"),
    ],
)
def test_bad_parameters_are_errors(shape, arguments, words):
    with pytest.raises(KimiError, match=words):
        Muon([torch.nn.Parameter(torch.zeros(shape))], **arguments)


@pytest.fixture(scope="module")
def model() -> KimiK25:
    config = dataclasses.replace(small_config(), quantization_config=None)
    model = KimiK25(config, dtype=torch.float32)
    return model.requires_grad_(True)


def test_muon_takes_the_matrices_of_the_released_checkpoint(model):
    groups, rest = split_parameters(model, model.config)
    names = {id(p): n for n, p in model.named_parameters()}
    rows = {names[id(p)]: group["rows"] for group in groups for p in group["params"]}
    text = model.config.text_config
    layer = "language.layers.1"
    latent = text.kv_lora_rank + text.qk_rope_head_dim
    assert rows[f"{layer}.attn.qkv_a"] == (text.q_lora_rank, latent)
    assert rows[f"{layer}.moe.gate_up"] == (text.moe_intermediate_size,) * 2
    assert rows[f"{layer}.moe.down"] == rows[f"{layer}.attn.o"] == (text.hidden_size,)
    assert rows[f"{layer}.moe.gate"] == (text.n_routed_experts,)
    assert len(rows["vision.blocks.0.wqkv_weight"]) == 1  # one matrix in the released file too
    others = {names[id(p)] for p in rest}
    assert {
        "language.embed_tokens",
        "language.lm_head",
        "vision.pos_emb",
        "vision.patch_embed_weight",
        "projector.pre_norm_weight",
        "language.norm",
    } <= others
    left_out = set(names.values()) - rows.keys() - others
    assert left_out == {f"language.layers.{n}.moe.bias" for n in (1, 2)}
    assert not rows.keys() & others
    muon, adamw = make_optimizers(model, model.config, lr=1e-3, nesterov=True)
    assert len(muon.param_groups) == len(groups)
    assert muon.defaults["nesterov"]
    assert adamw.defaults["betas"] == (0.9, 0.95)


def test_foreign_and_frozen_models_are_errors(model):
    with pytest.raises(KimiError, match=r"^weight: no parameter"):
        split_parameters(torch.nn.Linear(3, 3), model.config)
    quantized = KimiK25(small_config(), device="meta")
    quantized.language.layers["1"].moe.down_scale.requires_grad_(True)
    with pytest.raises(KimiError, match=r"^language.layers.1.moe.down_scale: int4 weights"):
        split_parameters(quantized, quantized.config)
    frozen = torch.nn.Module()
    with pytest.raises(KimiError, match="requires_grad"):
        make_optimizers(frozen, model.config, lr=1e-3)


def test_schedule_at_its_corners():
    factor = WarmupStableDecay(warmup=4, stable=10, decay=6, final=0.1)
    assert factor.steps == 20
    assert [factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factor(13) == 1.0
    assert factor(14) < 1.0
    assert factor(16) == pytest.approx(0.55)  # half way down
    assert factor(19) == factor(20) == factor(10**9) == 0.1
    falling = [factor(step) for step in range(13, 20)]
    assert falling == sorted(falling, reverse=True)
    assert WarmupStableDecay(0, 0, 0)(0) == 0.1
    assert WarmupStableDecay(0, 3, 0, final=0.0)(2) == 1.0


def test_schedule_drives_torch():
    w = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = Muon([w], lr=2e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, WarmupStableDecay(2, 2, 2))
    used = []
    for _ in range(7):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert used == pytest.approx([1e-4, 2e-4, 2e-4, 2e-4, 1.1e-4, 2e-5, 2e-5])


@pytest.mark.parametrize(
    "bad", [{"warmup": -1}, {"decay": 1.5}, {"final": 2.0}, {"final": math.nan}]
)
def test_bad_schedules_are_errors(bad):
    with pytest.raises(KimiError, match=next(iter(bad))):
        WarmupStableDecay(**{"warmup": 1, "stable": 1, "decay": 1, **bad})
