"""`kimi-ops generate --interactive`: the chat keeps its history right, whatever happens in a turn.

The prompt of each turn must be the one of the conversation so far, as the test writes it down; a
turn that fails leaves no trace in the next.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_calls import (
    PICTURE,
    ROOT,
    generate,
    interrupt_after,
    make_tiny,
    speak,
)

from kimi_ops.model import KimiK25, generate_command
from kimi_ops.model.conversation import PromptBuilder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a context of 1,024 tokens, not to be changed."""
    return make_tiny(tmp_path_factory)


def chat(
    monkeypatch: pytest.MonkeyPatch, tiny: Path, lines: list[str], *argv: object
) -> tuple[int, int]:
    """Runs a chat on the given lines; returns its exit code and the lines it left unread."""
    stdin = io.StringIO("".join(f"{line}\n" for line in lines))
    monkeypatch.setattr(sys, "stdin", stdin)
    code = generate(tiny, "--interactive", "--instant", *argv)
    return code, len(stdin.read().splitlines())


def test_chat_remembers_and_resets(tiny, capsys, monkeypatch):
    prompts = speak(monkeypatch, tiny, ["one", "two", "three", "four"])
    lines = ["first", "", "second", "/reset", "//third", f"/image {PICTURE}", "fourth", "/exit"]
    assert chat(monkeypatch, tiny, [*lines, "never read"], "--system", "Be.") == (0, 1)
    out, err = capsys.readouterr()
    assert out.splitlines() == ["one", "two", "three", "four"]
    assert "attached" in err
    assert "216 tokens" in err
    builder = PromptBuilder(tiny)
    history = [{"role": "system", "content": "Be."}, {"role": "user", "content": "first"}]
    assert prompts[0] == builder.build(history, thinking=False).ids
    history += [{"role": "assistant", "content": "one"}, {"role": "user", "content": "second"}]
    assert prompts[1] == builder.build(history, thinking=False).ids
    history = [{"role": "system", "content": "Be."}, {"role": "user", "content": "/third"}]
    assert prompts[2] == builder.build(history, thinking=False).ids
    history += [
        {"role": "assistant", "content": "three"},
        generate_command.user_message("fourth", [("image", PICTURE)]),
    ]
    assert prompts[3] == builder.build(history, thinking=False).ids


def test_chat_goes_on_after_bad_turns(tiny, tmp_path, capsys, monkeypatch):
    (tmp_path / "broken.png").write_bytes(Path(PICTURE).read_bytes()[:2000])
    doubled = "".join(
        "<|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
        for _ in range(2)
    )
    doubled = f"<|tool_calls_section_begin|>{doubled}<|tool_calls_section_end|>"
    prompts = speak(monkeypatch, tiny, ["one", doubled, "three"])
    lines = [
        "first",
        f"/image {tmp_path / 'broken.png'}",
        "/video",
        "/dance",
        "word " * 3000,
        "call twice",
        "last",
    ]
    assert chat(monkeypatch, tiny, lines, "--max-new-tokens", 300) == (0, 0)
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("kimi-ops: error: ")]
    for line, part in zip(
        errors,
        ("broken.png", "nothing was attached", "unknown command /dance", "context limit", ".id"),
        strict=True,
    ):
        assert part in line
    history = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "last"},
    ]
    assert prompts[-1] == PromptBuilder(tiny).build(history, thinking=False).ids


def test_chat_does_not_need_a_picture_s_file_again(tiny, tmp_path, capsys, monkeypatch):
    picture = Path(shutil.copy(PICTURE, tmp_path / "mine.png"))
    prompts = speak(monkeypatch, tiny, ["one", "two"])
    original = KimiK25.generate

    def generate_and_delete(self: KimiK25, *args: Any, **options: Any) -> Any:
        picture.unlink(missing_ok=True)
        return original(self, *args, **options)

    monkeypatch.setattr(KimiK25, "generate", generate_and_delete)
    assert chat(monkeypatch, tiny, ["look", "again"], "--image", picture) == (0, 0)
    pad = PromptBuilder(tiny).tokenizer.media_pad_id
    assert [prompt.count(pad) for prompt in prompts] == [216, 216]


def test_ctrl_c_in_a_chat_ends_the_answer_only(tiny, capsys, monkeypatch):
    prompts = speak(monkeypatch, tiny, ["one two three four", "five six seven"])
    interrupt_after(monkeypatch, 2)
    assert chat(monkeypatch, tiny, ["first", "second"]) == (0, 0)
    err = capsys.readouterr().err
    assert err.count("finish reason: interrupted") == 2
    builder = PromptBuilder(tiny)
    kept = builder.tokenizer.decode(builder.tokenizer.encode("one two three four")[:2])
    history = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": kept},
        {"role": "user", "content": "second"},
    ]
    assert prompts[1] == builder.build(history, thinking=False).ids


def test_ctrl_c_before_the_answer_withdraws_the_message(tiny, capsys, monkeypatch):
    calls = []

    def first_interrupted(self: PromptBuilder, messages: Any, **options: Any) -> Any:
        calls.append([message["content"] for message in messages])
        if len(calls) == 1:
            raise KeyboardInterrupt
        return build(self, messages, **options)

    build = PromptBuilder.build
    monkeypatch.setattr(PromptBuilder, "build", first_interrupted)
    assert chat(monkeypatch, tiny, ["first", "second"]) == (0, 0)
    assert calls == [["first"], ["second"]]
    assert "the message is withdrawn" in capsys.readouterr().err


def test_ctrl_c_at_the_prompt_leaves_with_130(tiny, capsys, monkeypatch):
    def interrupted(text: str = "") -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert generate(tiny, "--interactive") == 130


def test_chat_takes_bytes_that_are_not_text(tiny):
    command = [sys.executable, "-m", "kimi_ops.cli", "generate", "--model", str(tiny)]
    command += ["--interactive", "--instant", "--max-new-tokens", "2"]
    result = subprocess.run(
        command, cwd=ROOT, input=b"caf\xe9 \xff\n/exit\n", capture_output=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert b"2 new tokens" in result.stderr or b"finish reason: stop" in result.stderr
