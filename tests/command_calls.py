"""Calls of `kimi-ops generate`: a tiny checkpoint, and a model that writes what it is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kimi_ops.cli import main
from kimi_ops.model import KimiK25, conversation
from kimi_ops.model.chat_parser import Event
from kimi_ops.model.conversation import PromptBuilder
from kimi_ops.model.generate import Sampling
from kimi_ops.model.make_checkpoint import make_checkpoint, tiny_config
from kimi_ops.model.random_files import random_checkpoint_files

ROOT = Path(__file__).parents[1]
PICTURE, CLIP = (str(ROOT / "examples/media" / name) for name in ("picture.png", "clip.mp4"))
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new tiny checkpoint with a context of 1,024 tokens."""
    directory = tmp_path_factory.mktemp("generate")
    config = tiny_config(text={"max_position_embeddings": 1024})
    make_checkpoint(directory, config, tokenizer_files=random_checkpoint_files(config))
    return directory


def generate(tiny: Path, *argv: object) -> int:
    return main(["generate", "--model", str(tiny), "--max-new-tokens", "6", *map(str, argv)])


def as_json(capsys: pytest.CaptureFixture[str], tiny: Path, *argv: object) -> dict[str, Any]:
    capsys.readouterr()
    assert generate(tiny, "--json", *argv) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def error_of(capsys: pytest.CaptureFixture[str], tiny: Path, *argv: object) -> str:
    """The one error line of a refused request, which has printed nothing else but the notes."""
    capsys.readouterr()
    assert generate(tiny, *argv) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.endswith("so the text is noise")]
    assert out == ""
    assert len(lines) == 1
    assert lines[0].startswith("kimi-ops: error: ")
    return lines[0]


def speak(monkeypatch: pytest.MonkeyPatch, tiny: Path, texts: list[str]) -> list[list[int]]:
    """Makes the model write `texts`, one for each answer; returns the prompts it was given."""
    tokenizer = PromptBuilder(tiny).tokenizer
    answers = iter([[*tokenizer.encode(text), tokenizer.im_end_id] for text in texts])
    prompts: list[list[int]] = []
    original = KimiK25.generate
    current: list[Any] = []

    def generate_next(self: KimiK25, given: Any, **options: Any) -> Any:
        prompts.append(given[0])
        current[:] = [iter(next(answers))]
        return original(self, given, **options)

    monkeypatch.setattr(KimiK25, "generate", generate_next)
    monkeypatch.setattr(Sampling, "draw", lambda self, logits, generator: next(current[0]))
    return prompts


def interrupt_after(monkeypatch: pytest.MonkeyPatch, events: int) -> None:
    """Ctrl-C strikes while the given event of each answer is being shown."""
    original = conversation.ChatParser.feed
    counts: dict[int, int] = {}

    def feed(self: Any, text: str) -> list[Event]:
        counts[id(self)] = counts.get(id(self), 0) + 1
        if counts[id(self)] == events:
            raise KeyboardInterrupt
        return original(self, text)

    monkeypatch.setattr(conversation.ChatParser, "feed", feed)
