"""QK-Clip scales the logits of a head by gamma and touches nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from checkpoint_files import small_config

from kimi_ops.model.errors import KimiError
from kimi_ops.model.kimi import KimiK25
from kimi_ops.model.rope import rotate
from kimi_ops.train.qk_clip import clip_model_, max_logits, qk_clip_

H, N, R, V, Q, C, T = 5, 16, 8, 12, 24, 20, 33
SCALE = 0.3
GENERATOR_SEED = 4


class Heads:
    """Weights and latents of one layer, and the logits and values that they give."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(GENERATOR_SEED)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        self.q_b, self.kv_b = normal(H * (N + R), Q), normal(H * (N + V), C)
        self.q_a, self.latent, self.rotary = normal(T, Q), normal(T, C), normal(T, R)
        self.inv_freq = 10.0 ** -torch.arange(R // 2).float()

    def expanded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``q, k [T, H, N+R]`` and ``v [T, H, V]`` in float64, so that no rounding blurs gamma."""
        positions = torch.arange(T)
        q = (self.q_a.double() @ self.q_b.double().T).view(T, H, N + R)
        kv = (self.latent.double() @ self.kv_b.double().T).view(T, H, N + V)
        q = torch.cat((q[..., :N], rotate(q[..., N:], positions, self.inv_freq)), dim=-1)
        rotary = rotate(self.rotary.double()[:, None], positions, self.inv_freq)
        k = torch.cat((kv[..., :N], rotary.expand(T, H, R)), dim=-1)
        return q, k, kv[..., N:]

    def logits(self) -> torch.Tensor:
        """``[H, T, T]`` of all pairs, those to come too."""
        q, k, _ = self.expanded()
        return torch.einsum("thd,shd->hts", q, k) * SCALE

    def largest(self) -> torch.Tensor:
        q, k, _ = self.expanded()
        cu = torch.tensor([0, T])
        return max_logits(q, k, cu, cu, SCALE, block=7)


def test_logits_scale_by_exactly_gamma():
    heads = Heads()
    before, values, largest = heads.logits(), heads.expanded()[2], heads.largest()
    threshold = float(largest.sort().values[1:3].mean())  # two heads below, three above
    kept = heads.q_b.clone(), heads.kv_b.clone()
    gamma = qk_clip_(heads.q_b, heads.kv_b, largest, nope=N, rope=R, threshold=threshold)
    after = heads.logits()
    clipped = largest > threshold
    assert clipped.sum() == 3
    assert torch.equal(gamma < 1, clipped)
    error = (after - gamma[:, None, None] * before).abs().amax((1, 2)) / before.abs().amax((1, 2))
    assert float(error.max()) < 3e-6
    torch.testing.assert_close(heads.largest(), largest.clamp(max=threshold), rtol=3e-6, atol=0)
    assert torch.equal(heads.expanded()[2], values)
    for now, then, width in zip((heads.q_b, heads.kv_b), kept, (N + R, N + V), strict=True):
        now, then = now.view(H, width, -1), then.view(H, width, -1)
        assert torch.equal(now[~clipped], then[~clipped])
        assert not torch.equal(now[clipped], then[clipped])


def test_nothing_to_clip_writes_nothing():
    heads = Heads()
    kept = heads.q_b.clone(), heads.kv_b.clone()
    largest = torch.tensor([-torch.inf, -200.0, 0.0, 99.9, 100.0])
    gamma = qk_clip_(heads.q_b, heads.kv_b, largest, nope=N, rope=R)
    assert torch.equal(gamma, torch.ones(H))
    assert torch.equal(heads.q_b, kept[0])
    assert torch.equal(heads.kv_b, kept[1])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block", [1, 4, 64])
def test_largest_logits_are_those_of_attending_pairs(block, causal):
    q, k = torch.randn(14, 3, 6), torch.randn(20, 3, 6)
    queries, keys = [0, 5, 5, 14], [0, 8, 10, 20]  # the second sequence has no queries
    expected = torch.full((3,), -torch.inf)
    for b in range(3):
        one_q, one_k = q[queries[b] : queries[b + 1]], k[keys[b] : keys[b + 1]]
        logits = 0.5 * torch.einsum("thd,shd->hts", one_q, one_k)
        mask = torch.ones(logits.shape[1:], dtype=torch.bool)
        if causal:
            mask = mask.tril(len(one_k) - len(one_q))
        if mask.any():
            expected = torch.maximum(expected, logits[:, mask].amax(1))
    found = max_logits(
        q, k, torch.tensor(queries), torch.tensor(keys), 0.5, causal=causal, block=block
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("block", [1, 3, 64])
def test_a_query_sees_exactly_the_keys_up_to_its_own(block):
    """Logits that rise with the key, and one query that is not 0: the largest is its last key's."""
    k = torch.arange(1.0, 10.0).view(9, 1, 1)
    for query in range(6):
        q = torch.zeros(6, 1, 1)
        q[query] = 1
        cu_q, cu_k = torch.tensor([0, 6]), torch.tensor([0, 9])
        found = max_logits(q, k, cu_q, cu_k, 2.0, block=block)
        assert found.tolist() == [2.0 * (query + 1 + 3)]


def test_largest_logits_of_nothing_and_of_nan():
    cu = torch.tensor([0, 4])
    q = torch.randn(4, 2, 3)
    assert torch.equal(max_logits(q[:0], q, cu * 0, cu, 1.0), torch.full((2,), -torch.inf))
    bad = q.clone()
    bad[2, 1] = torch.nan
    found = max_logits(bad, q, cu, cu, 1.0)
    assert found.isnan().tolist() == [False, True]
    hidden = torch.randn(4, 2, 3)
    hidden[3] = 1e9
    assert (
        float(max_logits(q[:3], hidden[:3], cu[:2].clamp(max=3), cu.clamp(max=3), 1.0).max()) < 1e3
    )


def test_bad_arguments_are_errors_and_write_nothing():
    heads = Heads()
    kept = heads.q_b.clone()
    calls = {
        r"not finite in heads \[1, 4\]": {
            "largest": torch.tensor([500, torch.nan, 1, 1, torch.inf])
        },
        "must have 6 heads": {"largest": torch.ones(6)},
        "threshold must be positive": {"threshold": 0.0},
    }
    for words, changed in calls.items():
        arguments = {"largest": torch.full((H,), 500.0), "nope": N, "rope": R} | changed
        with pytest.raises(KimiError, match=words):
            qk_clip_(heads.q_b, heads.kv_b, **arguments)
    assert torch.equal(heads.q_b, kept)
    with pytest.raises(KimiError, match=r"\[T, H, N\+R\]"):
        max_logits(torch.zeros(2, 3, 4), torch.zeros(2, 4, 4), torch.zeros(1), torch.zeros(1), 1.0)


def test_model_is_clipped_by_layer():
    config = dataclasses.replace(small_config(), quantization_config=None)
    model = KimiK25(config, dtype=torch.float32).requires_grad_(True)
    text = config.text_config
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    largest = torch.full((text.num_attention_heads,), 50.0)
    largest[1] = 400.0
    gamma = clip_model_(model, {1: largest})
    assert gamma[1][:2].tolist() == [1.0, 0.25]
    nope, rope = text.qk_nope_head_dim, text.qk_rope_head_dim
    q_b = model.language.layers["1"].attn.q_b.view(-1, nope + rope, text.q_lora_rank)
    kv_b = model.language.layers["1"].attn.kv_b.view(len(largest), -1, text.kv_lora_rank)
    assert q_b[:, :, 0].unique(dim=0).shape[0] == 2
    assert q_b[1, :, 0].tolist() == [0.5] * nope + [0.25] * rope
    assert kv_b[1, :, 0].tolist() == [0.5] * nope + [1.0] * text.v_head_dim
    touched = [n for n, p in model.named_parameters() if bool((p != 1).any())]
    assert touched == ["language.layers.1.attn.q_b", "language.layers.1.attn.kv_b"]
    with pytest.raises(KimiError, match="no decoder layer 9"):
        clip_model_(model, {9: largest})
    with pytest.raises(KimiError, match="layer 1 has"):
        clip_model_(model, {1: largest[:1]})
