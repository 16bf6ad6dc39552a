"""`kimi-ops generate` on a tiny checkpoint: one answer.

What is printed is what the library gives for the same prompt: the prompt's ids are rebuilt here by
the tokenizer and the media rules, and greedy tokens come from `KimiK25.generate` itself. Every
option is used, and Ctrl-C keeps what there is. Errors are in `test_model_commands_errors`.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_calls import (
    CLIP,
    PICTURE,
    TOOLS,
    as_json,
    error_of,
    generate,
    interrupt_after,
    make_tiny,
    speak,
)

from kimi_ops.model import KimiK25, generate_command
from kimi_ops.model.chat_parser import Event, parse_output
from kimi_ops.model.conversation import PromptBuilder
from kimi_ops.model.generate import Sampling
from kimi_ops.model.generate_command import Display
from kimi_ops.model.make_checkpoint import make_checkpoint, tiny_config
from kimi_ops.model.random_files import has_random_weights, random_checkpoint_files

NOISE = "are random, so the text is noise\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a context of 1,024 tokens, not to be changed."""
    return make_tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def model(tiny: Path) -> KimiK25:
    return KimiK25.from_pretrained(tiny)


def expected(
    model: KimiK25, tiny: Path, messages: list[dict[str, Any]], **options: Any
) -> tuple[str, int]:
    """Greedy text of six tokens and the number of prompt tokens, from the library."""
    builder = PromptBuilder(tiny)
    prompt = builder.build(messages, **options)
    result = model.generate(
        [prompt.ids],
        pixel_values=prompt.media.pixel_values,
        grid_thws=prompt.media.grid_thws,
        max_new_tokens=6,
        sampling=Sampling(temperature=0),
        stop_ids=builder.tokenizer.stop_ids,
    )
    return builder.tokenizer.decode(result.tokens[0]), len(prompt.ids)


def test_json_is_the_library_s_greedy_answer(tiny, model, capsys):
    found = as_json(capsys, tiny, "--prompt", "Hi", "--instant", "--temperature", "0")
    text, prompt_tokens = expected(model, tiny, [{"role": "user", "content": "Hi"}], thinking=False)
    assert found["content"] == parse_output(text, thinking=False).content
    assert found["reasoning_content"] == ""
    assert found["usage"]["prompt_tokens"] == prompt_tokens
    assert set(found) == {
        "reasoning_content",
        "content",
        "tool_calls",
        "finish_reason",
        "usage",
        "timings",
        "errors",
        "malformed",
        "random_weights",
    }
    usage = found["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert found["finish_reason"] in ("stop", "length")
    assert found["tool_calls"] == found["malformed"] == []
    assert found["random_weights"] is True
    assert set(found["timings"]) == {
        "load_seconds",
        "prefill_seconds",
        "decode_seconds",
        "tokens_per_second",
    }


def test_thinking_is_default_and_system_and_tools_arrive(tiny, tmp_path, model, capsys):
    argv = ["--prompt", "Hi", "--temperature", "0", "--system", "Be brief."]
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    found = as_json(capsys, tiny, *argv, "--tools", tmp_path / "tools.json")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text, prompt_tokens = expected(model, tiny, messages, tools=TOOLS)
    parsed = parse_output(text)
    assert (found["reasoning_content"], found["content"]) == (
        parsed.reasoning_content,
        parsed.content,
    )
    assert found["usage"]["prompt_tokens"] == prompt_tokens
    assert found["errors"] == parsed.errors


def test_media_stand_before_the_prompt_in_the_order_given(tiny, monkeypatch, capsys):
    seen = []

    def record(self: PromptBuilder, messages: Any, **options: Any) -> Any:
        seen.append(messages)
        return build(self, messages, **options)

    build = PromptBuilder.build
    monkeypatch.setattr(PromptBuilder, "build", record)
    argv = ["--prompt", "Hi", "--image", PICTURE, "--video", CLIP, CLIP, "--image", PICTURE]
    found = as_json(capsys, tiny, *argv)
    (message,) = seen[0]
    kinds = [part["type"] for part in message["content"]]
    assert kinds == ["image", "video", "video", "image", "text"]
    assert message["content"][-1]["text"] == "Hi"
    # 24 x 36 patches of the picture, two chunks of 14 x 24 of the clip, four to a token.
    vision = 2 * (24 * 36 // 4) + 2 * 2 * (14 * 24 // 4)
    text_only = as_json(capsys, tiny, "--prompt", "Hi")
    assert found["usage"]["prompt_tokens"] > text_only["usage"]["prompt_tokens"] + vision


def test_patches_of_all_media_are_in_order(tiny):
    builder = PromptBuilder(tiny)
    media = [("video", CLIP), ("image", PICTURE)]
    prompt = builder.build([generate_command.user_message("Hi", media)])
    clip, picture = (builder.read_media(kind, source) for kind, source in media)
    assert prompt.media.grid_thws.tolist() == [*clip.grid_thws.tolist(), [1, 24, 36]]
    both = torch.cat([clip.pixel_values, picture.pixel_values])
    assert torch.equal(prompt.media.pixel_values, both)
    pads = prompt.ids.count(builder.tokenizer.media_pad_id)
    assert pads == sum(medium.tokens for medium in prompt.media.media)


def test_messages_file_with_a_data_url_equals_the_path(tiny, tmp_path, capsys):
    def conversation_with(url: str) -> Path:
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "Hi"},
        ]
        (tmp_path / "m.json").write_text(json.dumps([{"role": "user", "content": parts}]))
        return tmp_path / "m.json"

    argv = ["--temperature", "0", "--messages"]
    by_path = as_json(capsys, tiny, *argv, conversation_with(PICTURE))
    data = base64.b64encode(Path(PICTURE).read_bytes()).decode()
    by_data = as_json(capsys, tiny, *argv, conversation_with(f"data:image/png;base64,{data}"))
    assert by_data["reasoning_content"] == by_path["reasoning_content"]
    assert by_data["usage"] == by_path["usage"]
    bad = conversation_with("data:image/png;base64,%%%")
    assert "medium 0: a data URL" in error_of(capsys, tiny, "--messages", bad)


def test_sampling_repeats_by_seed_and_differs_between_seeds(tiny, capsys):
    argv = ["--prompt", "Hi", "--temperature", "1.5", "--top-p", "0.9", "--seed"]
    first, again, other = (
        as_json(capsys, tiny, *argv, seed)["reasoning_content"] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize(("flags", "temperature"), [([], 1.0), (["--instant"], 0.6)])
def test_published_sampling_is_the_default(tiny, capsys, monkeypatch, flags, temperature):
    seen = []
    original = KimiK25.generate

    def record(self: KimiK25, prompts: Any, **options: Any) -> Any:
        seen.append(options["sampling"])
        return original(self, prompts, **options)

    monkeypatch.setattr(KimiK25, "generate", record)
    as_json(capsys, tiny, "--prompt", "Hi", *flags)
    assert (seen[0].temperature, seen[0].top_p, seen[0].seed) == (temperature, 0.95, 0)


def test_text_goes_to_stdout_and_the_rest_to_stderr(tiny, capsys):
    argv = ["--prompt", "Hi", "--instant", "--temperature", "0"]
    found = as_json(capsys, tiny, *argv)
    assert generate(tiny, *argv) == 0
    out, err = capsys.readouterr()
    assert out == found["content"] + "\n"
    usage = found["usage"]
    assert NOISE in err
    assert f"{usage['prompt_tokens']} prompt tokens" in err
    assert f"{usage['completion_tokens']} new tokens" in err
    assert "tokens/s, finish reason: " + found["finish_reason"] in err
    assert generate(tiny, *argv, "--no-stream") == 0
    assert capsys.readouterr().out == out


def test_dtype_layers_and_the_notes_about_them(tiny, capsys):
    argv = ["--prompt", "Hi", "--dtype", "fp32", "--layers", "0-1", "--device", "cpu"]
    assert generate(tiny, *argv) == 0
    assert "only 2 of 3 decoder layers are loaded" in capsys.readouterr().err


def test_without_the_mark_nothing_is_said_about_noise(tiny, tmp_path, capsys):
    trained = Path(shutil.copytree(tiny, tmp_path / "trained"))
    (trained / "random_weights.txt").unlink()
    assert generate(trained, "--prompt", "Hi") == 0
    assert "noise" not in capsys.readouterr().err
    assert as_json(capsys, trained, "--prompt", "Hi")["random_weights"] is False


def test_preprocessor_config_of_the_checkpoint_is_used(tiny, tmp_path):
    changed = Path(shutil.copytree(tiny, tmp_path / "changed"))
    block = {"in_patch_limit": 64}
    (changed / "preprocessor_config.json").write_text(json.dumps({"media_proc_cfg": block}))
    assert PromptBuilder(changed).media.config.in_patch_limit == 64
    (changed / "preprocessor_config.json").unlink()
    assert PromptBuilder(changed).media.config.in_patch_limit == 16384


# Display


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


EVENTS = [
    Event("reasoning", "Let me\x1b[2J see"),
    Event("markup", "</think>"),
    Event("content", "So:\n"),
    Event("tool_call", "raw", tool_call={"id": "functions.look:0", "type": "function"}),
    Event("malformed", "<junk>", error="text between tool calls"),
]
CALL = '{"id": "functions.look:0", "type": "function"}'


@pytest.mark.parametrize(
    ("stream", "no_color", "reasoning"),
    [
        (Terminal, False, "\x1b[2mLet me␛[2J see\x1b[0m"),
        (Terminal, True, "Let me␛[2J see"),
        (io.StringIO, False, "Let me\x1b[2J see"),
    ],
    ids=["terminal", "no-color", "file"],
)
def test_display(monkeypatch, stream, no_color, reasoning):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    target = stream()
    display = Display(target)
    for event in EVENTS:
        display.show(event)
    display.end()
    assert target.getvalue() == f"{reasoning}\n\nSo:\n\n{CALL}\n<junk>\n"


def test_tool_calls_are_shown_and_reported(tiny, capsys, monkeypatch):
    """The model is replaced by one that writes a tool call and text where none belongs."""
    text = (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0"
        '<|tool_call_argument_begin|>{"at": "sky"}<|tool_call_end|>junk<|tool_calls_section_end|>'
    )
    speak(monkeypatch, tiny, [text, text])
    found = as_json(capsys, tiny, "--prompt", "Hi", "--instant", "--max-new-tokens", 500)
    (call,) = found["tool_calls"]
    assert call["function"] == {"name": "look", "arguments": '{"at": "sky"}'}
    assert found["finish_reason"] == "tool_calls"
    assert found["malformed"] == ["junk"]
    assert generate(tiny, "--prompt", "Hi", "--instant", "--max-new-tokens", 500) == 0
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[0]) == call
    assert out.splitlines()[1:] == ["junk"]
    assert "format of the answer: text between tool calls" in err
    assert "finish reason: tool_calls" in err


# Ctrl-C


def test_ctrl_c_keeps_what_was_written(tiny, model, capsys, monkeypatch):
    argv = ["--prompt", "Hi", "--instant", "--temperature", "0", "--json"]
    interrupt_after(monkeypatch, 3)
    assert generate(tiny, *argv) == 130
    found = json.loads(capsys.readouterr().out)
    assert found["finish_reason"] == "interrupted"
    # The third token was drawn, and Ctrl-C struck before it was shown: it is in the answer.
    assert found["usage"]["completion_tokens"] == 3
    builder = PromptBuilder(tiny)
    prompt = builder.build([{"role": "user", "content": "Hi"}], thinking=False)
    sampling = Sampling(temperature=0)
    greedy = model.generate([prompt.ids], max_new_tokens=3, sampling=sampling).tokens[0]
    assert found["content"] == builder.tokenizer.decode(greedy)


def test_ctrl_c_is_reported_on_the_terminal(tiny, capsys, monkeypatch):
    interrupt_after(monkeypatch, 2)
    assert generate(tiny, "--prompt", "Hi", "--temperature", "0") == 130
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert "finish reason: interrupted" in err


def test_trained_weights_take_the_mark_of_random_ones_away(tmp_path: Path) -> None:
    config = tiny_config()
    make_checkpoint(tmp_path / "c", config, tokenizer_files=random_checkpoint_files(config))
    assert has_random_weights(tmp_path / "c")
    trained = KimiK25.from_pretrained(tmp_path / "c")
    trained.source = None  # as a model that was not loaded but trained
    trained.save_pretrained(tmp_path / "c", overwrite=True)
    assert not has_random_weights(tmp_path / "c")
    assert (tmp_path / "c" / "tiktoken.model").is_file()
