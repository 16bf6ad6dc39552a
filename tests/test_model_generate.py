"""The model agrees with itself: chunks, batches, pages, steps; and generation keeps its promises.

In float32, logits within 1e-5 of their scale and greedy tokens equal, however the same tokens are
fed.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from kimi_ops.model import cache as cache_module
from kimi_ops.model.config import KimiK25Config
from kimi_ops.model.errors import KimiError, MediaError
from kimi_ops.model.generate import Sampling
from kimi_ops.model.kimi import KimiK25
from kimi_ops.model.make_checkpoint import make_checkpoint, tiny_config
from kimi_ops.model.random_files import has_random_weights, random_checkpoint_files
from kimi_ops.model.weight_map import fused_parameters

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
CONTEXT = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    config = tiny_config(text={"max_position_embeddings": CONTEXT})
    make_checkpoint(folder, config, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return KimiK25.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts(model):
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.text_config.vocab_size - 256
    return [
        torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in (37, 1, 70, 16)
    ]


def _fed(model, tokens, sizes, page_size=8):
    """Logits ``[T, vocab]`` of one sequence, fed in pieces of these sizes."""
    assert sum(sizes) == len(tokens)
    cache = model.new_cache(num_pages=-(-len(tokens) // page_size), page_size=page_size)
    sequence, logits = cache.add_sequence(), []
    for piece in torch.tensor(tokens).split(sizes):
        step = cache.extend([sequence], [len(piece)])
        logits.append(model.language.logits(model.hidden_states(model.embed(piece), step, cache)))
    return torch.cat(logits)


@pytest.mark.parametrize(
    "sizes",
    [
        [1] * 70,
        [40, 30],
        [1, 69],
        [50] + [1] * 20,
        [16, 16, 16, 22],
        [17, 17, 17, 19],
        [3] * 23 + [1],
    ],
    ids=str,
)
@pytest.mark.parametrize("page_size", [1, 7, 64])
def test_pieces_give_what_the_whole_gives(model, prompts, sizes, page_size):
    tokens = prompts[2]
    whole = model(torch.tensor([tokens]))[0]
    torch.testing.assert_close(_fed(model, tokens, sizes, page_size), whole, **TOLERANCE)


def test_long_prefixes_are_merged_in_parts(model, prompts, monkeypatch):
    whole = model(torch.tensor([prompts[2]]))[0]
    monkeypatch.setattr(cache_module, "KEYS_AT_ONCE", 6)
    torch.testing.assert_close(_fed(model, prompts[2], [30, 20, 20]), whole, **TOLERANCE)
    torch.testing.assert_close(_fed(model, prompts[2], [17, 1, 17, 35]), whole, **TOLERANCE)


def test_sequences_of_different_lengths_in_one_step(model, prompts):
    """Prefill of some, later pieces of others, of mixed lengths, all in the same calls."""
    cache = model.new_cache(num_pages=60, page_size=4)
    sequences = [cache.add_sequence() for _ in prompts]
    fed, logits = [0] * len(prompts), [[] for _ in prompts]
    for turn in itertools.count():
        active = [i for i, p in enumerate(prompts) if fed[i] < len(p)]
        if not active:
            break
        sizes = [min(len(prompts[i]) - fed[i], (1, 5, 20)[(turn + i) % 3]) for i in active]
        step = cache.extend([sequences[i] for i in active], sizes)
        ids = torch.tensor(
            [t for i, n in zip(active, sizes, strict=True) for t in prompts[i][fed[i] : fed[i] + n]]
        )
        hidden = model.hidden_states(model.embed(ids), step, cache)
        for i, n, part in zip(
            active, sizes, model.language.logits(hidden).split(sizes), strict=True
        ):
            fed[i] += n
            logits[i].append(part)
    for prompt, parts in zip(prompts, logits, strict=True):
        alone = model(torch.tensor([prompt]))[0]
        torch.testing.assert_close(torch.cat(parts), alone, **TOLERANCE)


def test_batch_equals_its_members(model, prompts):
    together = model.generate(prompts, max_new_tokens=20, stop_ids=[])
    chunked = model.generate(prompts, max_new_tokens=20, stop_ids=[], prefill_chunk=9, page_size=5)
    alone = [model.generate([p], max_new_tokens=20, stop_ids=[]).tokens[0] for p in prompts]
    assert together.tokens == chunked.tokens == alone
    rows = torch.tensor([prompts[2], prompts[2][::-1]])
    both = model(rows)
    for row, logits in zip(rows, both, strict=True):
        torch.testing.assert_close(logits, model(row[None])[0], **TOLERANCE)


def test_media_of_several_prompts_in_order(model, prompts):
    pad = model.config.media_placeholder_token_id
    grid = torch.tensor([[1, 4, 4], [3, 2, 4], [1, 2, 2]])
    pixels = torch.rand(int(grid.prod(1).sum()), 3, 14, 14)
    first = [*prompts[0][:5], *[pad] * 4, 7, *[pad] * 2, 9]
    second = [*[pad] * 1, *prompts[1], 3, 4]
    options = {"max_new_tokens": 8, "stop_ids": []}
    both = model.generate([first, second], pixel_values=pixels, grid_thws=grid, **options)
    alone = [
        model.generate([first], pixel_values=pixels[:40], grid_thws=grid[:2], **options),
        model.generate([second], pixel_values=pixels[40:], grid_thws=grid[2:], **options),
    ]
    assert both.tokens == [a.tokens[0] for a in alone]
    logits = [
        model(torch.tensor([first]), p, grid[:2])[0, -1] for p in (pixels[:40], pixels[:40] ** 2)
    ]
    assert (logits[0] - logits[1]).abs().max() > 1e-3  # what is in the pictures matters


def test_greedy_follows_the_logits(model, prompts):
    new = model.generate([prompts[0]], max_new_tokens=10, stop_ids=[]).tokens[0]
    logits = model(torch.tensor([prompts[0] + new]))[0]
    start = len(prompts[0]) - 1
    assert logits[start:-1].argmax(-1).tolist() == new


def test_sampling_is_reproducible_and_of_each_prompt_alone(model, prompts):
    options = {"max_new_tokens": 12, "stop_ids": []}
    sampling = Sampling(temperature=1.0, top_p=0.95, seed=7)
    first = model.generate(prompts, sampling=sampling, **options).tokens
    assert first == model.generate(prompts, sampling=sampling, **options).tokens
    assert first[0] == model.generate(prompts[:1], sampling=sampling, **options).tokens[0]
    assert first != model.generate(prompts, sampling=Sampling(1.0, 0.95, 8), **options).tokens
    twice = model.generate([prompts[0]] * 2, sampling=sampling, **options).tokens
    assert twice[0] != twice[1]


def test_draws_follow_temperature_and_nucleus():
    probability = torch.tensor([0.5, 0.3, 0.15, 0.05])
    generator = torch.Generator().manual_seed(0)

    def shares(sampling):
        drawn = [sampling.draw(probability.log(), generator) for _ in range(4000)]
        return torch.bincount(torch.tensor(drawn), minlength=4) / 4000

    # Four standard deviations of 4,000 draws are at most 0.032.
    torch.testing.assert_close(shares(Sampling(1.0)), probability, rtol=0, atol=0.032)
    squared = probability.square() / probability.square().sum()
    torch.testing.assert_close(shares(Sampling(0.5)), squared, rtol=0, atol=0.032)
    nucleus = torch.tensor([0.625, 0.375, 0, 0])
    torch.testing.assert_close(shares(Sampling(1.0, 0.6)), nucleus, rtol=0, atol=0.032)
    assert shares(Sampling(1.0, 1e-9))[0] == 1
    assert shares(Sampling(0.0))[0] == 1
    for damaged in ([0.0, torch.nan], [0.0, torch.inf], [-torch.inf, -torch.inf]):
        for sampling in (Sampling(), Sampling(1.0, 0.9)):
            with pytest.raises(KimiError, match="the model's best logit is"):
                sampling.draw(torch.tensor(damaged), generator)
    tiny = Sampling(1e-310, 0.9)
    assert {tiny.draw(probability.log(), generator) for _ in range(9)} == {0}
    flat = torch.zeros(5000)  # a nucleus wider than the tokens that are looked at first
    assert len({Sampling(1.0, 0.9).draw(flat, generator) for _ in range(3000)}) > 1500


def test_stop_ids_end_one_sequence_and_not_the_others(model, prompts):
    free = model.generate(prompts, max_new_tokens=15, stop_ids=[])
    stop = [free.tokens[0][6], free.tokens[2][3]]
    result = model.generate(prompts, max_new_tokens=15, stop_ids=stop)
    for tokens, cut, reason in zip(free.tokens, result.tokens, result.finish_reasons, strict=True):
        ends = [i for i, token in enumerate(tokens) if token in stop]
        assert cut == (tokens[: ends[0]] if ends else tokens)
        assert reason == ("stop" if ends else "length")


def test_context_ends_a_continuation(model):
    tokens = list(range(CONTEXT - 5))
    result = model.generate([tokens], max_new_tokens=50, stop_ids=[])
    assert len(result.tokens[0]) == 5
    assert result.finish_reasons == ["length"]
    with pytest.raises(KimiError, match=f"prompt 0 has {CONTEXT} tokens; the context limit is"):
        model.generate([list(range(CONTEXT))])
    with pytest.raises(KimiError, match=f"would have {CONTEXT + 1} tokens, the context limit is"):
        model(torch.zeros(1, CONTEXT + 1, dtype=torch.long))


def test_interruption_keeps_what_there_is(model, prompts):
    seen = []

    def on_token(number, token):
        seen.append((number, token))
        if len(seen) == 9:
            raise KeyboardInterrupt

    result = model.generate(prompts, max_new_tokens=50, stop_ids=[], on_token=on_token)
    assert result.finish_reasons == ["interrupted"] * 4
    assert result.new_tokens == 9
    assert sorted(seen) == sorted((n, t) for n, row in enumerate(result.tokens) for t in row)
    assert result.prefill_seconds > 0
    assert result.decode_seconds > 0


def test_stream_is_the_result_in_order(model, prompts):
    seen = [[] for _ in prompts]
    result = model.generate(
        prompts, max_new_tokens=6, stop_ids=[], on_token=lambda n, token: seen[n].append(token)
    )
    assert seen == result.tokens
    assert result.prompt_tokens == sum(map(len, prompts))
    assert result.tokens_per_second > 0


def test_the_model_may_write_a_placeholder(model, prompts, monkeypatch):
    pad = model.config.media_placeholder_token_id
    monkeypatch.setattr(Sampling, "draw", lambda *args: pad)
    assert model.generate(prompts[:1], max_new_tokens=3).tokens == [[pad] * 3]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.generate([[]]), KimiError, "prompt 0 is empty"),
        (lambda m: m.generate([[1], []]), KimiError, "prompt 1 is empty"),
        (lambda m: m.generate([[1]], max_new_tokens=0), KimiError, "max_new_tokens must be"),
        (
            lambda m: m.generate([[1]], page_size=0),
            KimiError,
            "page_size must be an integer of at least 1",
        ),
        (lambda m: m.generate([[1]], prefill_chunk=0), KimiError, "prefill_chunk must be"),
        (lambda m: m.generate([[-1]]), KimiError, "prompt 0 must hold token ids, got -1"),
        (lambda m: m.generate([[1.7]]), KimiError, "prompt 0 must hold token ids, got 1.7"),
        (lambda m: m.generate([[2**70]]), KimiError, "prompt 0 must hold token ids"),
        (lambda m: m.generate([1, 2]), KimiError, "prompt 0 must be a list of ids, got int"),
        (lambda m: m.generate(["abc"]), KimiError, "prompt 0 must be a list of ids, got str"),
        (lambda m: m.generate("abc"), KimiError, "prompts must be a list of lists of ids"),
        (lambda m: m.generate([[1]], max_new_tokens=2.5), KimiError, "max_new_tokens must be an"),
        (lambda m: Sampling(seed=1.5), KimiError, "seed must be a number, got 1.5"),
        (lambda m: Sampling(temperature=None), KimiError, "temperature must be a number"),
        (lambda m: m([[1, 2]]), KimiError, "input_ids must be a tensor, got list"),
        (lambda m: m(torch.ones(1, 2).cfloat()), KimiError, "got .* torch.complex64"),
        (lambda m: m.generate([[1024]]), KimiError, "input_ids must be in 0 .. 1023, got 1024"),
        (lambda m: Sampling(temperature=-1), KimiError, "temperature must be at least 0"),
        (lambda m: Sampling(temperature=float("nan")), KimiError, "temperature must be"),
        (lambda m: Sampling(top_p=0), KimiError, "top_p must be above 0"),
        (lambda m: Sampling(seed=-1), KimiError, "seed must be"),
        (lambda m: m(torch.zeros(3).long()), KimiError, r"input_ids must be \[B, T\] integers"),
        (lambda m: m(torch.zeros(1, 3)), KimiError, r"got \[1, 3\] torch.float32"),
        (
            lambda m: m.generate([[1, m.config.media_placeholder_token_id]]),
            MediaError,
            "the prompt has 1 media placeholders .* the media given have 0 tokens",
        ),
        (
            lambda m: m(torch.ones(1, 3).long(), torch.zeros(4, 3, 14, 14)),
            MediaError,
            "must be given together",
        ),
        (
            lambda m: m.encode_media(torch.zeros(4, 3, 14, 14), torch.tensor([[1, 2, 3]])),
            MediaError,
            r"grid_thws\[0\] must be 1 to 4 frames of an even number .* got \(1, 2, 3\)",
        ),
        (
            lambda m: m.encode_media(torch.zeros(2056, 3, 14, 14), torch.tensor([[1, 2, 514]])),
            MediaError,
            r"at most 512, got \(1, 2, 514\)",
        ),
        (
            lambda m: m.encode_media(torch.zeros(4, 3, 14, 14), torch.tensor([[1, 2, 2.9]])),
            MediaError,
            r"grid_thws must be \[n, 3\] integers",
        ),
        (
            lambda m: m.encode_media(torch.zeros(4, 3, 14, 14), [[1, 2, 2]]),
            MediaError,
            "grid_thws must be a tensor, got list",
        ),
        (
            lambda m: m(
                torch.ones(1, 3).long(), torch.zeros(4, 3, 14, 14), torch.zeros(0, 3).int()
            ),
            MediaError,
            "grid_thws announces 0 patches, pixel_values has 4",
        ),
        (
            lambda m: m.generate(
                [[m.config.media_placeholder_token_id] * n for n in (3, 1)],
                pixel_values=torch.zeros(16, 3, 14, 14),
                grid_thws=torch.tensor([[1, 4, 2], [1, 4, 2]]),
            ),
            MediaError,
            "prompt 0 has 3 media placeholders, which ends amid a picture",
        ),
        (
            lambda m: m.encode_media(torch.zeros(20, 3, 14, 14), torch.tensor([[5, 2, 2]])),
            MediaError,
            r"got \(5, 2, 2\)",
        ),
        (
            lambda m: m.encode_media(torch.zeros(5, 3, 14, 14), torch.tensor([[1, 2, 2]])),
            MediaError,
            "grid_thws announces 4 patches, pixel_values has 5",
        ),
        (
            lambda m: m.encode_media(torch.zeros(4, 3, 8, 8), torch.tensor([[1, 2, 2]])),
            MediaError,
            r"pixel_values must be \[L, 3, 14, 14\]",
        ),
        (
            lambda m: m.encode_media(torch.zeros(4, 3, 14, 14), torch.tensor([1, 2, 2])),
            MediaError,
            r"grid_thws must be \[n, 3\] integers",
        ),
    ],
)
def test_bad_requests(model, call, error, message):
    with pytest.raises(error, match=message):
        call(model)


def test_cache_gives_pages_back_and_refuses_what_it_cannot_hold(model):
    cache = model.new_cache(num_pages=4, page_size=8)
    one, two = cache.add_sequence(), cache.add_sequence()
    cache.extend([one], [20])
    assert (cache.length(one), cache.free_pages) == (20, 1)
    with pytest.raises(KimiError, match="the cache has 1 free pages of 8 tokens, 2 are needed"):
        cache.extend([one, two], [5, 1])
    assert (cache.length(one), cache.length(two), cache.free_pages) == (20, 0, 1)
    cache.extend([one, two], [4, 1])
    assert cache.free_pages == 0
    cache.release(one)
    assert cache.free_pages == 3
    for call in (cache.length, cache.row, cache.release, lambda s: cache.extend([s], [1])):
        with pytest.raises(KimiError, match=f"there is no sequence {one}: .* it was released"):
            call(one)
    with pytest.raises(KimiError, match="num_pages must be an integer of at least 1, got 0"):
        model.new_cache(num_pages=0)


def test_a_released_page_is_not_seen_by_its_next_owner(model, prompts):
    cache = model.new_cache(num_pages=10, page_size=8)
    for prompt in (prompts[2], prompts[0]):
        sequence = cache.add_sequence()
        step = cache.extend([sequence], [len(prompt)])
        hidden = model.hidden_states(model.embed(torch.tensor(prompt)), step, cache)
        cache.release(sequence)
    expected = model(torch.tensor([prompts[0]]))[0]
    torch.testing.assert_close(model.language.logits(hidden), expected, **TOLERANCE)


def test_empty_input(model):
    assert model(torch.zeros(0, 5, dtype=torch.long)).shape == (0, 5, 1024)
    assert model(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 1024)
    assert model.generate([]).tokens == []
    assert model.encode_media(torch.zeros(0, 3, 14, 14), torch.zeros(0, 3).long()).shape[0] == 0


def test_some_layers_alone(folder, model):
    part = KimiK25.from_pretrained(folder, dtype=torch.float32, layers=range(1, 2))
    names = {n for n, _ in part.named_parameters()}
    assert names == {
        n for n, _ in model.named_parameters() if "layers." not in n or ".layers.1." in n
    }
    assert part(torch.ones(1, 4, dtype=torch.long)).isfinite().all()


@pytest.mark.parametrize("change", ["half", "bfloat16", "double", "to_empty", "deepcopy"])
def test_moved_and_cast_it_still_runs(folder, prompts, change):
    """Angles and the selection bias stay float32, whatever happens to the parameters."""
    model = KimiK25.from_pretrained(folder, dtype=torch.float32)
    expected = model(torch.tensor([prompts[0]]))
    bias = model.language.layers["1"].moe.bias.clone()
    if change == "to_empty":
        other = KimiK25(model.config, dtype=torch.float32, device="meta").to_empty(device="cpu")
        other.load_state_dict(model.state_dict())
    else:
        other = copy.deepcopy(model) if change == "deepcopy" else getattr(model, change)()
    found = other(torch.tensor([prompts[0]]))
    assert torch.equal(other.language.layers["1"].moe.bias, bias)
    assert other.language.inv_freq.dtype == torch.float32
    if change in ("to_empty", "deepcopy"):
        assert torch.equal(found, expected)
    else:
        assert (found - expected).square().mean().sqrt() < 0.3 * expected.std()


def test_submodules_are_what_runs(folder, prompts):
    model = KimiK25.from_pretrained(folder, dtype=torch.float32)
    seen = []
    for name in ("attn", "moe"):
        getattr(model.language.layers["1"], name).register_forward_hook(
            lambda *args, name=name: seen.append(name)
        )
    model(torch.tensor([prompts[0]]))
    assert seen == ["attn", "moe"]


def test_form_of_attention_does_not_depend_on_neighbours(folder, prompts):
    """In bfloat16, where the absorbed and the materialised form round differently."""
    low = KimiK25.from_pretrained(folder)
    short = prompts[3][:10]
    options = {"max_new_tokens": 1, "stop_ids": []}
    steps = []
    extend = cache_module.LatentCache.extend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cache_module.LatentCache,
            "extend",
            lambda *args, **named: steps.append(extend(*args, **named)) or steps[-1],
        )
        low.generate([short], **options)
        low.generate([short, prompts[2]], **options)
        low.generate([short, short], max_new_tokens=2, stop_ids=[])
    assert [step.decode for step in steps] == [False, False, False, True]


def test_seeds_of_64_bits_differ(model, prompts):
    options = {"max_new_tokens": 12, "stop_ids": []}
    seeds = (0, 1, 2**32, 5 * 2**32, 2**63 - 1)
    drawn = [
        tuple(model.generate(prompts[:1], sampling=Sampling(1.0, 1.0, s), **options).tokens[0])
        for s in seeds
    ]
    assert len(set(drawn)) == len(seeds)


def test_end_of_turn_stops_by_default(model, prompts, monkeypatch):
    eos = model.config.eos_token_id
    for stop in (eos, eos + 1):  # [EOS] and <|im_end|>
        monkeypatch.setattr(Sampling, "draw", lambda *args, stop=stop: stop)
        result = model.generate(prompts[:1], max_new_tokens=5)
        assert (result.tokens, result.finish_reasons) == ([[]], ["stop"])


def test_interruption_while_pictures_are_encoded(model, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(KimiK25, "encode_media", interrupted)
    pad = model.config.media_placeholder_token_id
    grid = torch.tensor([[1, 2, 2]])
    result = model.generate([[pad, 1]], pixel_values=torch.zeros(4, 3, 14, 14), grid_thws=grid)
    assert result.finish_reasons == ["interrupted"]


def test_saved_with_the_small_files_of_its_source(tmp_path):
    config = tiny_config()
    files = random_checkpoint_files(config)
    make_checkpoint(tmp_path / "one", config, tokenizer_files=files)
    KimiK25.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    for name, content in files.items():
        assert (tmp_path / "two" / name).read_bytes() == content
    assert has_random_weights(tmp_path / "two")


def test_saved_and_loaded_it_is_the_same(model, prompts, tmp_path):
    model.save_pretrained(tmp_path / "again")
    again = KimiK25.from_pretrained(tmp_path / "again", dtype=torch.float32)
    ids = torch.tensor([prompts[0]])
    assert torch.equal(model(ids), again(ids))


def test_bfloat16_stays_near_float32(folder, model, prompts):
    low = KimiK25.from_pretrained(folder)
    assert low.dtype == torch.bfloat16
    ids = torch.tensor([prompts[2]])
    error = (low(ids) - model(ids)).square().mean().sqrt() / model(ids).std()
    # Seven roundings of 2^-9 a layer would give 0.01; a flipped expert choice costs more.
    assert error < 0.2


def test_full_size_model_without_its_weights():
    config = KimiK25Config.full_size()
    full = KimiK25(config, device="meta")
    specs = fused_parameters(config)
    parameters = dict(full.named_parameters())
    assert {n: (tuple(p.shape), p.dtype) for n, p in parameters.items()} == {
        n: (tuple(s.shape), s.dtype) for n, s in specs.items()
    }
    # All bytes of the released files but the 46,080 weight_shape tensors of 8 bytes.
    shapes = 60 * 384 * 3 * 2 * 4
    assert sum(p.nbytes for p in parameters.values()) == 595_148_192_736 - shapes
    assert not any(p.requires_grad for p in parameters.values())


def test_fp8_cache_stays_near_the_plain_one(folder, prompts):
    model = KimiK25.from_pretrained(folder)
    tokens = torch.tensor(prompts[2])
    logits = {}
    for cache_format in ("plain", "fp8"):
        for sizes in ([70], [40, 30], [50] + [1] * 20):
            cache = model.new_cache(num_pages=9, page_size=8, cache_format=cache_format)
            sequence, parts = cache.add_sequence(), []
            for piece in tokens.split(sizes):
                step = cache.extend([sequence], [len(piece)])
                x = model.hidden_states(model.embed(piece), step, cache)
                parts.append(model.language.logits(x))
            logits[cache_format, len(sizes)] = torch.cat(parts)
    rank, rope = 32, 16
    text = model.config.text_config
    assert (text.kv_lora_rank, text.qk_rope_head_dim) == (rank, rope)
    assert cache.pages[0].dtype == torch.uint8
    assert cache.pages[0].shape == (9, 8, rank + 16 + 2 * rope)
    spread = logits["plain", 1].std()
    for pieces in (1, 2, 21):
        error = (logits["fp8", pieces] - logits["plain", pieces]).square().mean().sqrt() / spread
        assert 0 < error < 0.2, pieces


def test_generates_with_an_fp8_cache(folder, prompts):
    model = KimiK25.from_pretrained(folder)
    result = model.generate(prompts, max_new_tokens=6, cache_format="fp8")
    assert [len(tokens) for tokens in result.tokens] == [6] * len(prompts)
    again = model.generate(prompts, max_new_tokens=6, cache_format="fp8", prefill_chunk=11)
    assert again.finish_reasons == result.finish_reasons == ["length"] * len(prompts)
    with pytest.raises(KimiError, match="cache_format must be one of plain, fp8, got 'fp4'"):
        model.generate(prompts, max_new_tokens=1, cache_format="fp4")
