"""Conversations as token ids with targets, packed into batches without padding."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kimi_ops.model.chat import encode_chat, media_in_order
from kimi_ops.model.conversation import Prompt, PromptBuilder
from kimi_ops.model.media import MediaBatch, MediaItem, Medium, expand_placeholders
from kimi_ops.tasks import make_sample
from kimi_ops.tasks.sample import Clip, Sample

IGNORED = -100  # torch's own value for a position without a target


@dataclass(frozen=True)
class Example:
    """One conversation.

    Attributes:
        ids: ``[T]`` int64, all tokens but the last.
        targets: ``[T]`` int64, the token after each where the assistant writes it, else `IGNORED`.
        media: pictures and clips, in order.
    """

    ids: Tensor
    targets: Tensor
    media: MediaBatch


@dataclass(frozen=True)
class Batch:
    """Several examples one after the other.

    Attributes:
        ids, targets: ``[T]`` int64 of all.
        cu_seqlens: ``[B+1]`` int32, where each begins and ends.
        pixel_values: ``[L, 3, P, P]`` float32.
        grid_thws: ``[n, 3]`` int64.
    """

    ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    pixel_values: Tensor
    grid_thws: Tensor


class Encoder:
    """Samples as the checkpoint's own template and tokenizer write them.

    Each message is rendered by itself and remembered, since the same questions come again and
    again: the template of this family writes every message the same way wherever it stands, but
    for the reasoning of the last answer.

    Args:
        builder: of the checkpoint.
    """

    def __init__(self, builder: PromptBuilder) -> None:
        self.builder = builder
        self._remembered: dict[tuple[str, ...], list[int]] = {}

    def __call__(self, sample: Sample) -> Example:
        """An example. In instant mode all of the assistant's messages are targets, in thinking mode
        the last: its reasoning, its content, and the end of its turn.

        Raises:
            ChatError, MediaError: as `PromptBuilder.build`.
        """
        media = self.media(sample)
        ids = self._remember(("tools", json.dumps(sample.tools)), lambda: self._declared(sample))
        ids, written = list(ids), [False] * len(ids)
        left = list(media.media)
        for message in sample.messages:
            here = [left.pop(0) for part in _parts(message) if part["type"] != "text"]
            texts = [medium.replacement for medium in here]
            key = (message["role"], _text(message), *texts)
            piece = self._remember(key, partial(self._message, message, here))
            ids += piece
            written += [False] * len(piece)
            if message["role"] != "assistant" or (sample.thinking and message is not sample.answer):
                continue
            # The template writes no reasoning of a finished turn, but its opening and its end.
            place = len(ids) - len(piece) + piece.index(self.builder.tokenizer.end_think_id)
            reasoning: list[int] = []
            if sample.thinking:
                text = message.get("reasoning_content", "")
                reasoning = self.builder.tokenizer.encode(text, allow_special=False)
            ids[place:place] = reasoning
            first = place if sample.thinking else place + 1
            written[first:] = [True] * (len(ids) - first)
        tokens, is_target = torch.tensor(ids), torch.tensor(written)
        return Example(tokens[:-1], torch.where(is_target, tokens, IGNORED)[1:], media)

    def media(self, sample: Sample) -> MediaBatch:
        """Pictures and clips of a sample, as the model takes them."""
        sources = [item["source"] for item in media_in_order(sample.messages)]
        return self.builder.media(
            [
                MediaItem("video", source.frames, source.fps)
                if isinstance(source, Clip)
                else MediaItem("image", source)
                for source in sources
            ]
        )

    def prompt(self, sample: Sample) -> Prompt:
        """What the model is asked: the conversation without its last message."""
        media = self.media(sample)
        ids = encode_chat(
            self.builder.tokenizer,
            sample.messages[:-1],
            tools=sample.tools,
            thinking=sample.thinking,
            template=self.builder.template,
            expand=partial(expand_placeholders, media=media.media),
        )
        return Prompt(ids, media)

    def _remember(self, key: tuple[str, ...], make: Callable[[], list[int]]) -> list[int]:
        if key not in self._remembered:
            self._remembered[key] = make()
        return self._remembered[key]

    def _ids(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        options = {"template": self.builder.template, "add_generation_prompt": False, **options}
        return encode_chat(self.builder.tokenizer, messages, **options)

    def _declared(self, sample: Sample) -> list[int]:
        """What stands before the first message."""
        one = [{"role": "user", "content": "x"}]
        rest = len(self._ids(one))
        return self._ids(one, tools=sample.tools)[:-rest]

    def _message(self, message: Mapping[str, Any], media: Sequence[Medium]) -> list[int]:
        before: list[Mapping[str, Any]] = []
        if message["role"] != "user":
            before.append({"role": "user", "content": "x"})
        if message["role"] == "tool":
            call = {
                "id": message["tool_call_id"],
                "type": "function",
                "function": {"name": message["tool_call_id"][10:].split(":")[0], "arguments": "{}"},
            }
            before.append({"role": "assistant", "content": "", "tool_calls": [call]})
        skip = len(self._ids(before)) if before else 0
        expand = partial(expand_placeholders, media=media)
        return self._ids([*before, message], expand=expand)[skip:]


def _parts(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _text(message: Mapping[str, Any]) -> str:
    """What the ids of a message depend on, apart from its media."""
    parts = [part.get("text", part["type"]) for part in _parts(message)]
    return json.dumps([parts, message.get("tool_calls"), message.get("tool_call_id")])


def pack(examples: Sequence[Example]) -> Batch:
    """Joins examples into a batch."""
    lengths = torch.tensor([0, *(len(example.ids) for example in examples)])
    return Batch(
        torch.cat([example.ids for example in examples]),
        torch.cat([example.targets for example in examples]),
        lengths.cumsum(0).int(),
        torch.cat([example.media.pixel_values for example in examples]),
        torch.cat([example.media.grid_thws for example in examples]),
    )


class Lessons(Dataset[Batch]):
    """Batches by number, each of samples of all tasks at a constant ratio.

    Args:
        builder: template, tokenizer and preprocessing of the checkpoint to be.
        mixture: samples by task of every batch.
        batches: length of the run.
        seed: of the samples.
    """

    def __init__(
        self,
        builder: PromptBuilder,
        mixture: Mapping[str, int],
        batches: int,
        *,
        seed: int = 0,
    ) -> None:
        self.encoder = Encoder(builder)
        self.mixture, self.batches, self.seed = mixture, batches, seed

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, number: int) -> Batch:
        return pack(
            [
                self.encoder(
                    make_sample(task, "train", number * count + i, seed=self.seed, several=True)
                )
                for task, count in self.mixture.items()
                for i in range(count)
            ]
        )
