"""From a conversation to a prompt, and from generated tokens to an answer.

`PromptBuilder` is everything of a checkpoint but its weights, so a request that cannot be carried
out is refused before they are loaded. `answer` runs the model on a prompt and splits what it
writes, while it writes it.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kimi_ops.model.chat import encode_chat, load_template, media_in_order
from kimi_ops.model.chat_messages import Message
from kimi_ops.model.chat_parser import ChatParser, Event, ParsedMessage, parse_output
from kimi_ops.model.config import KimiK25Config
from kimi_ops.model.errors import CheckpointError, KimiError, MediaError, checked_path
from kimi_ops.model.generate import Generation, Sampling
from kimi_ops.model.generation_config import GenerationConfig
from kimi_ops.model.media import MediaBatch, MediaItem, MediaProcessor, expand_placeholders
from kimi_ops.model.media_config import CONFIG_FILE, MediaConfig
from kimi_ops.model.random_files import has_random_weights
from kimi_ops.model.tokenizer import KimiTokenizer

if TYPE_CHECKING:
    from kimi_ops.model.cache import CacheFormat
    from kimi_ops.model.kimi import KimiK25

DEFAULT_NEW_TOKENS = 1024
# The form in which OpenAI clients send pictures. The MIME type is not needed: content tells.
_DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)


@dataclass(frozen=True)
class Prompt:
    """Arguments of `KimiK25.generate` for one conversation.

    Attributes:
        ids: token ids, a placeholder per vision token.
        media: patches and grids of its pictures and clips, in order; empty tensors without any.
    """

    ids: list[int]
    media: MediaBatch


@dataclass(frozen=True)
class Answer:
    """What the model answered.

    Attributes:
        message: reasoning, content, tool calls, finish reason, departures from the format.
        generation: token ids and timings.
    """

    message: ParsedMessage
    generation: Generation


class PromptBuilder:
    """Config, tokenizer, template and media processing of a checkpoint.

    Attributes:
        directory, config, tokenizer: of the checkpoint.
        template: jinja2 source of its chat template, or this package's own.
        media: uses the checkpoint's preprocessor_config.json if there is one, else the released
            values of Kimi K2.5.
        generation_config: defaults of its generation_config.json.
        random_weights: whether the checkpoint is marked as a random one.
    """

    def __init__(self, directory: str | Path) -> None:
        """Reads everything but weights.

        Raises:
            KimiError: a file that is missing, malformed, or contradicts another one.
        """
        self.directory = checked_path(directory, CheckpointError)
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: not a directory with a checkpoint")
        if not (self.directory / "config.json").is_file():
            raise CheckpointError(f"{self.directory}: config.json is missing")
        self.config = KimiK25Config.from_file(self.directory)
        self.tokenizer = KimiTokenizer.from_pretrained(self.directory)
        self._check_tokenizer()
        self.template = load_template(self.directory)
        has_media_config = (self.directory / CONFIG_FILE).exists()
        media_config = MediaConfig.from_file(self.directory) if has_media_config else MediaConfig()
        self.media = MediaProcessor(media_config)
        self.generation_config = GenerationConfig.from_file(
            self.directory, self.config.text_config.vocab_size
        )
        self.random_weights = has_random_weights(self.directory)

    def _check_tokenizer(self) -> None:
        size, expected = self.tokenizer.vocab_size, self.config.text_config.vocab_size
        if size != expected:
            raise CheckpointError(
                f"{self.directory}: tiktoken.model makes a tokenizer of {size} ids, but "
                f"text_config.vocab_size of config.json is {expected}"
            )
        pad, placeholder = self.tokenizer.media_pad_id, self.config.media_placeholder_token_id
        if pad != placeholder:
            raise CheckpointError(
                f"{self.directory}: the tokenizer's <|media_pad|> is id {pad}, but "
                f"media_placeholder_token_id of config.json is {placeholder}"
            )

    def read_media(self, kind: str, source: Any, place: int = 0) -> MediaBatch:
        """Reads one picture or clip, for use as the source of a message part in place of a path.

        Args:
            kind: "image" or "video".
            source: path, bytes, base64 data URL or array; nothing is ever downloaded.
            place: of the medium in the conversation, for messages.

        Raises:
            MediaError: it cannot be read.
        """
        try:
            return self.media([MediaItem("video" if kind == "video" else "image", _data(source))])
        except MediaError as error:
            # The processor counts from 0 in each call; this call has one medium of several.
            text = str(error).removeprefix("medium 0: ")
            raise MediaError(f"medium {place}: {text}") from error

    def build(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = True,
    ) -> Prompt:
        """The prompt of a conversation, ending with the opening of the assistant's turn.

        Args:
            messages: OpenAI style, as `encode_chat`. A media part's source is what `read_media`
                takes, or its result.
            tools: OpenAI function tools.
            thinking: False asks for instant mode.

        Raises:
            ChatError, MediaError: the conversation, a tool or a medium is invalid.
            KimiError: the prompt leaves no room for an answer in the context.
        """
        batches = [
            item["source"]
            if isinstance(item["source"], MediaBatch)
            else self.read_media(item["kind"], item["source"], place)
            for place, item in enumerate(media_in_order(messages))
        ]
        media = tuple(medium for batch in batches for medium in batch.media)
        ids = encode_chat(
            self.tokenizer,
            messages,
            tools=tools,
            thinking=thinking,
            template=self.template,
            expand=partial(expand_placeholders, media=media),
        )
        context = self.config.text_config.max_position_embeddings
        if len(ids) >= context:
            vision = sum(medium.tokens for medium in media)
            raise KimiError(
                f"the prompt has {len(ids)} tokens, {vision} of them for pictures and clips; the "
                f"context limit is {context}, one of which the first new token takes"
            )
        none = self.media([])
        pixel_values = [none.pixel_values, *(batch.pixel_values for batch in batches)]
        grid_thws = [none.grid_thws, *(batch.grid_thws for batch in batches)]
        return Prompt(ids, MediaBatch(torch.cat(pixel_values), torch.cat(grid_thws), media))


def _data(source: Any) -> Any:
    """The bytes in a data URL; any other source as it is."""
    match = _DATA_URL.match(source) if isinstance(source, str) else None
    if match is None:
        return source
    try:
        return base64.b64decode(source[match.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"a data URL whose content is not base64 ({error})") from None


def answer(
    model: KimiK25,
    tokenizer: KimiTokenizer,
    prompt: Prompt,
    *,
    thinking: bool = True,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
    on_event: Callable[[Event], None] | None = None,
    cache_format: CacheFormat = "plain",
) -> Answer:
    """Runs the model on a prompt.

    Args:
        thinking: as given to `PromptBuilder.build`.
        max_new_tokens: as `KimiK25.generate`, but 1,024 where neither it nor the checkpoint says.
        sampling: as `KimiK25.generate`.
        on_event: called with each step of the output as soon as it is certain.
        cache_format: as `KimiK25.generate`.

    Returns:
        The parsed answer; after Ctrl-C that of the tokens there are, "interrupted".

    Raises:
        KimiError: as `KimiK25.generate`.
    """
    if not isinstance(prompt, Prompt):
        raise KimiError(f"prompt must be of PromptBuilder.build, got {type(prompt).__name__}")
    if max_new_tokens is None:
        (max_new_tokens,) = model.generation_config.limits([len(prompt.ids)], DEFAULT_NEW_TOKENS)
    decoder, parser = tokenizer.stream_decoder(), ChatParser(thinking=thinking)

    def pass_on(events: list[Event]) -> None:
        for event in events:
            if on_event is not None:
                on_event(event)

    def on_token(_: int, token: int) -> None:
        pass_on(parser.feed(decoder.feed(token)))

    generation = model.generate(
        [prompt.ids],
        pixel_values=prompt.media.pixel_values,
        grid_thws=prompt.media.grid_thws,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        cache_format=cache_format,
        # What ends a turn ends the answer, whatever else the checkpoint names.
        stop_ids={*tokenizer.stop_ids, *(model.generation_config.stop_ids or ())},
        on_token=on_token,
    )
    (tokens,), (reason,) = generation.tokens, generation.finish_reasons
    pass_on(parser.feed(decoder.finish()))
    pass_on(parser.finish(reason))
    # From the tokens, not from the parser: Ctrl-C may have struck between the two.
    message = parse_output(tokenizer.decode(tokens), thinking, reason=reason)
    return Answer(message, generation)
