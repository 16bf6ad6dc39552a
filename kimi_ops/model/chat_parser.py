"""Splits what the model wrote into reasoning, content and tool calls, while it is being written.

In thinking mode the prompt ends with `<think>`, so the output starts inside the reasoning; in
instant mode it starts with content. Tool calls come last, in their own section:

    reasoning</think>content<|tool_calls_section_begin|>
    <|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{...}<|tool_call_end|>
    <|tool_calls_section_end|>

(without the line breaks). The parser accepts any text. What does not follow the format is reported
with its raw text, never dropped: `raw` of all events joined is the input.
Source: Kimi K2.5 tool call guidance and chat template.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from kimi_ops.model.chat_messages import CALL_ID, parse_json_object_text
from kimi_ops.model.errors import ChatError

EventKind = Literal["reasoning", "content", "tool_call", "malformed", "markup"]
StopReason = Literal["stop", "length", "interrupted"]

THINK_BEGIN = "<think>"
THINK_END = "</think>"
SECTION_BEGIN = "<|tool_calls_section_begin|>"
SECTION_END = "<|tool_calls_section_end|>"
CALL_BEGIN = "<|tool_call_begin|>"
CALL_ARGUMENTS = "<|tool_call_argument_begin|>"
CALL_END = "<|tool_call_end|>"
# `decode` without skip_special_tokens leaves one of these at the very end.
STOP_TOKENS = ("<|im_end|>", "[EOS]")

_CALL_BREAK = re.compile("|".join(map(re.escape, (CALL_BEGIN, SECTION_BEGIN, SECTION_END))))
_SECTION_MARK = re.compile("|".join(map(re.escape, (CALL_BEGIN, SECTION_END))))


@dataclass(frozen=True)
class Event:
    """One step of the output.

    Attributes:
        kind: "reasoning" and "content" carry text to show; "tool_call" a finished call;
            "malformed" text that breaks the format; "markup" tags and space between calls.
        raw: exactly the part of the output that this event accounts for.
        tool_call: for "tool_call": {"id", "type", "function": {"name", "arguments"}}, with
            `arguments` as JSON text.
        error: what is wrong, for "malformed" and for markup that comes out of order.
    """

    kind: EventKind
    raw: str
    tool_call: dict[str, Any] | None = None
    error: str | None = None


@dataclass
class ParsedMessage:
    """The whole output, split.

    Attributes:
        reasoning_content: text inside the think tags.
        content: text outside think tags and tool calls.
        tool_calls: valid calls in order, as in an OpenAI assistant message.
        errors: one sentence for each departure from the format, in order.
        malformed: raw texts of what could not be parsed, in order.
        finish_reason: "tool_calls" when the model stopped by itself with at least one valid call,
            else the reason given to `finish`.
    """

    reasoning_content: str = ""
    content: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    malformed: list[str] = field(default_factory=list)
    finish_reason: str = "stop"

    def to_message(self) -> dict[str, Any]:
        """The assistant message to append to the conversation (OpenAI format)."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        return message


def parse_output(text: str, thinking: bool = True, *, reason: StopReason = "stop") -> ParsedMessage:
    """Parse a complete output; see `ChatParser`."""
    parser = ChatParser(thinking=thinking)
    parser.feed(text)
    parser.finish(reason)
    return parser.message


class ChatParser:
    """Streaming parser: `feed` it pieces of text cut anywhere, then call `finish` once.

    The message does not depend on how the text was cut. Reasoning and content are passed on as soon
    as they cannot be the beginning of a tag any more; a tool call when it is complete.

    Args:
        thinking: whether the prompt ended with an open `<think>`.
    """

    def __init__(self, thinking: bool) -> None:
        self._state: Literal["think", "content", "section", "call", "finished"] = (
            "think" if thinking else "content"
        )
        self._buffer = ""
        self._searched = 0
        self._at_start = True
        self._parts: dict[str, list[str]] = {"reasoning": [], "content": []}
        self._message = ParsedMessage()

    @property
    def message(self) -> ParsedMessage:
        """What has been parsed so far; complete after `finish`."""
        self._message.reasoning_content = "".join(self._parts["reasoning"])
        self._message.content = "".join(self._parts["content"])
        return self._message

    def feed(self, text: str) -> list[Event]:
        """Events that `text` completes.

        Raises:
            TypeError: `text` is not a string.
            ChatError: after `finish`.
        """
        if not isinstance(text, str):
            raise TypeError(f"feed: text must be str, got {type(text).__name__}")
        if self._state == "finished":
            raise ChatError("ChatParser.feed after finish: use one parser per output")
        self._buffer += text
        return self._run(final=False)

    def finish(self, reason: StopReason = "stop") -> list[Event]:
        """The remaining events. `reason`: why the output ended.

        Raises:
            ChatError: called twice, or an unknown reason.
        """
        if self._state == "finished":
            raise ChatError("ChatParser.finish was already called")
        if reason not in ("stop", "length", "interrupted"):
            raise ChatError(
                f"ChatParser.finish: reason must be stop, length or interrupted, got {reason!r}"
            )
        events = self._run(final=True)
        if self._state == "think":
            self._message.errors.append(f"the output ended before {THINK_END}")
        elif self._state in ("section", "call"):
            self._message.errors.append(f"the output ended before {SECTION_END}")
        self._state = "finished"
        has_calls = reason == "stop" and self._message.tool_calls
        self._message.finish_reason = "tool_calls" if has_calls else reason
        return events

    def _run(self, final: bool) -> list[Event]:
        """Consume as much of the buffer as can be decided; all of it when `final`."""
        events: list[Event] = []
        stop_token = ""
        if final:
            stop_token = next((t for t in STOP_TOKENS if self._buffer.endswith(t)), "")
            self._buffer = self._buffer.removesuffix(stop_token)
        steps = {
            "think": self._step_text,
            "content": self._step_text,
            "section": self._step_section,
            "call": self._step_call,
        }
        while self._buffer:
            event = steps[self._state](final)
            if event is None:
                break
            events.append(event)
        if stop_token:
            events.append(Event("markup", stop_token))
        for event in events:
            self._record(event)
        return events

    def _take(self, length: int) -> str:
        taken, self._buffer = self._buffer[:length], self._buffer[length:]
        self._searched = 0
        self._at_start = False
        return taken

    def _step_text(self, final: bool) -> Event | None:
        """Reasoning or content, up to the next tag."""
        thinking = self._state == "think"
        tags = (THINK_END, SECTION_BEGIN) if thinking else (SECTION_BEGIN,)
        if self._at_start:
            # The model may repeat the tag that the prompt ended with.
            if self._buffer.startswith(THINK_BEGIN):
                self._state = "think"
                return Event("markup", self._take(len(THINK_BEGIN)))
            if THINK_BEGIN.startswith(self._buffer) and not final:
                return None
        starts = {self._buffer.find(tag): tag for tag in tags if tag in self._buffer}
        if 0 in starts:
            tag = starts[0]
            self._state = "content" if tag == THINK_END else "section"
            early = thinking and tag == SECTION_BEGIN
            error = f"tool calls began before {THINK_END}" if early else None
            return Event("markup", self._take(len(tag)), error=error)
        if starts:
            length = min(starts)
        elif final:
            length = len(self._buffer)
        else:
            length = len(self._buffer) - _held_back(self._buffer, (*tags, *STOP_TOKENS))
        if not length:
            return None
        return Event("reasoning" if thinking else "content", self._take(length))

    def _step_section(self, final: bool) -> Event | None:
        """Between two calls of a section: only tags and white space belong here."""
        mark = _SECTION_MARK.search(self._buffer, self._searched)
        if mark and mark.start() == 0:
            self._state = "call" if mark[0] == CALL_BEGIN else "content"
            # A call keeps its opening tag in the buffer, so that its raw text is complete.
            if self._state == "call":
                return self._step_call(final)
            return Event("markup", self._take(len(SECTION_END)))
        if mark is None and not final:
            self._searched = max(0, len(self._buffer) - len(SECTION_END))
            return None
        text = self._take(mark.start() if mark else len(self._buffer))
        if text.isspace():
            return Event("markup", text)
        return Event("malformed", text, error="text between tool calls")

    def _step_call(self, final: bool) -> Event | None:
        """One call, from its opening to its closing tag."""
        end = self._buffer.find(CALL_END, self._searched)
        if end < 0 and not final:
            self._searched = max(0, len(self._buffer) - len(CALL_END))
            return None
        self._state = "section"
        body = self._buffer[len(CALL_BEGIN) : end if end >= 0 else len(self._buffer)]
        unclosed = f"a tool call without {CALL_END}"
        call = _parse_call(body) if end >= 0 else unclosed
        length = end + len(CALL_END) if end >= 0 else len(self._buffer)
        if isinstance(call, dict):
            return Event("tool_call", self._take(length), tool_call=call)
        # Arguments may quote tags, so a tag inside ends a call only if the call is not valid.
        inner = _CALL_BREAK.search(body)
        if inner:
            return Event("malformed", self._take(len(CALL_BEGIN) + inner.start()), error=unclosed)
        return Event("malformed", self._take(length), error=call)

    def _record(self, event: Event) -> None:
        if event.kind in self._parts:
            self._parts[event.kind].append(event.raw)
        if event.tool_call is not None:
            self._message.tool_calls.append(event.tool_call)
        if event.kind == "malformed":
            self._message.malformed.append(event.raw)
        if event.error is not None:
            self._message.errors.append(event.error)


def _parse_call(body: str) -> dict[str, Any] | str:
    """The call written between its tags, or what is wrong with it."""
    call_id, separator, arguments = body.partition(CALL_ARGUMENTS)
    if not separator:
        return f"a tool call without {CALL_ARGUMENTS}"
    match = CALL_ID.fullmatch(call_id.strip())
    if match is None:
        return f"the tool call id must be functions.NAME:INDEX, got {call_id.strip()[:80]!r}"
    try:
        parse_json_object_text(arguments)
    except ValueError as error:
        return f"the arguments of {match[0]} are not a JSON object: {error}"
    function = {"name": match["name"], "arguments": arguments.strip()}
    return {"id": match[0], "type": "function", "function": function}


def _held_back(text: str, tags: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that may grow into a tag, or is one already."""
    longest = max(map(len, tags))
    for length in range(min(longest, len(text)), 0, -1):
        if any(tag.startswith(text[-length:]) for tag in tags):
            return length
    return 0
