"""`kimi-ops inspect` and `make-checkpoint`.

Published figures of Kimi K2.5 (tensors, bytes, cache bytes per token) come out of `inspect`; made
checkpoints are complete and open again; what is refused leaves nothing behind.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_calls import error_of, usage_error_of

from kimi_ops.cli import main
from kimi_ops.model import commands
from kimi_ops.model.checkpoint import open_checkpoint
from kimi_ops.model.config import KimiK25Config
from kimi_ops.model.conversation import PromptBuilder
from kimi_ops.model.make_checkpoint import tiny_config
from kimi_ops.model.random_files import has_random_weights, random_checkpoint_files

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, not to be changed."""
    directory = tmp_path_factory.mktemp("cli") / "tiny"
    assert main(["make-checkpoint", str(directory)]) == 0
    return directory


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_inspect_of_the_released_config_gives_the_published_figures(capsys):
    assert main(["inspect", "kimi-k2.5", "--config-only"]) == 0
    text = capsys.readouterr().out
    for figure in ("208,550", "595,148,192,736", "70,272", "262,144", "163,840", "int4 group 32"):
        assert figure in text
    assert main(["inspect", "kimi-k2.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tensors"], found["tensor_bytes"]) == (208_550, 595_148_192_736)
    assert (found["layers"], found["moe_layers"], found["experts"]) == (61, 60, 384)
    # 60 layers x 384 experts x 3 matrices of 7168 x 2048.
    assert found["parameters"]["routed_experts"] == 60 * 384 * 3 * 7168 * 2048


def test_inspect_of_a_part_of_the_released_config(capsys):
    assert main(["inspect", "kimi-k2.5", "--json", "--layers", "1"]) == 0
    part = json.loads(capsys.readouterr().out)
    assert main(["inspect", "kimi-k2.5", "--json", "--layers", "1-2"]) == 0
    two = json.loads(capsys.readouterr().out)
    # Per MoE layer: 384 experts of 3 matrices of 3 tensors, 3 of the shared expert, router weight
    # and bias, 7 of attention, 2 norms.
    assert two["tensors"] - part["tensors"] == 384 * 3 * 3 + 3 + 2 + 7 + 2


def test_inspect_describes_a_checkpoint(tiny, capsys):
    assert main(["inspect", str(tiny), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    shards = list(tiny.glob("*.safetensors"))
    assert found["shards"] == len(shards)
    assert found["shard_bytes"] == sum(shard.stat().st_size for shard in shards)
    index = json.loads((tiny / "model.safetensors.index.json").read_text())
    assert found["tensors"] == len(index["weight_map"])
    assert found["tensor_bytes"] == index["metadata"]["total_size"]
    names = ("tokenizer", "chat_template", "preprocessor", "generation_config")
    assert found["files"] == dict.fromkeys(names, True)
    assert found["random_weights"] is True
    assert found["checked_layers"] == [0, 2]
    text = tiny_config().text_config
    # Latent and rope part of a token in each layer, two bytes each.
    per_token = (text.kv_lora_rank + text.qk_rope_head_dim) * text.num_hidden_layers * 2
    assert found["cache_bytes_per_token"] == per_token
    assert main(["inspect", str(tiny)]) == 0
    assert f"{found['parameters']['total']:,}" in capsys.readouterr().out
    assert main(["inspect", str(tiny / "config.json"), "--config-only", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == found["tensors"]


def test_inspect_tells_which_files_are_absent(copy, capsys):
    for name in ("tiktoken.model", "chat_template.jinja", "preprocessor_config.json"):
        (copy / name).unlink()
    (copy / "generation_config.json").unlink()
    (copy / "random_weights.txt").unlink()
    assert main(["inspect", str(copy), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = ("tokenizer", "chat_template", "preprocessor", "generation_config")
    assert found["files"] == dict.fromkeys(names, False)
    assert found["random_weights"] is False


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", "{", "config.json: not valid JSON"),
        ("config.json", None, "config.json is missing"),
        ("tiktoken.model", "no ranks", "tiktoken.model"),
        ("chat_template.jinja", "{% nonsense %}", "template"),
        ("preprocessor_config.json", '{"media_proc_cfg": {"patch_size": 0}}', "patch_size"),
        ("model-00001-of-00006.safetensors", "short", "model-00001-of-00006.safetensors"),
        ("model.safetensors.index.json", "[]", "index.json"),
    ],
)
def test_inspect_validates_every_file(copy, capsys, name, content, expected):
    if content is None:
        (copy / name).unlink()
    else:
        (copy / name).write_text(content)
    assert expected in error_of(capsys, "inspect", copy)


def test_inspect_refuses_what_is_no_checkpoint_of_this_model(copy, capsys):
    assert "not a directory" in error_of(capsys, "inspect", copy / "nowhere")
    assert "layers must" in error_of(capsys, "inspect", copy, "--layers", "0-9")
    assert "layers must" in error_of(capsys, "inspect", copy, "--layers", "all")
    edit_config(copy, model_type="llama")
    assert "llama" in error_of(capsys, "inspect", copy)
    assert "llama" in error_of(capsys, "inspect", copy, "--config-only")


def test_tokenizer_and_config_of_two_sizes_contradict_each_other(copy, capsys):
    for name, content in random_checkpoint_files(tiny_config(text={"vocab_size": 600})).items():
        if name.startswith("tok") or name.startswith("tik"):
            (copy / name).write_bytes(content)
    message = error_of(capsys, "inspect", copy)
    assert "600" in message
    assert "1024" in message


def test_placeholder_id_of_tokenizer_and_config_must_agree(copy, capsys):
    edit_config(copy, media_placeholder_token_id=5)
    message = error_of(capsys, "inspect", copy)
    # The 22nd of the 256 control tokens at the end of 1,024 ids.
    assert f"id {1024 - 256 + 21}" in message
    assert "is 5" in message


# make-checkpoint


def test_made_checkpoint_is_complete_and_marked(tiny):
    config = KimiK25Config.from_file(tiny)
    assert config.text_config.num_hidden_layers == 3
    builder = PromptBuilder(tiny)
    assert builder.random_weights
    generation = json.loads((tiny / "generation_config.json").read_text())
    assert generation["eos_token_id"] == list(builder.tokenizer.stop_ids)
    assert (generation["temperature"], generation["top_p"]) == (1.0, 0.95)


def test_make_checkpoint_options(tmp_path, capsys):
    directory = tmp_path / "new" / "folder"
    argv = ["make-checkpoint", str(directory), "--dtype", "fp32", "--seed", "7"]
    assert main([*argv, "--num-hidden-layers", "2", "--layers", "1"]) == 0
    out = capsys.readouterr().out
    assert "decoder layers 1-1 of 2" in out
    assert "seed 7 (fp32)" in out
    made = open_checkpoint(directory, layers=range(1, 2))
    assert made.dtype == torch.float32
    assert made.config.text_config.num_hidden_layers == 2
    assert f"{len(made.tensors):,} tensors, {made.nbytes:,} bytes" in out
    assert main(["inspect", str(directory), "--layers", "1"]) == 0
    assert "missing" in error_of(capsys, "inspect", directory)
    assert "not empty" in error_of(capsys, *argv)
    assert main([*argv, "--overwrite"]) == 0
    assert open_checkpoint(directory).config.text_config.num_hidden_layers == 3


def test_make_checkpoint_from_a_config_file_and_by_seed(tiny, tmp_path, capsys):
    argv = ["--config", str(tiny / "config.json")]
    for name, seed in (("a", "0"), ("b", "1")):
        assert main(["make-checkpoint", str(tmp_path / name), *argv, "--seed", seed]) == 0
    shard = "model-00001-of-00006.safetensors"
    same, other = (tmp_path / "a" / shard).read_bytes(), (tmp_path / "b" / shard).read_bytes()
    assert same == (tiny / shard).read_bytes()
    assert same != other


def test_full_size_is_refused_where_the_disk_is_too_small(tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(commands.shutil, "disk_usage", lambda path: usage)
    target = tmp_path / "full"
    message = error_of(capsys, "make-checkpoint", target, "--size", "kimi-k2.5")
    assert f"{595_148_192_736 + commands.DISK_SLACK_BYTES:,}" in message
    assert "1,000,000,000 free" in message
    assert not target.exists()
    # One dense and one MoE layer: attention, MLPs and norms of both, router and 384 int4 experts,
    # embedding and head, vision tower and projector, from the published shapes.
    d, f, e = 7168, 2048, 384
    attention = 1536 * d + 1536 + 64 * 192 * 1536 + 576 * d + 512 + 64 * 256 * 512 + d * 64 * 128
    floats = 2 * (attention + 2 * d) + 3 * d * 18432 + 3 * d * f + e * d + d + 2 * 163_840 * d
    floats += 416_866_032 + 54_277_888
    experts = e * 3 * (d * f // 2 + d * f // 32 * 2 + 8)
    size = 2 * floats + 4 * e + experts + commands.DISK_SLACK_BYTES
    argv = ("make-checkpoint", target, "--size", "kimi-k2.5", "--num-hidden-layers", "2")
    assert f"needs {size:,} bytes" in error_of(capsys, *argv)


def test_make_checkpoint_refuses_and_leaves_nothing(tmp_path, tiny, capsys):
    target = tmp_path / "target"
    make = ("make-checkpoint", target)
    assert "num_hidden_layers" in error_of(capsys, *make, "--num-hidden-layers", "0")
    assert "layers must" in error_of(capsys, *make, "--layers", "5")
    assert "seed" in error_of(capsys, *make, "--seed", "-1")
    assert "cannot be read" in error_of(capsys, *make, "--config", tmp_path / "none.json")
    assert "is a file" in error_of(capsys, "make-checkpoint", tiny / "config.json")
    small = json.loads((tiny / "config.json").read_text())
    small["media_placeholder_token_id"] = 3
    (tmp_path / "other.json").write_text(json.dumps(small))
    message = error_of(capsys, *make, "--config", tmp_path / "other.json")
    assert "media_placeholder_token_id must be 789" in message
    assert "invalid choice" in usage_error_of(capsys, *make, "--dtype", "int8")
    assert "invalid choice" in usage_error_of(capsys, *make, "--size", "huge")
    assert "not allowed with" in usage_error_of(capsys, *make, "--size", "tiny", "--config", "x")
    assert not target.exists()


def test_files_of_a_full_size_checkpoint_have_the_released_ids():
    files = random_checkpoint_files(KimiK25Config.full_size())
    generation = json.loads(files["generation_config.json"])
    assert generation["eos_token_id"] == [163_585, 163_586]
    tokens = json.loads(files["tokenizer_config.json"])["added_tokens_decoder"]
    assert tokens["163605"]["content"] == "<|media_pad|>"


def test_mark_of_random_weights_is_the_file_alone(copy):
    assert has_random_weights(copy)
    (copy / "random_weights.txt").unlink()
    assert not has_random_weights(copy)
