"""Checks a conversation in OpenAI's message format and brings it into the form templates expect.

A message is a mapping with `role` (system, user, assistant, tool) and `content`: a string or a list
of parts ({"type": "text", "text": ...}, {"type": "image" | "image_url" | "video" | "video_url",
...}). An assistant message may have `reasoning_content` and `tool_calls`; a tool message names the
call it answers in `tool_call_id`. Any message may have a `name`, printed in place of the role.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from kimi_ops.model.errors import ChatError

ROLES = ("system", "user", "assistant", "tool")
MEDIA_KINDS: Mapping[str, str] = {
    "image": "image",
    "image_url": "image",
    "video": "video",
    "video_url": "video",
}
FUNCTION_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
CALL_ID = re.compile(r"functions\.(?P<name>[A-Za-z0-9_.-]{1,128}):(?P<index>[0-9]{1,9})")

_KEYS = {
    "system": {"role", "content", "name"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "name", "reasoning_content", "tool_calls"},
    "tool": {"role", "content", "name", "tool_call_id"},
}

Message = Mapping[str, Any]


def shown(value: object) -> str:
    """`value` for an error message: bounded in length and depth, whatever the caller passed."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return f"a too long {type(value).__name__}"


def normalize_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Checked copies of `messages`, as templates expect them.

    Tool call ids become `functions.NAME:INDEX` with one running index from 0 over the conversation,
    whatever ids the caller used, and `tool_call_id` follows. Arguments become JSON text; text that
    already was JSON stays as it is. Media parts keep their type and lose their source.

    Raises:
        ChatError: naming the message by its index.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ChatError(f"messages must be a list of messages, got {type(messages).__name__}")
    if not messages:
        raise ChatError("messages is empty: a conversation needs at least one message")
    result: list[dict[str, Any]] = []
    released_ids: dict[str, str] = {}
    num_calls = 0
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role = _check_role(message, where)
        normal: dict[str, Any] = {"role": role, "content": _content(message, role, where)}
        for key in ("name", "reasoning_content"):
            if message.get(key) is not None:
                normal[key] = _string(message[key], f"{where}.{key}")
        if message.get("tool_calls"):
            calls = _tool_calls(message["tool_calls"], num_calls, f"{where}.tool_calls")
            num_calls += len(calls)
            released_ids.update((given, call["id"]) for given, call in calls.items())
            normal["tool_calls"] = list(calls.values())
        if role == "tool":
            given = message.get("tool_call_id")
            if not isinstance(given, str) or given not in released_ids:
                raise ChatError(
                    f"{where}.tool_call_id must be the id of a tool call of an earlier assistant "
                    f"message ({', '.join(map(repr, released_ids)) or 'there is none'}), "
                    f"got {shown(given)}"
                )
            normal["tool_call_id"] = released_ids[given]
        result.append(normal)
    return result


def media_in_order(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The pictures and clips of a conversation in order of appearance.

    Returns:
        [{"kind": "image" | "video", "source": what the part gives: a path, URL or object}]

    Raises:
        ChatError: as `normalize_messages`, which checks the conversation first.
    """
    normalize_messages(messages)
    return [
        {"kind": MEDIA_KINDS[part["type"]], "source": _media_source(part, "part")}
        for message in messages
        if message.get("content") is not None and not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] != "text"
    ]


def parse_json_object_text(text: str) -> dict[str, Any]:
    """The JSON object written in `text`; ValueError for anything else, NaN included."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check_role(message: Message, where: str) -> str:
    if not isinstance(message, Mapping):
        raise ChatError(f"{where} must be a mapping, got {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ChatError(f"{where}.role must be one of {', '.join(ROLES)}, got {shown(role)}")
    for key, value in message.items():
        # Clients send empty fields of other APIs along (refusal, annotations, ...): harmless.
        if key not in _KEYS[role] and value:
            raise ChatError(
                f"{where} ({role}) has the key {key!r}, which this model's format cannot carry; "
                f"expected {', '.join(sorted(_KEYS[role]))}"
            )
    return role


def _content(message: Message, role: str, where: str) -> str | list[dict[str, str]]:
    content = message.get("content")
    if content is None:
        if role == "assistant" and message.get("tool_calls"):
            return ""
        raise ChatError(f"{where} ({role}) has no content; expected a string or a list of parts")
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple) or not content:
        raise ChatError(
            f"{where}.content must be a string or a non-empty list of parts, got {shown(content)}"
        )
    return [_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]


def _part(part: Any, where: str) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        return {"type": "text", "text": _string(part.get("text"), f"{where}.text")}
    if isinstance(kind, str) and kind in MEDIA_KINDS:
        _media_source(part, where)
        return {"type": kind}
    raise ChatError(
        f"{where} must be a mapping with type text, {', '.join(MEDIA_KINDS)}, got {shown(part)}"
    )


def _media_source(part: Mapping[str, Any], where: str) -> Any:
    """What a media part points to: its own key, or `url` / `path`; {"url": ...} is unwrapped."""
    kind = part["type"]
    for key in (kind, MEDIA_KINDS[kind], "url", "path"):
        source = part.get(key)
        if isinstance(source, Mapping):
            source = source.get("url")
        if source is not None and not (isinstance(source, str | bytes) and not source):
            return source
    raise ChatError(f"{where} ({kind}) has no source; expected it under the key {kind!r}")


def _tool_calls(calls: Any, first_index: int, where: str) -> dict[str, dict[str, Any]]:
    """Given id -> normal tool call."""
    if not isinstance(calls, list | tuple):
        raise ChatError(f"{where} must be a list, got {type(calls).__name__}")
    result: dict[str, dict[str, Any]] = {}
    for position, call in enumerate(calls):
        here = f"{where}[{position}]"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or call.get("type", "function") != "function":
            raise ChatError(
                f"{here} must be {{'id': ..., 'type': 'function', 'function': {{...}}}}, "
                f"got {shown(call)}"
            )
        given = _string(call.get("id"), f"{here}.id")
        if not given or given in result:
            raise ChatError(
                f"{here}.id must be new in its message and not empty, got {shown(given)}"
            )
        name = check_function_name(function.get("name"), f"{here}.function.name")
        result[given] = {
            "id": f"functions.{name}:{first_index + position}",
            "type": "function",
            "function": {
                "name": name,
                "arguments": _arguments(function.get("arguments"), f"{here}.function.arguments"),
            },
        }
    return result


def check_function_name(name: Any, where: str) -> str:
    """`name` if it can stand in a tool call id; ChatError otherwise."""
    if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
        raise ChatError(
            f"{where} must be 1 to 128 letters, digits, '_', '-' or '.', got {shown(name)}"
        )
    return name


def _arguments(arguments: Any, where: str) -> str:
    expected = f"{where} must be a JSON object or its text"
    if isinstance(arguments, str):
        try:
            parse_json_object_text(arguments)
        except ValueError as error:
            raise ChatError(f"{expected}, got {shown(arguments)} ({error})") from None
        return arguments
    if not isinstance(arguments, Mapping):
        raise ChatError(f"{expected}, got {type(arguments).__name__}")
    try:
        return json.dumps(dict(arguments), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatError(f"{expected}, got a value that is not JSON ({error})") from None


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ChatError(f"{where} must be a string, got {type(value).__name__}")
    return value
