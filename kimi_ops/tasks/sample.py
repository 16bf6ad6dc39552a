"""A conversation with a known answer, and whether a given answer is that one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from kimi_ops.model.chat_parser import ParsedMessage

Split: TypeAlias = Literal["train", "held-out"]
SPLITS: tuple[Split, ...] = ("train", "held-out")
Pixels: TypeAlias = npt.NDArray[np.uint8]
Rng: TypeAlias = np.random.Generator


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        task: name of the task.
        messages: OpenAI style; the last is the assistant's, the answer that is asked for. In a
            media part a picture is a Pillow image and a clip a `Clip`.
        thinking: whether the answer is in thinking mode.
        tools: OpenAI function tools that may be called.
    """

    task: str
    messages: Sequence[Mapping[str, Any]]
    thinking: bool = False
    tools: Sequence[Mapping[str, Any]] | None = None

    @property
    def answer(self) -> Mapping[str, Any]:
        """The assistant's last message."""
        return self.messages[-1]


@dataclass(frozen=True)
class Clip:
    """Frames of a clip and their rate, which is the one that the model samples at."""

    frames: tuple[Image.Image, ...] = field(repr=False)
    fps: float = 2.0


def ask(content: str, *media: Image.Image | Clip) -> dict[str, Any]:
    """The user's message: media first, then the question."""
    if not media:
        return {"role": "user", "content": content}
    parts: list[dict[str, Any]] = [
        {"type": "video", "video": medium}
        if isinstance(medium, Clip)
        else {"type": "image", "image": medium}
        for medium in media
    ]
    return {"role": "user", "content": [*parts, {"type": "text", "text": content}]}


def reply(content: str, reasoning: str = "") -> dict[str, Any]:
    """The assistant's message."""
    message = {"role": "assistant", "content": content}
    return message | ({"reasoning_content": reasoning} if reasoning else {})


def is_correct(sample: Sample, message: ParsedMessage) -> bool:
    """Whether the model ended by itself with this answer: its content, or its tool calls.

    Reasoning may be any. Arguments of a call are compared as JSON values, and nothing may depart
    from the format.
    """
    if message.errors or message.finish_reason not in ("stop", "tool_calls"):
        return False
    content, calls = sample.answer["content"], sample.answer.get("tool_calls", ())
    return message.content.strip() == content and list(map(_call, message.tool_calls)) == list(
        map(_call, calls)
    )


def is_well_formed(sample: Sample, message: ParsedMessage) -> bool:
    """Whether the model called tools by the format, with their declared arguments, and no more."""
    declared = {tool["function"]["name"]: tool["function"] for tool in sample.tools or ()}
    if message.errors or message.finish_reason != "tool_calls":
        return False
    for call in message.tool_calls:
        function = call["function"]
        if function["name"] not in declared:
            return False
        parameters = declared[function["name"]]["parameters"]
        arguments = json.loads(function["arguments"])
        if set(arguments) != set(parameters["required"]):
            return False
        if not all(isinstance(value, str) for value in arguments.values()):
            return False
    return True


def _call(call: Mapping[str, Any]) -> tuple[str, Any]:
    return call["function"]["name"], json.loads(call["function"]["arguments"])
