"""Long prompts: media across the borders of prefill chunks, the last positions, and memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kimi_ops.model import attention
from kimi_ops.model import cache as cache_module
from kimi_ops.model.cache import LatentCache
from kimi_ops.model.errors import KimiError
from kimi_ops.model.kimi import KimiK25
from kimi_ops.model.make_checkpoint import make_checkpoint, tiny_config
from kimi_ops.model.rope import rotate, yarn_inv_freq

# In float32: the same sums in another order, as in test_model_generate.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
CONTEXT = 2**18  # of the released model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> KimiK25:
    folder = tmp_path_factory.mktemp("long") / "c"
    make_checkpoint(
        folder, tiny_config(text={"max_position_embeddings": CONTEXT}), dtype=torch.float32
    )
    return KimiK25.from_pretrained(folder, dtype=torch.float32)


# A picture of 4 tokens, a clip of two chunks of 2 and 2, a picture of 6.
GRID = torch.tensor([[1, 4, 4], [3, 2, 4], [2, 2, 4], [1, 4, 6]])
TOKENS = [4, 2, 2, 6]


@pytest.fixture(scope="module")
def media_prompt(model: KimiK25) -> tuple[list[int], Tensor]:
    pad = model.config.media_placeholder_token_id
    picture, first, second, other = ([pad] * n for n in TOKENS)
    ids = [3, *picture, 4, 5, *first, 6, *second, *other, 7, 8]
    generator = torch.Generator().manual_seed(3)
    return ids, torch.rand(int(GRID.prod(1).sum()), 3, 14, 14, generator=generator)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 11, 16])
def test_media_across_chunk_borders(model, media_prompt, chunk):
    """Of these sizes some cut every picture, both chunks of the clip, and between all of them."""
    ids, pixels = media_prompt
    whole = model(torch.tensor([ids]), pixels, GRID)[0]
    with torch.inference_mode():
        embeddings = model.embed(torch.tensor(ids), model.encode_media(pixels, GRID))
        cache = model.new_cache(num_pages=10, page_size=4)
        sequence, logits = cache.add_sequence(), []
        for part in embeddings.split(chunk):
            step = cache.extend([sequence], [len(part)], absorbed=False)
            logits.append(model.language.logits(model.hidden_states(part, step, cache)))
    torch.testing.assert_close(torch.cat(logits), whole, **TOLERANCE)
    options = {"pixel_values": pixels, "grid_thws": GRID, "max_new_tokens": 4, "stop_ids": []}
    tokens = model.generate([ids], **options).tokens
    assert model.generate([ids], prefill_chunk=chunk, **options).tokens == tokens
    # A medium in another's place would be seen: the pictures are not alike to the model.
    swapped = model(torch.tensor([ids]), pixels.flip(0), GRID)[0]
    assert (swapped - whole).abs().max() > 100 * TOLERANCE["atol"]


def test_angles_of_the_last_positions(model):
    """Against float64; a float32 angle of p radians is off by up to half a unit in its last place.

    At 262,143 that is 2^-7: the released code computes it so, and the weights were trained with it.
    """
    inv_freq = yarn_inv_freq(model.config.text_config)
    positions = torch.tensor([0, 1, 4095, CONTEXT - 2, CONTEXT - 1], dtype=torch.int32)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(positions), 2, 2 * len(inv_freq), generator=generator)
    exact = rotate(x.double(), positions, inv_freq.double())
    found = rotate(x, positions, inv_freq)
    angle = positions.double()[:, None] * inv_freq.double()
    # The angle's rounding (relative 2^-24), and those of sine, products and sum (a few 2^-24).
    bound = (angle * 2**-24 + 8 * 2**-24).amax(1)[:, None, None] * x.abs().amax() * 2
    assert ((found - exact).abs() <= bound).all()
    later = rotate(x.double(), (positions + 1).int(), inv_freq.double())
    assert not ((found - later).abs() <= bound).all()  # one position off would be seen


def _nearly_full(model: KimiK25, length: int, seed: int = 5) -> tuple[LatentCache, int]:
    """A cache with one sequence of ``length`` random latents, and room to the context's end."""
    cache = model.new_cache(num_pages=CONTEXT // 64, page_size=64)
    sequence = cache.add_sequence()
    cache.extend([sequence], [length], absorbed=False)
    generator = torch.Generator().manual_seed(seed)
    for pages in cache.pages.values():
        pages.normal_(generator=generator)
    return cache, sequence


@torch.inference_mode()
def test_the_last_position_is_allowed_and_one_more_is_not(model):
    """Absorbed and materialised attention agree there, over 262,144 keys."""
    last = torch.tensor([17, 18, 19])
    hidden = []
    for absorbed in (True, False):
        cache, sequence = _nearly_full(model, CONTEXT - 3)
        step = cache.extend([sequence], [3], absorbed=absorbed)
        assert step.positions.tolist() == [CONTEXT - 3, CONTEXT - 2, CONTEXT - 1]
        hidden.append(model.hidden_states(model.embed(last), step, cache))
        with pytest.raises(KimiError, match=f"would have {CONTEXT + 1} tokens, the context limit"):
            cache.extend([sequence], [1])
        assert cache.length(sequence) == CONTEXT
    # Sums over 262,144 keys: rounding grows with the square root of their number, 2^9.
    torch.testing.assert_close(*hidden, rtol=5e-4, atol=5e-4)
    assert hidden[0].isfinite().all()


def test_a_prompt_may_fill_the_context_but_for_one_token(model):
    with pytest.raises(KimiError, match=f"prompt 0 has {CONTEXT} tokens; the context limit"):
        model.generate([[1] * CONTEXT])


def _peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes of torch's allocator that live at once within ``run``, beyond those before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    results = profile.profiler.kineto_results
    changes = [e.nbytes() for e in results.events() if e.name() == "[memory]"]
    assert changes
    peak = live = 0
    for change in changes:
        live += change
        peak = max(peak, live)
    return peak


def _prefill_peak(model: KimiK25, prefix: int) -> int:
    cache = model.new_cache(num_pages=64, page_size=64)
    sequence = cache.add_sequence()
    cache.extend([sequence], [prefix], absorbed=False)
    for pages in cache.pages.values():
        pages.normal_()
    embeddings = torch.randn(32, model.config.text_config.hidden_size)
    step = cache.extend([sequence], [32], absorbed=False)
    with torch.inference_mode():
        return _peak_bytes(lambda: model.hidden_states(embeddings, step, cache))


def test_memory_of_prefill_does_not_grow_with_the_prefix(model, monkeypatch):
    """A prefix is read a part at a time and each part's result merged at once.

    The allocator's peak is that of one part. What may differ are its own few bytes of bookkeeping:
    one result ``[32, H, V]`` and its lse are allowed for.
    """
    monkeypatch.setattr(cache_module, "KEYS_AT_ONCE", 128)
    text = model.config.text_config
    result = 32 * text.num_attention_heads * (text.v_head_dim + 1) * 4
    short, long = (_prefill_peak(model, 128 * parts) for parts in (2, 24))
    assert long <= short + result
    # The parts' results kept until the end, and the parts of twice the size, would be seen.
    original = attention.LatentAttention._materialised

    def hoarding(self, q, step, pages, inv_freq):
        kept = [self._attend(q, chunk, step, pages) for chunk in step.chunks]
        return original(self, q, step, pages, inv_freq) + 0 * kept[0][0]

    monkeypatch.setattr(attention.LatentAttention, "_materialised", hoarding)
    assert _prefill_peak(model, 128 * 24) > short + result
    monkeypatch.undo()
    monkeypatch.setattr(cache_module, "KEYS_AT_ONCE", 256)
    assert _prefill_peak(model, 128 * 24) > short + result
