"""Conversations to prompt text and token ids.

`render_chat` gives the text, for reading and for other tokenizers. `encode_chat` gives the ids and
is the one to use: a control token's name inside a message, a tool declaration or a tool's result
stays ordinary text there, so that no content can end a turn, forge a role or add a picture. That
holds for `<think>` and `</think>` in an assistant message too: reasoning belongs into
`reasoning_content`, and what stands in `content` is never trusted to be the model's own.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kimi_ops.model.chat_messages import Message, media_in_order, normalize_messages
from kimi_ops.model.chat_sandbox import MAX_TEMPLATE_CHARS, render_template
from kimi_ops.model.chat_tools import normalize_tools, parse_tools_json, tools_to_typescript
from kimi_ops.model.errors import ChatError, checked_path
from kimi_ops.model.json_file import read_json_object
from kimi_ops.model.tokenizer_files import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    TEMPLATE_FILE,
    own_template,
    read_file,
)

if TYPE_CHECKING:
    from kimi_ops.model.tokenizer import KimiTokenizer

__all__ = [
    "encode_chat",
    "load_template",
    "media_in_order",
    "parse_tools_json",
    "render_chat",
]

VIDEO_PLACEHOLDER = "<|kimi_k25_video_placeholder|>"


def load_template(directory: str | Path) -> str:
    """Source of the chat template to use with the checkpoint in `directory`.

    That is its `chat_template.jinja`, else `chat_template` of its `tokenizer_config.json` (of
    several named ones: `default`), else the one of this package.

    Raises:
        ChatError: a template file that is not text, too long, or of an unknown form.
    """
    directory = checked_path(directory, ChatError)
    path = directory / TEMPLATE_FILE
    if path.exists():
        try:
            source = read_file(path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ChatError(f"{path}: not UTF-8 text ({error})") from None
        return _check_source(source, str(path))
    path = Path(directory) / CONFIG_FILE
    if not path.exists():
        return own_template()
    found = read_json_object(path, MAX_CONFIG_BYTES, ChatError).get("chat_template")
    if isinstance(found, list):
        named = [t for t in found if isinstance(t, dict) and t.get("name") == "default"]
        found = named[0].get("template") if named else found
    return own_template() if found is None else _check_source(found, f"{path}: chat_template")


def render_chat(
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = True,
    add_generation_prompt: bool = True,
    template: str | None = None,
) -> str:
    """Prompt text of a conversation. Not safe to tokenize when content is not trusted: see
    `encode_chat`.

    Args:
        messages: OpenAI style; see `kimi_ops.model.chat_messages`.
        tools: OpenAI function tools the model may call.
        thinking: the model reasons before it answers; False asks for instant mode.
        add_generation_prompt: end with the opening of the assistant's turn. The model's output then
            starts inside `<think>` in thinking mode, after `</think>` in instant mode.
        template: jinja2 source, as `load_template` returns it; by default this package's own.

    Returns:
        The text; each picture is one `<|media_pad|>` in its frame, each clip one placeholder.

    Raises:
        ChatError: the conversation, a tool or the template is invalid; says which and where.
    """
    return _render(
        normalize_messages(messages),
        normalize_tools(tools),
        thinking=thinking,
        add_generation_prompt=add_generation_prompt,
        template=template,
        now=datetime.now(),
        mark=_unmarked,
    )


def encode_chat(
    tokenizer: KimiTokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = True,
    add_generation_prompt: bool = True,
    template: str | None = None,
    expand: Callable[[str], str] | None = None,
) -> list[int]:
    """Token ids of a conversation; only the template, never content, makes control ids.

    For content free of control token names the ids are `tokenizer.encode(render_chat(...))`.

    Args:
        expand: maps the prompt text to one in which each medium's placeholder has become as many
            pads as it has vision tokens. It sees real placeholders only: names written by a user
            are masked with a character that occurs nowhere else. None leaves placeholders as they
            are.
        (others): as `render_chat`.

    Raises:
        ChatError: as `render_chat`; also when a checkpoint's template rewrites content that names a
            control token, so that it cannot be told from the template's own.
    """
    normal, declared = normalize_messages(messages), normalize_tools(tools)
    now = datetime.now()

    def render(mark: Callable[[str], str]) -> str:
        return _render(
            normal,
            declared,
            thinking=thinking,
            add_generation_prompt=add_generation_prompt,
            template=template,
            now=now,
            mark=mark,
        )

    plain = render(_unmarked)
    marker = _absent_character(plain)
    masked = _Mask((*tokenizer.control_names, VIDEO_PLACEHOLDER), marker)
    text = render(masked)
    if text.replace(marker, "") != plain:
        raise ChatError(
            "the chat template changes content that names a control token, which makes it "
            "impossible to keep that content apart from real control tokens; remove the name from "
            "the conversation or use this package's template"
        )
    if expand is not None:
        text = expand(text)
    return tokenizer.encode_pieces(
        [
            piece.replace(marker, "") if isinstance(piece, str) else piece
            for piece in tokenizer.split_control(text)
        ]
    )


class _Mask:
    """Puts `marker` into a string wherever a control token's name stands or could arise.

    A name could arise at the string's end (its beginning stands there) or start (its end stands
    there), once the template puts another string next to it.
    """

    def __init__(self, names: tuple[str, ...], marker: str) -> None:
        self._names, self._lengths, self._first, self._heads, self._tails = _parts(names)
        self._marker = marker

    def __call__(self, text: str) -> str:
        longest = self._lengths[-1]
        places = set()
        for match in self._first.finditer(text):
            start = match.start()
            is_cut = len(text) - start < longest and text[start:] in self._heads
            if is_cut or any(text[start : start + size] in self._names for size in self._lengths):
                places.add(start + 1)
        places |= {
            end - 1 for end in range(1, min(longest, len(text) + 1)) if text[:end] in self._tails
        }
        bounds = [0, *sorted(places), len(text)]
        return self._marker.join(text[a:b] for a, b in itertools.pairwise(bounds))


@lru_cache(maxsize=8)
def _parts(
    names: tuple[str, ...],
) -> tuple[frozenset[str], list[int], re.Pattern[str], frozenset[str], frozenset[str]]:
    """The names, their lengths, what finds the first character of any, their heads and tails."""
    return (
        frozenset(names),
        sorted({len(name) for name in names}),
        re.compile("|".join(sorted({re.escape(name[0]) for name in names}))),
        frozenset(name[:i] for name in names for i in range(1, len(name))),
        frozenset(name[i:] for name in names for i in range(1, len(name))),
    )


def _render(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    thinking: bool,
    add_generation_prompt: bool,
    template: str | None,
    now: datetime,
    mark: Callable[[str], str],
) -> str:
    declaration = tools_to_typescript(tools) if tools else None
    variables: dict[str, Any] = {
        "messages": [_marked_message(message, mark) for message in messages],
        "tools": _marked(tools, mark),
        "thinking": thinking,
        "add_generation_prompt": add_generation_prompt,
    }
    if declaration is not None:
        # Left undefined otherwise: templates may ask `is defined`.
        variables["tools_ts_str"] = mark(declaration)
    source = own_template() if template is None else template
    return render_template(_check_source(source, "template"), variables, now)


def _marked_message(message: Mapping[str, Any], mark: Callable[[str], str]) -> dict[str, Any]:
    # Templates compare roles and part types; both are from fixed lists and carry no content.
    marked = {key: _marked(value, mark) for key, value in message.items() if key != "content"}
    content = message["content"]
    if not isinstance(content, str):
        content = [{**_marked(part, mark), "type": part["type"]} for part in content]
    else:
        content = mark(content)
    return {**marked, "role": message["role"], "content": content}


def _marked(value: Any, mark: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return mark(value)
    if isinstance(value, Mapping):
        return {mark(key): _marked(item, mark) for key, item in value.items()}
    if isinstance(value, list):
        return [_marked(item, mark) for item in value]
    return value


def _unmarked(text: str) -> str:
    return text


def _absent_character(text: str) -> str:
    """A private-use character that `text` does not contain."""
    used = set(text)
    private_use = itertools.chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))
    for code in private_use:
        if chr(code) not in used:
            return chr(code)
    raise ChatError("the conversation uses every private-use character; one must be left free")


def _check_source(source: Any, where: str) -> str:
    if not isinstance(source, str):
        raise ChatError(f"{where} must be jinja2 source text, got {type(source).__name__}")
    if len(source) > MAX_TEMPLATE_CHARS:
        raise ChatError(
            f"{where}: at most {MAX_TEMPLATE_CHARS} characters expected, got {len(source)}"
        )
    return source
