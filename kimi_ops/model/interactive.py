"""The chat of `kimi-ops generate --interactive`: several turns, read from stdin.

A turn that fails is withdrawn as a whole, so the conversation can always go on. The whole
conversation is the prompt of each turn; nothing is kept in the cache between turns.
"""

from __future__ import annotations

import io
import sys
from typing import Any

from kimi_ops.model.chat_messages import normalize_messages
from kimi_ops.model.errors import KimiError
from kimi_ops.model.generate_command import Display, Engine, note, report, user_message
from kimi_ops.model.media import MediaBatch

HELP = (
    "/image PATH and /video PATH attach to the next message, /reset forgets the conversation, "
    "/exit or end of input leaves; // begins a message with /"
)


def chat(
    engine: Engine, system: str | None = None, media: list[tuple[str, MediaBatch]] | None = None
) -> int:
    """Talks until /exit or the end of input; returns the exit code 0.

    Args:
        engine: the loaded model.
        system: system message that begins every conversation.
        media: (kind, medium) attached to the first message.
    """
    first = [] if system is None else [{"role": "system", "content": system}]
    history = first
    pending = list(media or [])
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a stray byte must not end the chat
    note(HELP)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return 0
        if not line:
            continue
        if line.startswith("/") and not line.startswith("//"):
            command, _, argument = line.partition(" ")
            if command == "/exit":
                return 0
            if command == "/reset":
                history, pending = first, []
                note("the conversation begins anew")
            elif command in ("/image", "/video"):
                pending += _attach(engine, command[1:], argument.strip(), len(pending))
            else:
                note(f"error: unknown command {command}; {HELP}")
            continue
        message = user_message(line.removeprefix("/") if line.startswith("//") else line, pending)
        pending = []
        try:
            history = _turn(engine, [*history, message])
        except KimiError as error:
            note(f"error: {error}; the message and what was attached are withdrawn")
        except KeyboardInterrupt:
            note("interrupted before the answer began; the message is withdrawn")


def _attach(engine: Engine, kind: str, path: str, place: int) -> list[tuple[str, MediaBatch]]:
    # Read at once: the error stands next to the command, and later turns do not need the file.
    try:
        medium = engine.builder.read_media(kind, path, place)
    except KimiError as error:
        note(f"error: {error}; nothing was attached")
        return []
    note(f"attached {path}: {sum(m.tokens for m in medium.media)} tokens")
    return [(kind, medium)]


def _turn(engine: Engine, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with the model's answer to its last message. Raises `KimiError`."""
    result = engine.answer(engine.build(messages), Display(sys.stdout))
    report(result)
    messages = [*messages, result.message.to_message()]
    # A model may write what no conversation can hold (two tool calls of one id): refuse it now,
    # while there is a history to go back to.
    normalize_messages(messages)
    return messages
