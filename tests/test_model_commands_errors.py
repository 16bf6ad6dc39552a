"""What `kimi-ops generate` refuses: one line on stderr that says why, exit code 2, no traceback.

Files that are absent, broken, of the wrong form or too long; settings out of range; checkpoints
that contradict themselves; text that no encoding has.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_calls import (
    CLIP,
    PICTURE,
    ROOT,
    TOOLS,
    as_json,
    error_of,
    generate,
    make_tiny,
)

from kimi_ops.model import KimiK25
from kimi_ops.model.conversation import PromptBuilder
from kimi_ops.model.errors import KimiError, MediaError
from kimi_ops.model.make_checkpoint import tiny_config
from kimi_ops.model.random_files import random_checkpoint_files


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a context of 1,024 tokens, not to be changed."""
    return make_tiny(tmp_path_factory)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with inputs of all kinds of badness."""
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "broken.json").write_text('[{"role": "user"')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "huge-number.json").write_text("[" + "9" * 5000 + "]")
    (tmp_path / "role.json").write_text('[{"role": "robot", "content": "Hi"}]')
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "latin.json").write_bytes(b'["\xe9"]')
    (tmp_path / "broken.png").write_bytes(Path(PICTURE).read_bytes()[:2000])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "broken.mp4").write_bytes(Path(CLIP).read_bytes()[:300])
    (tmp_path / "long.txt").write_text("word " * 3000)
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "expected_text"),
    [
        (["--prompt", "x", "--image", "F/none.png"], "none.png': no such file"),
        (["--prompt", "x", "--image", PICTURE, "F/broken.png"], "medium 1: picture"),
        (["--prompt", "x", "--image", "F/empty.png"], "empty"),
        (["--prompt", "x", "--video", "F/broken.mp4"], "medium 0: clip"),
        (["--prompt", "x", "--image", "F"], "not a regular file"),
        (["--prompt", "x", "--tools", "F/none.json"], "none.json': cannot be read: No such file"),
        (["--prompt", "x", "--tools", "F/broken.json"], "broken.json: not JSON"),
        (["--prompt", "x", "--tools", "F/object.json"], "must be a list of tools, got dict"),
        (["--prompt", "x", "--tools", "F/role.json"], "role.json[0] must be"),
        (["--messages", "F/none.json"], "No such file"),
        (["--messages", "F"], "cannot be read"),
        (["--messages", "null\0byte"], "cannot be read"),
        (["--messages", "F/broken.json"], "not JSON"),
        (["--messages", "F/deep.json"], "nested too deeply"),
        (["--messages", "F/huge-number.json"], "not JSON"),
        (["--messages", "F/latin.json"], "not UTF-8 text"),
        (["--messages", "F/object.json"], "expected a list of messages, got dict"),
        (["--messages", "F/empty.json"], "messages is empty"),
        (["--messages", "F/role.json"], "messages[0].role must be one of"),
        (
            ["--prompt", "x", "--max-new-tokens", "0"],
            "max_new_tokens must be an integer of at least 1, got 0",
        ),
        (["--prompt", "x", "--temperature", "-1"], "temperature must be at least 0"),
        (["--prompt", "x", "--temperature", "nan"], "temperature must be at least 0"),
        (["--prompt", "x", "--top-p", "0"], "top_p must be above 0"),
        (["--prompt", "x", "--seed", "-1"], "seed must be from 0"),
        (["--prompt", "x", "--layers", "0-3"], "inside 0-2"),
        (["--prompt", "x", "--layers", "first"], "layers must look like"),
        (["--prompt", "x", "--device", "tpu"], "device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["--prompt", "x", "--device", "cpu:1"], "device must be"),
        (["--prompt", "x", "--device", f"cuda:{'9' * 5000}"], "device must be"),
        (["--prompt", "x", "--device", "cuda:9999"], "torch sees"),
        (["--interactive", "--image", "F/broken.png"], "medium 0: picture"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_errors(tiny, files, capsys, argv, expected_text):
    argv = [word.replace("F/", f"{files}/") if word != "F" else files for word in argv]
    assert expected_text in error_of(capsys, tiny, *argv)


def test_prompt_over_the_context_is_refused_before_the_weights_are_read(
    tiny, files, capsys, monkeypatch
):
    def unexpected(*args: Any, **options: Any) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(KimiK25, "from_pretrained", unexpected)
    text = (files / "long.txt").read_text()
    message = error_of(capsys, tiny, "--prompt", text)
    assert "the context limit is 1024" in message
    many = ["--image", *[PICTURE] * 6]
    message = error_of(capsys, tiny, "--prompt", "x", *many)
    assert f"{6 * 216} of them for pictures and clips" in message


def test_errors_of_the_checkpoint(tiny, tmp_path, capsys):
    assert "not a directory" in error_of(capsys, tmp_path / "none", "--prompt", "x")
    assert "config.json is missing" in error_of(capsys, tmp_path, "--prompt", "x")
    damaged = Path(shutil.copytree(tiny, tmp_path / "damaged"))
    (damaged / "model-00002-of-00006.safetensors").write_bytes(b"")
    assert "model-00002-of-00006" in error_of(capsys, damaged, "--prompt", "x")
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert "llama" in error_of(capsys, damaged, "--prompt", "x")


@pytest.mark.parametrize(
    ("argv", "expected_text"),
    [
        ([], "one of the arguments --prompt --messages --interactive is required"),
        (["--prompt", "x", "--messages", "y"], "not allowed with"),
        (["--messages", "y", "--image", "z"], "belong into the file of --messages"),
        (["--messages", "y", "--system", "z"], "belong into the file of --messages"),
        (["--interactive", "--json"], "--json is not for --interactive"),
        (["--prompt", "x", "--dtype", "int4"], "invalid choice"),
        (["--prompt", "x", "--max-new-tokens", "many"], "invalid int value"),
        (["--prompt", "x", "--image"], "expected at least one argument"),
    ],
)
def test_usage_errors(tiny, capsys, argv, expected_text):
    with pytest.raises(SystemExit) as stopped:
        generate(tiny, *argv)
    assert stopped.value.code == 2
    assert expected_text in capsys.readouterr().err


def test_text_that_no_encoding_has(tiny, files, capsys):
    """Lone surrogates, from undecodable arguments or JSON escapes, reach the model as U+FFFD."""
    plain = as_json(capsys, tiny, "--prompt", "a\ufffdb", "--temperature", "0")
    assert (
        as_json(capsys, tiny, "--prompt", "a\udc80b", "--temperature", "0")["usage"]
        == (plain["usage"])
    )
    (files / "m.json").write_text('[{"role": "user", "content": "a\\ud800b"}]')
    assert (
        as_json(capsys, tiny, "--messages", files / "m.json")["usage"]["prompt_tokens"]
        == (plain["usage"]["prompt_tokens"])
    )


def test_output_that_the_terminal_s_encoding_lacks(tiny):
    """Random weights write any character; an ASCII stream must take the whole answer."""
    command = [sys.executable, "-m", "kimi_ops.cli", "generate", "--model", str(tiny)]
    command += ["--prompt", "Hi", "--max-new-tokens", "20"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, env=env)
    assert result.returncode == 0, result.stderr
    assert b"\\u" in result.stdout


def test_read_media_names_its_place_and_takes_bytes(tiny):
    builder = PromptBuilder(tiny)
    with pytest.raises(MediaError, match=r"^medium 4: picture"):
        builder.read_media("image", "nowhere.png", 4)
    batch = builder.read_media("image", Path(PICTURE).read_bytes())
    assert batch.grid_thws.tolist() == [[1, 24, 36]]


def test_nan_logits_end_the_line_and_are_an_error(tiny, capsys, monkeypatch):
    from kimi_ops.model.language import LanguageModel

    monkeypatch.setattr(
        LanguageModel, "logits", lambda self, hidden: hidden.new_full((len(hidden), 8), torch.nan)
    )
    assert generate(tiny, "--prompt", "Hi") == 2
    out, err = capsys.readouterr()
    assert out == "\n"
    assert err.endswith("best logit is nan: the weights or the input are damaged\n")


def test_random_files_need_the_released_order_of_ids():
    with pytest.raises(KimiError, match=r"eos_token_id must be 769, .* got 5"):
        random_checkpoint_files(tiny_config(eos_token_id=5))
    with pytest.raises(KimiError, match="at least 512"):
        random_checkpoint_files(
            tiny_config(
                text={"vocab_size": 300},
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=3,
                media_placeholder_token_id=4,
            )
        )
