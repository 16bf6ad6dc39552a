"""`generation_config.json` gives the defaults of generation, and a request goes before it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_calls import as_json, error_of, generate, make_tiny, speak

from kimi_ops.model import KimiK25, generate_command, kimi
from kimi_ops.model.commands import describe
from kimi_ops.model.conversation import PromptBuilder
from kimi_ops.model.errors import ConfigError, KimiError
from kimi_ops.model.generate import Sampling
from kimi_ops.model.generation_config import CONFIG_FILE, GenerationConfig

VOCAB = 1024


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, not to be changed."""
    return make_tiny(tmp_path_factory)


@pytest.fixture
def tiny(source: Path, tmp_path: Path) -> Path:
    """A copy without a generation config."""
    shutil.copytree(source, tmp_path / "c")
    (tmp_path / "c" / CONFIG_FILE).unlink()
    return tmp_path / "c"


def write(directory: Path, **content: Any) -> GenerationConfig:
    (directory / CONFIG_FILE).write_text(json.dumps(content))
    return GenerationConfig.from_file(directory, VOCAB)


def test_absent_file_leaves_every_default(tiny, monkeypatch):
    assert GenerationConfig.from_file(tiny, VOCAB) == GenerationConfig()
    model = KimiK25.from_pretrained(tiny)
    seen: dict[str, Any] = {}
    monkeypatch.setattr(kimi, "generate", lambda *args, **options: seen.update(options))
    model.generate([[5, 6, 7]])
    eos = model.config.eos_token_id
    assert (seen["sampling"], seen["max_new_tokens"]) == (Sampling(), [256])
    assert seen["stop_ids"] == {eos, eos + 1}
    given = GenerationConfig().sampling(Sampling(0.6, 0.95, 3))
    assert given == Sampling(0.6, 0.95, 3)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"do_sample": True}, Sampling(1.0, 1.0, 9)),
        ({"do_sample": True, "temperature": 0.7}, Sampling(0.7, 1.0, 9)),
        ({"temperature": 0.7, "top_p": 0.5}, Sampling(0.7, 0.5, 9)),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.5}, Sampling(0.0, 1.0, 9)),
        ({"temperature": 0}, Sampling(0.0, 1.0, 9)),
        ({"do_sample": None, "temperature": None}, Sampling(0.0, 1.0, 9)),
        ({}, Sampling(0.0, 1.0, 9)),
    ],
)
def test_sampling(tmp_path, content, expected):
    assert write(tmp_path, **content).sampling(Sampling(seed=9)) == expected


def test_limits(tmp_path):
    assert write(tmp_path).limits([3, 90], 7) == [7, 7]
    assert write(tmp_path, max_new_tokens=5).limits([3, 90], 7) == [5, 5]
    assert write(tmp_path, max_length=100).limits([3, 90], 7) == [97, 10]
    assert write(tmp_path, max_length=100, max_new_tokens=5).limits([3, 90], 7) == [5, 5]
    with pytest.raises(KimiError, match=r"prompt 1 has 100 tokens; max_length .* is 100: give"):
        write(tmp_path, max_length=100).limits([3, 100], 7)


def test_what_changes_nothing_is_accepted(tmp_path):
    found = write(
        tmp_path,
        eos_token_id=7,
        bos_token_id=1,
        pad_token_id=2,
        top_k=0,
        repetition_penalty=1.0,
        num_beams=1,
        min_p=None,
        suppress_tokens=[],
        use_cache=True,
        output_scores=False,
        _from_model_config=True,
        transformers_version="4.57.1",
    )
    assert found == GenerationConfig(stop_ids=(7,))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"eos_token_id": VOCAB}, "eos_token_id must be an id in 0 .. 1023 or a list"),
        ({"eos_token_id": [3, "4"]}, "eos_token_id must be an id .* got '4'"),
        ({"eos_token_id": True}, "eos_token_id must be"),
        ({"eos_token_id": 2.0}, "eos_token_id must be"),
        ({"do_sample": "yes"}, "do_sample must be true or false, got 'yes'"),
        ({"temperature": "1"}, "temperature must be a number, got '1'"),
        ({"temperature": -1}, "temperature must be at least 0"),
        ({"top_p": 2}, "top_p must be above 0 and at most 1, got 2"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, got 0"),
        ({"max_length": 1.5}, "max_length must be an integer of at least 1, got 1.5"),
        ({"top_k": 20}, "top_k must be 0 or null, got 20: it is not implemented; delete it"),
        ({"repetition_penalty": 1.1}, "repetition_penalty must be 1 or null"),
        ({"stop_strings": ["x"]}, "stop_strings must be"),
        ({"temprature": 1}, "unknown key temprature; delete or correct it"),
    ],
)
def test_wrong_content_names_file_and_key(tiny, capsys, content, message):
    with pytest.raises(ConfigError, match=f"{CONFIG_FILE}: {message}"):
        write(tiny, **content)
    for refused in (KimiK25.from_pretrained, PromptBuilder, lambda d: describe(str(d))):
        with pytest.raises(ConfigError, match=message):
            refused(tiny)


def test_what_is_no_json_object_is_refused(tiny, capsys):
    for content in (b"[1]", b"{", b"\xff", b'{"top_p": 1, "top_p": 1}'):
        (tiny / CONFIG_FILE).write_bytes(content)
        with pytest.raises(ConfigError, match=CONFIG_FILE):
            GenerationConfig.from_file(tiny, VOCAB)
    assert CONFIG_FILE in error_of(capsys, tiny, "--prompt", "x")


def test_generate_follows_it_unless_told_otherwise(tiny):
    write(tiny, do_sample=True, temperature=0.8, top_p=0.9, max_new_tokens=9, eos_token_id=[1, 2])
    model = KimiK25.from_pretrained(tiny)
    prompt = [[5, 6, 7], [8]]
    sampled = {"sampling": Sampling(0.8, 0.9), "stop_ids": [1, 2], "max_new_tokens": 9}
    result = model.generate(prompt)
    assert result.tokens == model.generate(prompt, **sampled).tokens
    stop = result.tokens[0][4]
    write(tiny, temperature=0.8, top_p=0.9, max_length=12, eos_token_id=stop)
    model = KimiK25.from_pretrained(tiny)
    first, second = model.generate(prompt).tokens
    assert first == result.tokens[0][: result.tokens[0].index(stop)]
    assert len(second) <= 11
    told = model.generate(prompt, sampling=Sampling(), max_new_tokens=3, stop_ids=[])
    assert [len(tokens) for tokens in told.tokens] == [3, 3]
    with pytest.raises(KimiError, match="max_length"):
        model.generate([[1] * 12])


def test_command_line_goes_before_it(tiny, capsys, monkeypatch):
    seen: list[Any] = []
    answer = generate_command.answer

    def spy(*args: Any, **options: Any) -> Any:
        seen.append((options["sampling"], options["max_new_tokens"]))
        return answer(*args, **options | {"max_new_tokens": 2})

    monkeypatch.setattr(generate_command, "answer", spy)
    write(tiny, temperature=0.3, top_p=0.4, max_new_tokens=4)
    for argv, sampling in (
        ([], Sampling(0.3, 0.4)),
        (["--temperature", "0.9"], Sampling(0.9, 0.4)),
        (["--top-p", "1", "--seed", "4"], Sampling(0.3, 1.0, 4)),
        # The file's temperature is that of the thinking mode.
        (["--instant"], Sampling(0.6, 0.4)),
    ):
        assert generate(tiny, "--prompt", "Hi", *argv) == 0
        assert seen.pop() == (sampling, 6)
    write(tiny, do_sample=False)
    assert generate(tiny, "--prompt", "Hi", "--instant") == 0
    assert seen.pop()[0].temperature == 0


def test_its_stop_ids_join_those_of_the_turn(tiny, capsys, monkeypatch):
    tokenizer = PromptBuilder(tiny).tokenizer
    (stop,) = tokenizer.encode("!")
    write(tiny, eos_token_id=stop)
    speak(monkeypatch, tiny, ["</think>ab! not this", "</think>ab"])
    for _ in range(2):
        found = as_json(capsys, tiny, "--prompt", "Hi", "--max-new-tokens", "40")
        assert (found["content"], found["finish_reason"]) == ("ab", "stop")
