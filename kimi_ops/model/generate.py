"""Generation: prefill in chunks, then one token at a time for all sequences that still run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from kimi_ops.model.errors import KimiError

if TYPE_CHECKING:
    from kimi_ops.model.cache import LatentCache
    from kimi_ops.model.kimi import KimiK25

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
        if not 0 <= self.temperature < float("inf"):
            raise KimiError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise KimiError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise KimiError(f"seed must be from 0 to 2^63 - 1, got {self.seed}")

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """The next token of ``logits [vocab]`` float32.

        Raises:
            KimiError: a NaN among the logits, from which no token can honestly be drawn.
        """
        if bool(logits.isnan().any()):
            raise KimiError("the model's logits are NaN: the weights or the input are damaged")
        if self.temperature == 0:
            return int(logits.argmax())
        probability = (logits.double() / self.temperature).softmax(-1).cpu()
        if self.top_p < 1:
            ordered, order = probability.sort(descending=True, stable=True)
            # The token that crosses the threshold still belongs to the nucleus.
            probability[order[ordered.cumsum(0) - ordered >= self.top_p]] = 0
        return int(torch.multinomial(probability, 1, generator=generator))


@dataclass
class Generation:
    """What `KimiK25.generate` returns.

    Attributes:
        tokens: new token ids of each prompt, without the stop id.
        finish_reasons: "stop" (a stop id), "length" (the limit or the end of the context) or
            "interrupted" (Ctrl-C), for each prompt.
        prompt_tokens: of all prompts together.
        prefill_seconds, decode_seconds: wall-clock time of the two phases.
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


@torch.inference_mode()
def generate(
    model: KimiK25,
    prompts: Sequence[Sequence[int]],
    *,
    media: Tensor | None,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Sequence[int],
    on_token: Callable[[int, int], None] | None,
    prefill_chunk: int,
    page_size: int,
) -> Generation:
    """See `KimiK25.generate`; ``media [M, D]`` are the embeddings of all placeholders."""
    context = model.config.text_config.max_position_embeddings
    for name, value in (
        ("max_new_tokens", max_new_tokens),
        ("prefill_chunk", prefill_chunk),
        ("page_size", page_size),
    ):
        if value < 1:
            raise KimiError(f"{name} must be at least 1, got {value}")
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise KimiError(f"prompt {number} is empty")
        if len(prompt) >= context:
            raise KimiError(
                f"prompt {number} has {len(prompt)} tokens; the context limit is {context}, "
                "one of which the first new token takes"
            )
    lengths = [len(prompt) for prompt in prompts]
    limits = [min(max_new_tokens, context - length) for length in lengths]
    result = Generation([[] for _ in prompts], ["interrupted" for _ in prompts], sum(lengths))
    if not prompts:
        return result
    ids = torch.tensor([token for prompt in prompts for token in prompt])
    embeddings = model.embed(ids, media).split(lengths)
    # The last new token is never fed back, so it takes no room.
    rooms = [length + limit - 1 for length, limit in zip(lengths, limits, strict=True)]
    cache = model.new_cache(num_pages=sum(-(-r // page_size) for r in rooms), page_size=page_size)
    runs = [
        _Run(
            number,
            embeddings[number],
            cache.add_sequence(),
            limits[number],
            torch.Generator().manual_seed((sampling.seed + 0x9E3779B97F4A7C15 * number) % 2**63),
            tokens=result.tokens[number],
        )
        for number in range(len(prompts))
    ]

    def accept(run: _Run, logits: Tensor) -> None:
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

    started = time.perf_counter()
    try:
        while waiting := [run for run in running() if run.prefilled < len(run.embeddings)]:
            _prefill(model, cache, waiting, prefill_chunk, accept)
        result.prefill_seconds = time.perf_counter() - started
        started = time.perf_counter()
        while active := running():
            # Not `model.embed`: a media placeholder that the model itself wrote is plain text.
            last = torch.tensor([run.tokens[-1] for run in active], device=model.device)
            x = model.language.embed(last)
            step = cache.extend([run.sequence for run in active], [1] * len(active))
            hidden = model.hidden_states(x, step, cache)
            for run, logits in zip(active, model.language.logits(hidden), strict=True):
                accept(run, logits)
    except KeyboardInterrupt:
        pass  # what there is so far is the result; the reasons say that it was interrupted
    if result.prefill_seconds:
        result.decode_seconds = time.perf_counter() - started
    else:
        result.prefill_seconds = time.perf_counter() - started
    return result


def _prefill(
    model: KimiK25,
    cache: LatentCache,
    runs: list[_Run],
    chunk: int,
    accept: Callable[[_Run, Tensor], None],
) -> None:
    """The next chunk of each prompt; the first new token of those that are through."""
    parts = [run.embeddings[run.prefilled : run.prefilled + chunk] for run in runs]
    step = cache.extend([run.sequence for run in runs], [len(part) for part in parts])
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
            accept(run, row_logits)
