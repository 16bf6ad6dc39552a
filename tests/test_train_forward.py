"""The forward of training: the model's own logits, right gradients, and what it saw by the way."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

import kimi_ops
from kimi_ops.model.conversation import PromptBuilder
from kimi_ops.model.kimi import KimiK25
from kimi_ops.model.make_checkpoint import make_checkpoint, tiny_config
from kimi_ops.model.random_files import random_checkpoint_files
from kimi_ops.quant.int4 import fake_quantize
from kimi_ops.tasks import make_sample
from kimi_ops.train.balance import sequence_balance_loss
from kimi_ops.train.examples import IGNORED, Batch, Encoder, Lessons, pack
from kimi_ops.train.forward import Options, forward
from kimi_ops.train.initial import initialize_

CONFIG = tiny_config(text={"num_hidden_layers": 3}, quantized=False)
TASKS = ("scenes", "clips", "sums", "tool results")


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder, CONFIG, tokenizer_files=random_checkpoint_files(CONFIG))
    return PromptBuilder(folder)


def batch_of(builder: PromptBuilder, *tasks: str) -> Batch:
    encoder = Encoder(builder)
    return pack([encoder(make_sample(task, "train", 3, several=True)) for task in tasks])


@pytest.fixture(scope="module")
def batch(builder):
    return batch_of(builder, *TASKS)


def trained(dtype: torch.dtype = torch.float32) -> KimiK25:
    model = KimiK25(CONFIG, dtype=torch.float32)
    initialize_(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("moe.bias"):  # not all ones and zeros
                parameter += 0.1 * torch.randn(parameter.shape)
            parameter.data = parameter.to(dtype)
    return model


def loss_of(model: KimiK25, batch: Batch, options: Options) -> torch.Tensor:
    logits, seen = forward(model, batch, options)
    targets = batch.targets[batch.targets != IGNORED]
    return F.cross_entropy(logits, targets) + seen.balance_loss


def test_logits_are_those_of_the_model(builder, batch):
    torch.manual_seed(0)
    model = trained()
    with torch.no_grad():
        logits, seen = forward(model, batch, Options())
    cu, begin = batch.cu_seqlens.tolist(), 0
    patches = frames = 0
    for number, task in enumerate(TASKS):
        example = Encoder(builder)(make_sample(task, "train", 3, several=True))
        ids = batch.ids[cu[number] : cu[number + 1]]
        assert torch.equal(ids, example.ids)
        n, entries = len(example.media.pixel_values), len(example.media.grid_thws)
        with torch.no_grad():
            alone = model(
                ids[None],
                batch.pixel_values[patches : patches + n] if n else None,
                batch.grid_thws[frames : frames + entries] if n else None,
            )[0]
        wanted = alone[example.targets != IGNORED]
        torch.testing.assert_close(
            logits[begin : begin + len(wanted)], wanted, rtol=1e-4, atol=1e-4
        )
        begin, patches, frames = begin + len(wanted), patches + n, frames + entries
    assert begin == len(logits)
    assert set(seen.chosen) == {1, 2}
    assert all(ids.shape == (len(batch.ids), 4) for ids in seen.chosen.values())


def test_gradients_are_the_slope_of_the_loss(batch):
    """In float64, along a random direction of every group of parameters."""
    torch.manual_seed(1)
    model = trained(torch.float64)
    batch = Batch(*(batch.ids, batch.targets, batch.cu_seqlens), batch.pixel_values.double(),
                  batch.grid_thws)  # fmt: skip
    options = Options(balance=0.01)
    loss_of(model, batch, options).backward()
    parts = ("attn.q_b", "attn.kv_b", "attn.qkv_a", "attn.o", "moe.gate_up", "moe.down", "moe.gate",
             "shared", "layernorm", "mlp", "embed_tokens", "lm_head", "vision.blocks", "pos_emb",
             "patch_embed", "projector")  # fmt: skip
    for part in parts:
        chosen = [p for n, p in model.named_parameters() if part in n and p.requires_grad]
        assert chosen
        assert all(p.grad is not None for p in chosen)
        directions = [torch.randn_like(p) * float(p.detach().std() + 1e-3) for p in chosen]
        slope = sum(float((p.grad * d).sum()) for p, d in zip(chosen, directions, strict=True))
        ends = []
        with torch.no_grad():
            for factor in (1e-6, -2e-6):
                for p, d in zip(chosen, directions, strict=True):
                    p.add_(d, alpha=factor)
                ends.append(float(loss_of(model, batch, options)))
            for p, d in zip(chosen, directions, strict=True):
                p.add_(d, alpha=1e-6)
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope, rel=1e-4, abs=1e-7), part


def test_recomputation_changes_memory_and_nothing_else(builder):
    batch = batch_of(builder, "scenes", "sums", "tool results")  # the encoder recomputes nothing
    torch.manual_seed(2)
    model = trained()
    kept, gradients = [], []
    for recompute in (False, True):
        twin = copy.deepcopy(model)
        size = 0

        def pack_hook(x: torch.Tensor) -> torch.Tensor:
            nonlocal size
            size += x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda x: x):
            loss = loss_of(twin, batch, Options(recompute=recompute))
        kept.append(size)
        loss.backward()
        gradients.append({n: p.grad for n, p in twin.named_parameters()})
    assert kept[1] < 0.8 * kept[0]
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert (gradient is None) == (other is None)
        assert gradient is None or torch.equal(gradient, other), name


def test_experts_are_quantised_on_the_way(batch):
    torch.manual_seed(3)
    model = trained()
    plain, _ = forward(model, batch, Options())
    rounded, _ = forward(model, batch, Options(quantize=fake_quantize))
    assert not torch.equal(plain, rounded)
    loss = F.cross_entropy(rounded, batch.targets[batch.targets != IGNORED])
    loss.backward()
    assert float(model.get_parameter("language.layers.1.moe.gate_up").grad.abs().max()) > 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("moe.gate_up", "moe.down")):
                parameter.copy_(fake_quantize(parameter))
    again, _ = forward(model, batch, Options())
    assert torch.equal(again, rounded)


def test_what_a_forward_sees(batch):
    torch.manual_seed(4)
    model = trained()
    calls = []
    original = kimi_ops.mla_prefill

    def prefill(q, k, *others, **options):
        calls.append((q.detach(), k.detach(), others[-1]))
        return original(q, k, *others, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kimi_ops, "mla_prefill", prefill)
        _, seen = forward(model, batch, Options(balance=0.5, watch_logits=True))
    assert [*seen.largest] == [0, 1, 2]
    cu = batch.cu_seqlens.tolist()
    for layer, (q, k, scale) in enumerate(calls):
        best = torch.full((4,), -torch.inf)
        for a, b in itertools.pairwise(cu):
            logits = torch.einsum("thd,shd->hts", q[a:b], k[a:b]) * scale
            hidden = torch.ones(b - a, b - a).triu(1).bool()
            best = best.maximum(logits.masked_fill(hidden, -torch.inf).amax((1, 2)))
        torch.testing.assert_close(seen.largest[layer], best)
    # An untrained router is nearly even: each of the two layers is near alpha.
    assert 0.99 < float(seen.balance_loss.detach()) < 1.2
    assert seen.balance_loss.requires_grad
    scores = torch.full((len(batch.ids), 16), 0.5)
    even = sequence_balance_loss(scores, seen.chosen[1], batch.cu_seqlens, 0.5)
    assert float(even) == pytest.approx(0.5)


def test_lessons_depend_on_their_number_alone(builder):
    mixture = {"sums": 2, "scenes": 1}
    first, again = (Lessons(builder, mixture, 5) for _ in range(2))
    _ = again[3]
    for name in ("ids", "targets", "cu_seqlens", "pixel_values", "grid_thws"):
        assert torch.equal(getattr(first[1], name), getattr(again[1], name)), name
    assert not torch.equal(first[0].ids, first[1].ids)
    assert len(first) == 5
    assert len(first[2].cu_seqlens) == 4
    other = Lessons(builder, mixture, 5, seed=1)
    assert not torch.equal(first[0].ids, other[0].ids)


def test_initial_weights():
    model, twin = (KimiK25(CONFIG, dtype=torch.float32) for _ in range(2))
    initialize_(model, seed=7)
    initialize_(twin, seed=7)
    for (name, a), (_, b) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert bool(a.isfinite().all()), name
        assert a.requires_grad != name.endswith("moe.bias"), name
    q_b = model.get_parameter("language.layers.0.attn.q_b")
    assert float(q_b.detach().std()) == pytest.approx(q_b.shape[1] ** -0.5, rel=0.05)
    down = model.get_parameter("language.layers.1.moe.down")
    assert float(down.detach().std()) == pytest.approx((down.shape[2] * 6) ** -0.5, rel=0.05)
    assert bool((model.get_parameter("language.norm") == 1).all())
    assert not bool(model.get_parameter("vision.blocks.0.norm0_bias").any())
