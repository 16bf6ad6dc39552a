"""Generation: prefill in chunks, then one token at a time for all sequences that still run."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from kimi_ops.model.errors import KimiError, check_count

if TYPE_CHECKING:
    from kimi_ops.model.cache import CacheFormat, LatentCache
    from kimi_ops.model.kimi import KimiK25

_NUCLEUS = 1024  # tokens among which a nucleus is looked for first

FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: 0 takes the most likely token; Kimi K2.5 recommends 1.0 for thinking and 0.6
            for instant mode.
        top_p: draw among the most likely tokens that together reach this probability (0.95
            recommended); 1 keeps all.
        seed: each prompt draws from a stream of its own, made of this and its number.

    Raises:
        KimiError: a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "seed"):
            value, kinds = getattr(self, name), (int,) if name == "seed" else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise KimiError(f"{name} must be a number, got {value!r}")
        if not 0 <= self.temperature < float("inf"):
            raise KimiError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise KimiError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise KimiError(f"seed must be from 0 to 2^63 - 1, got {self.seed}")

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """The next token of ``logits [vocab]`` float32.

        Raises:
            KimiError: logits that are not finite, from which no token can honestly be drawn.
        """
        best = float(logits.max())  # NaN if there is one
        if not math.isfinite(best):
            raise KimiError(
                f"the model's best logit is {best}: the weights or the input are damaged"
            )
        if self.temperature == 0:
            return int(logits.argmax())
        # The best one subtracted first: no temperature, however small, then overflows it.
        probability = ((logits.double() - best) / self.temperature).softmax(-1).cpu()
        if self.top_p < 1:
            probability = self._nucleus(probability)
        return int(torch.multinomial(probability, 1, generator=generator))

    def _nucleus(self, probability: Tensor) -> Tensor:
        """The probabilities of the most likely tokens up to ``top_p`` together, 0 elsewhere."""
        # A few hundred tokens hold nearly all of it; sorting 163,840 would cost more than a layer.
        count = min(_NUCLEUS, len(probability))
        ordered, order = probability.topk(count)
        if float(ordered.sum()) < self.top_p:
            ordered, order = probability.sort(descending=True, stable=True)
        # The token that crosses the threshold still belongs to the nucleus.
        inside = ordered.cumsum(0) - ordered < self.top_p
        kept = torch.zeros_like(probability)
        kept[order[inside]] = ordered[inside]
        return kept


@dataclass
class Generation:
    """What `KimiK25.generate` returns.

    Attributes:
        tokens: new token ids of each prompt, without the stop id.
        finish_reasons: "stop" (a stop id), "length" (the limit or the end of the context) or
            "interrupted" (Ctrl-C), for each prompt.
        prompt_tokens: of all prompts together.
        prefill_seconds, decode_seconds: wall-clock time of the two phases; pictures and clips are
            encoded in the first.
    """

    tokens: list[list[int]]
    finish_reasons: list[FinishReason]
    prompt_tokens: int
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def new_tokens(self) -> int:
        """New tokens of all prompts together."""
        return sum(map(len, self.tokens))

    @property
    def tokens_per_second(self) -> float:
        """New tokens after each prompt's first, per second of the decode phase."""
        decoded = self.new_tokens - sum(1 for tokens in self.tokens if tokens)
        return decoded / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass
class _Run:
    """One prompt on its way."""

    number: int
    embeddings: Tensor  # [prompt, D]
    sequence: int
    limit: int  # new tokens
    generator: torch.Generator
    prefilled: int = 0
    tokens: list[int] = field(default_factory=list)


def checked_prompts(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The prompts as lists of Python integers. Raises `KimiError` for anything else."""
    checked: list[list[int]] = []
    prompts = prompts.tolist() if isinstance(prompts, Tensor) else prompts
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
        raise KimiError(f"prompts must be a list of lists of ids, got {type(prompts).__name__}")
    for number, prompt in enumerate(prompts):
        ids = prompt.tolist() if isinstance(prompt, Tensor) else prompt
        if not isinstance(ids, Sequence) or isinstance(ids, str | bytes):
            raise KimiError(f"prompt {number} must be a list of ids, got {type(prompt).__name__}")
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**31:
                raise KimiError(f"prompt {number} must hold token ids, got {token!r}")
        checked.append(list(ids))
    return checked


def checked_stop_ids(stop_ids: Iterable[int]) -> frozenset[int]:
    """The ids as a set. Raises `KimiError` for anything but integers."""
    if isinstance(stop_ids, str | bytes) or not isinstance(stop_ids, Iterable):
        raise KimiError(f"stop_ids must be a list of token ids, got {stop_ids!r:.80}")
    ids = stop_ids.flatten().tolist() if isinstance(stop_ids, Tensor) else list(stop_ids)
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool):
            raise KimiError(f"stop_ids must hold token ids, got {token!r:.80}")
    return frozenset(ids)


def _stream(seed: int, number: int) -> torch.Generator:
    """Random numbers of one prompt. torch seeds its generator with 32 bits, so these are hashed."""
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@torch.inference_mode()
def generate(
    model: KimiK25,
    prompts: list[list[int]],
    *,
    encode_media: Callable[[], Tensor | None],
    max_new_tokens: Sequence[int],
    sampling: Sampling,
    stop_ids: Collection[int],
    on_token: Callable[[int, int], None] | None,
    prefill_chunk: int,
    page_size: int,
    cache_format: CacheFormat,
) -> Generation:
    """See `KimiK25.generate`; ``encode_media`` gives ``[M, D]`` for all placeholders.

    ``max_new_tokens`` is one number for each prompt.
    """
    context = model.config.text_config.max_position_embeddings
    check_count("prefill_chunk", prefill_chunk)
    check_count("page_size", page_size)
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise KimiError(f"prompt {number} is empty")
        if len(prompt) >= context:
            raise KimiError(
                f"prompt {number} has {len(prompt)} tokens; the context limit is {context}, "
                "one of which the first new token takes"
            )
    lengths = [len(prompt) for prompt in prompts]
    limits = [min(n, context - k) for n, k in zip(max_new_tokens, lengths, strict=True)]
    result = Generation([[] for _ in prompts], ["interrupted" for _ in prompts], sum(lengths))
    if not prompts:
        return result
    runs: list[_Run] = []

    def accept(run: _Run, logits: Tensor, cache: LatentCache) -> None:
        token = sampling.draw(logits, run.generator)
        if token in stop_ids:
            result.finish_reasons[run.number] = "stop"
        else:
            run.tokens.append(token)
            if on_token is not None:
                on_token(run.number, token)
            if len(run.tokens) == run.limit:
                result.finish_reasons[run.number] = "length"
        if result.finish_reasons[run.number] != "interrupted":
            cache.release(run.sequence)

    def running() -> list[_Run]:
        return [run for run in runs if result.finish_reasons[run.number] == "interrupted"]

    started, prefilled = time.perf_counter(), None
    try:
        ids = torch.tensor([token for prompt in prompts for token in prompt])
        embeddings = model.embed(ids, encode_media()).split(lengths)
        # Room for the prompts; the rest comes with the tokens, most of which are often not made.
        # The last new token is never fed back, so it takes no room.
        rooms = [length + limit - 1 for length, limit in zip(lengths, limits, strict=True)]
        cache = model.new_cache(
            num_pages=sum(-(-length // page_size) for length in lengths),
            max_pages=sum(-(-room // page_size) for room in rooms),
            page_size=page_size,
            max_sequences=len(prompts),
            cache_format=cache_format,
        )
        for number, tokens in enumerate(result.tokens):
            generator = _stream(sampling.seed, number)
            run = _Run(number, embeddings[number], cache.add_sequence(), limits[number], generator)
            run.tokens = tokens
            runs.append(run)
        while waiting := [run for run in running() if run.prefilled < len(run.embeddings)]:
            _prefill(model, cache, waiting, prefill_chunk, accept)
        prefilled = time.perf_counter()
        while active := running():
            # Not `model.embed`: a media placeholder that the model itself wrote is plain text.
            last = torch.tensor([run.tokens[-1] for run in active], device=model.device)
            x = model.language.embed(last)
            sequences = [run.sequence for run in active]
            step = cache.extend(sequences, [1] * len(active), absorbed=True)
            hidden = model.hidden_states(x, step, cache)
            for run, logits in zip(active, model.language.logits(hidden), strict=True):
                accept(run, logits, cache)
    except KeyboardInterrupt:
        pass  # what there is so far is the result; the reasons say that it was interrupted
    ended = time.perf_counter()
    result.prefill_seconds = (prefilled or ended) - started
    result.decode_seconds = ended - prefilled if prefilled else 0.0
    return result


def _prefill(
    model: KimiK25,
    cache: LatentCache,
    runs: list[_Run],
    chunk: int,
    accept: Callable[[_Run, Tensor, LatentCache], None],
) -> None:
    """The next chunk of each prompt; the first new token of those that are through."""
    parts = [run.embeddings[run.prefilled : run.prefilled + chunk] for run in runs]
    sequences = [run.sequence for run in runs]
    step = cache.extend(sequences, [len(part) for part in parts], absorbed=False)
    hidden = model.hidden_states(torch.cat(parts), step, cache)
    ends = step.cu_seqlens[1:].long() - 1
    done = []
    for row, (run, part) in enumerate(zip(runs, parts, strict=True)):
        run.prefilled += len(part)
        if run.prefilled == len(run.embeddings):
            done.append((row, run))
    if done:
        logits = model.language.logits(hidden[ends[[row for row, _ in done]]])
        for (_, run), row_logits in zip(done, logits, strict=True):
            accept(run, row_logits, cache)
