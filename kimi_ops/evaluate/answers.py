"""What a model answers to held-out samples of a task, and whether that is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kimi_ops.model.chat_parser import ParsedMessage, parse_output
from kimi_ops.model.errors import check_count
from kimi_ops.model.generate import Sampling
from kimi_ops.model.kimi import KimiK25
from kimi_ops.tasks import Sample, is_correct, make_sample
from kimi_ops.tasks.sample import is_well_formed
from kimi_ops.train.examples import Encoder

NEW_TOKENS = 96  # at most; with the small model's own vocabulary the longest right answer has 31
BATCH = 32  # prompts at once: their pictures and their cache are in memory together


@dataclass(frozen=True)
class Answered:
    """One sample and what the model made of it.

    Attributes:
        number: of the sample.
        question: text of the user's message.
        expected, got: the right answer, and the model's with what is wrong in its form; one line
            each.
        right: `is_correct`.
        well_formed: `is_well_formed`; says something of tool calls alone.
    """

    number: int
    question: str
    expected: str
    got: str
    right: bool
    well_formed: bool


def answered(
    model: KimiK25,
    encoder: Encoder,
    task: str,
    samples: int,
    *,
    seed: int = 0,
    batch: int = BATCH,
    max_new_tokens: int = NEW_TOKENS,
    on_done: Callable[[int], object] | None = None,
) -> Iterator[Answered]:
    """Asks the model the first held-out samples of a task, greedily, several at once.

    Args:
        model: the checkpoint's.
        encoder: the same checkpoint's template, tokenizer and preprocessing.
        task: a key of `TASKS`.
        samples: how many.
        seed: of the samples.
        batch: prompts at once; bounds the memory.
        max_new_tokens: an answer that is longer is wrong.
        on_done: called with the number of samples just answered.

    Yields:
        the samples in order of their numbers.

    Raises:
        KimiError: an unknown task, a number out of range, and as `KimiK25.generate`.
        KeyboardInterrupt: Ctrl-C, which `KimiK25.generate` takes for the end of the answers.
    """
    for name, value in (("samples", samples), ("batch", batch)):
        check_count(name, value)
    check_count("seed", seed, minimum=0)
    for first in range(0, samples, batch):
        numbers = range(first, min(first + batch, samples))
        asked = [make_sample(task, "held-out", number, seed=seed) for number in numbers]
        messages = _ask(model, encoder, asked, max_new_tokens)
        for number, sample, message in zip(numbers, asked, messages, strict=True):
            yield _judged(number, sample, message)
        if on_done is not None:
            on_done(len(numbers))


def _ask(
    model: KimiK25, encoder: Encoder, samples: Sequence[Sample], max_new_tokens: int
) -> list[ParsedMessage]:
    tokenizer, prompts = encoder.builder.tokenizer, [encoder.prompt(one) for one in samples]
    generation = model.generate(
        [prompt.ids for prompt in prompts],
        pixel_values=torch.cat([prompt.media.pixel_values for prompt in prompts]),
        grid_thws=torch.cat([prompt.media.grid_thws for prompt in prompts]),
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature=0),
        # As in `kimi_ops.model.conversation.answer`.
        stop_ids={*tokenizer.stop_ids, *(model.generation_config.stop_ids or ())},
    )
    if "interrupted" in generation.finish_reasons:
        raise KeyboardInterrupt
    return [
        parse_output(tokenizer.decode(tokens), sample.thinking, reason=reason)
        for sample, tokens, reason in zip(
            samples, generation.tokens, generation.finish_reasons, strict=True
        )
    ]


def _judged(number: int, sample: Sample, message: ParsedMessage) -> Answered:
    answer = sample.answer
    faults = list(message.errors)
    if message.finish_reason == "length":
        faults.append("not ended")
    got = _in_words(message.to_message())
    return Answered(
        number=number,
        question=_question(sample),
        expected=_in_words(answer),
        got=f"{got} ({'; '.join(faults)})" if faults else got,
        right=is_correct(sample, message),
        well_formed=is_well_formed(sample, message),
    )


def _question(sample: Sample) -> str:
    """Text of the last message of the user."""
    content = next(m for m in reversed(sample.messages) if m["role"] == "user")["content"]
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part["type"] == "text")


def _in_words(answer: Mapping[str, Any]) -> str:
    """An assistant's message on one line; what a model writes must not steer a terminal."""
    thoughts, content = answer.get("reasoning_content"), answer["content"]
    calls = [call["function"] for call in answer.get("tool_calls", ())]
    texts = [f"thinking {thoughts!r}"] if thoughts else []
    texts += [repr(content)] if content or not calls else []
    texts += [f"{call['name']} {call['arguments']!r}" for call in calls]
    return ", ".join(texts)
