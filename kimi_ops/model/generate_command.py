"""`kimi-ops generate`: one answer, or a chat on the terminal."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from kimi_ops.model.chat import parse_tools_json
from kimi_ops.model.chat_messages import normalize_messages
from kimi_ops.model.chat_parser import Event
from kimi_ops.model.conversation import Answer, Prompt, PromptBuilder, answer
from kimi_ops.model.errors import ChatError, check_count
from kimi_ops.model.generate import Sampling
from kimi_ops.model.settings import usable_device
from kimi_ops.model.weight_map import parse_layers

if TYPE_CHECKING:
    from kimi_ops.model.cache import CacheFormat
    from kimi_ops.model.kimi import KimiK25

# (temperature, top_p) recommended on Kimi K2.5's model card.
THINKING_SAMPLING = (1.0, 0.95)
INSTANT_SAMPLING = (0.6, 0.95)
# Conversations with pictures inside as data URLs are long; endless input is not a conversation.
MAX_INPUT_BYTES = 256 * 2**20
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended
DIM, RESET = "\x1b[2m", "\x1b[0m"
# What the model writes must not steer the terminal: control characters become visible ones.
VISIBLE_CONTROLS = (
    {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
    | {127: 0x2421}
    | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
)


class Display:
    """Shows an answer while it is written: reasoning (dim on a terminal), content, tool calls."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._dim = self._terminal and "NO_COLOR" not in os.environ
        self._shown = ""

    def show(self, event: Event) -> None:
        """Writes what `event` adds; tags and the space around them are not shown."""
        if event.kind == "markup":
            return
        if self._shown == "reasoning" and event.kind != "reasoning":
            self._write("\n\n")
        elif self._shown and "tool_call" in (self._shown, event.kind):
            self._write("\n")
        self._shown = event.kind
        text = event.raw
        if event.tool_call is not None:
            text = json.dumps(event.tool_call, ensure_ascii=False)
        if self._terminal:
            text = text.translate(VISIBLE_CONTROLS)
        self._write(f"{DIM}{text}{RESET}" if self._dim and event.kind == "reasoning" else text)

    def end(self) -> None:
        """Ends the last line."""
        self._write("\n")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


@dataclass(frozen=True)
class Engine:
    """A loaded checkpoint and the settings that all answers of one run share."""

    builder: PromptBuilder
    model: KimiK25
    sampling: Sampling
    tools: list[dict[str, Any]] | None
    thinking: bool
    max_new_tokens: int | None
    stream: bool
    load_seconds: float
    cache_format: CacheFormat = "plain"

    def build(self, messages: list[dict[str, Any]]) -> Prompt:
        """The prompt of a conversation. Raises `KimiError`."""
        return self.builder.build(messages, tools=self.tools, thinking=self.thinking)

    def answer(self, prompt: Prompt, display: Display | None) -> Answer:
        """Runs the model, shown on `display` if there is one. Raises `KimiError`."""
        events: list[Event] = []
        sink = display.show if display is not None and self.stream else events.append
        try:
            result = answer(
                self.model,
                self.builder.tokenizer,
                prompt,
                thinking=self.thinking,
                max_new_tokens=self.max_new_tokens,
                sampling=self.sampling,
                on_event=sink,
                cache_format=self.cache_format,
            )
            if display is not None and not self.stream:
                for event in events:
                    display.show(event)
        finally:
            if display is not None:
                display.end()
        return result


def read_text(path: str) -> str:
    """The text of a file that the user named. Raises `ChatError`."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_INPUT_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or error
        raise ChatError(f"{path!r}: cannot be read: {reason}") from None
    if len(data) > MAX_INPUT_BYTES:
        raise ChatError(f"{path!r}: longer than {MAX_INPUT_BYTES} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ChatError(f"{path!r}: not UTF-8 text ({error})") from None


def read_messages(path: str) -> list[dict[str, Any]]:
    """The conversation in a JSON file: a list of OpenAI messages. Raises `ChatError`."""
    text = read_text(path)
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ChatError(f"{path!r}: not JSON ({reason})") from None
    if not isinstance(messages, list):
        raise ChatError(f"{path!r}: expected a list of messages, got {type(messages).__name__}")
    try:
        normalize_messages(messages)
    except ChatError as error:
        raise ChatError(f"{path!r}: {error}") from None
    return messages


def user_message(text: str, media: list[tuple[str, Any]]) -> dict[str, Any]:
    """A user's message: media, (kind, source) each, stand before the text."""
    if not media:
        return {"role": "user", "content": text}
    parts = [{"type": kind, kind: source} for kind, source in media]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def note(text: str) -> None:
    """One line on stderr."""
    print(f"kimi-ops: {text}", file=sys.stderr)


def load(
    args: argparse.Namespace, builder: PromptBuilder, tools: list[dict[str, Any]] | None
) -> Engine:
    """Checks all settings, then loads the weights. Raises `KimiError`."""
    published = INSTANT_SAMPLING if args.instant else THINKING_SAMPLING
    sampling = builder.generation_config.sampling(Sampling(*published))
    temperature = sampling.temperature
    if args.instant and temperature > 0:
        # The file's temperature is that of the model's ordinary mode, which thinks.
        temperature = published[0]
    sampling = Sampling(
        temperature=temperature if args.temperature is None else args.temperature,
        top_p=sampling.top_p if args.top_p is None else args.top_p,
        seed=args.seed,
    )
    if args.max_new_tokens is not None:
        check_count("max_new_tokens", args.max_new_tokens)
    device = usable_device(args.device)
    config = builder.config
    layers = None if args.layers is None else parse_layers(args.layers, config)
    if builder.random_weights:
        note(f"the weights in {builder.directory} are random, so the text is noise")
    if layers is not None and len(layers) < config.text_config.num_hidden_layers:
        count = config.text_config.num_hidden_layers
        note(f"only {len(layers)} of {count} decoder layers are loaded, so the text is noise")
    from kimi_ops.model.kimi import KimiK25

    started = time.perf_counter()
    model = KimiK25.from_pretrained(
        builder.directory, device=device, dtype=args.dtype, layers=layers
    )
    return Engine(
        builder=builder,
        model=model,
        sampling=sampling,
        tools=tools,
        thinking=not args.instant,
        max_new_tokens=args.max_new_tokens,
        stream=not args.no_stream,
        load_seconds=time.perf_counter() - started,
        cache_format=args.cache_format,
    )


def report(result: Answer) -> None:
    """Counts, speed, finish reason and departures from the format, on stderr."""
    generation, message = result.generation, result.message
    for error in message.errors:
        note(f"format of the answer: {error}")
    note(
        f"{generation.prompt_tokens} prompt tokens in {generation.prefill_seconds:.2f} s, "
        f"{generation.new_tokens} new tokens, {generation.tokens_per_second:.1f} tokens/s, "
        f"finish reason: {message.finish_reason}"
    )


def to_json(result: Answer, engine: Engine) -> dict[str, Any]:
    """What `kimi-ops generate --json` prints."""
    generation, message = result.generation, result.message
    return {
        "reasoning_content": message.reasoning_content,
        "content": message.content,
        "tool_calls": message.tool_calls,
        "finish_reason": message.finish_reason,
        "usage": {
            "prompt_tokens": generation.prompt_tokens,
            "completion_tokens": generation.new_tokens,
            "total_tokens": generation.prompt_tokens + generation.new_tokens,
        },
        "timings": {
            "load_seconds": engine.load_seconds,
            "prefill_seconds": generation.prefill_seconds,
            "decode_seconds": generation.decode_seconds,
            "tokens_per_second": generation.tokens_per_second,
        },
        "errors": message.errors,
        "malformed": message.malformed,
        "random_weights": engine.builder.random_weights,
    }


def run_generate(args: argparse.Namespace) -> int:
    """`kimi-ops generate`; 0, 130 after Ctrl-C, or `KimiError`."""
    tools = None if args.tools is None else parse_tools_json(read_text(args.tools), args.tools)
    if args.interactive:
        from kimi_ops.model.interactive import chat

        builder = PromptBuilder(args.model)
        attached = [
            (kind, builder.read_media(kind, path, place))
            for place, (kind, path) in enumerate(args.media)
        ]
        return chat(load(args, builder, tools), args.system, attached)
    if args.messages is not None:
        messages = read_messages(args.messages)
    else:
        messages = [] if args.system is None else [{"role": "system", "content": args.system}]
        messages.append(user_message(args.prompt, args.media))
    builder = PromptBuilder(args.model)
    prompt = builder.build(messages, tools=tools, thinking=not args.instant)
    engine = load(args, builder, tools)
    result = engine.answer(prompt, None if args.json else Display(sys.stdout))
    if args.json:
        print(json.dumps(to_json(result, engine), indent=2))
    else:
        report(result)
    return INTERRUPTED if result.message.finish_reason == "interrupted" else 0
