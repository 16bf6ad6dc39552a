"""A checkpoint is written completely or not at all, and only over what was asked for."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import (
    INDEX,
    copy_files,
    make_small,
    read_all,
    same_bytes,
    small_config,
)

from kimi_ops.model.checkpoint import load_parameters, open_checkpoint, save_checkpoint
from kimi_ops.model.config import KimiK25Config
from kimi_ops.model.errors import CheckpointError
from kimi_ops.model.make_checkpoint import make_checkpoint


@pytest.fixture(scope="module")
def tiny() -> KimiK25Config:
    return small_config()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that no test changes."""
    return make_small(tmp_path_factory.mktemp("made") / "tiny")


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """A checkpoint to break."""
    return copy_files(made, tmp_path / "copy")


@pytest.fixture
def parameters(made: Path) -> dict[str, torch.Tensor]:
    return load_parameters(open_checkpoint(made), dtype=torch.bfloat16)


def _digest(directory: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()
    }


def test_save_refuses_a_used_directory(
    tiny: KimiK25Config, parameters: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="not empty"):
        save_checkpoint(tmp_path, tiny, parameters)
    with pytest.raises(CheckpointError, match="is a file"):
        save_checkpoint(tmp_path / "thesis.txt", tiny, parameters)
    save_checkpoint(tmp_path, tiny, parameters, max_shard_bytes=10_000, overwrite=True)
    assert len(list(tmp_path.glob("*.safetensors"))) > 50
    save_checkpoint(tmp_path, tiny, parameters, overwrite=True)
    # The earlier shards are gone with their index; what was not ours is still there.
    assert len(list(tmp_path.glob("*.safetensors"))) == 6
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    open_checkpoint(tmp_path)


class _Interrupted(dict[str, torch.Tensor]):
    """Parameters that stop the write at the last shard."""

    def __init__(self, values: dict[str, torch.Tensor], error: BaseException) -> None:
        super().__init__(values)
        self.error = error

    def __getitem__(self, name: str) -> torch.Tensor:
        if name == "vision.final_layernorm_bias" and sys._getframe(1).f_code.co_name == "produce":
            raise self.error
        return super().__getitem__(name)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted_save_leaves_nothing(
    tiny: KimiK25Config,
    parameters: dict[str, torch.Tensor],
    tmp_path: Path,
    copied: Path,
    error: BaseException,
) -> None:
    stopping = _Interrupted(parameters, error)
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        save_checkpoint(tmp_path / "new", tiny, stopping)
    assert not (tmp_path / "new").exists()
    before = _digest(copied)
    with pytest.raises(expected):
        save_checkpoint(copied, tiny, stopping, overwrite=True)
    assert _digest(copied) == before


def test_save_checks_the_parameters(
    tiny: KimiK25Config, parameters: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    name = "language.layers.1.attn.q_b"
    shape = list(parameters[name].shape)
    for change, message in (
        ({name: parameters[name][1:]}, rf"{name} must be \[{shape[0]}, 64\].*got \[{shape[0] - 1}"),
        ({name: parameters[name].float()}, rf"{name} must be .*bfloat16, got .*float32"),
        ({"vision.extra": torch.ones(1)}, "parameter vision.extra is not one of this config"),
        ({"language.embed_tokens": torch.ones(1024, 128).int()}, "must be bf16, fp16 or fp32"),
    ):
        with pytest.raises(CheckpointError, match=message):
            save_checkpoint(tmp_path / "x", tiny, parameters | change)
    missing = {key: value for key, value in parameters.items() if key != name}
    with pytest.raises(CheckpointError, match=f"parameter {name} is missing"):
        save_checkpoint(tmp_path / "x", tiny, missing)
    with pytest.raises(CheckpointError, match=r"language\.embed_tokens is missing"):
        save_checkpoint(tmp_path / "x", tiny, {})
    assert not (tmp_path / "x").exists()


def test_saving_does_not_need_contiguous_parameters(
    tiny: KimiK25Config, parameters: dict[str, torch.Tensor], made: Path, tmp_path: Path
) -> None:
    strided = {name: torch.stack([p, p], dim=-1)[..., 0] for name, p in parameters.items()}
    save_checkpoint(tmp_path, tiny, strided)
    saved, stored = read_all(tmp_path), read_all(made)
    assert all(same_bytes(saved[name], stored[name]) for name in stored)


@pytest.mark.parametrize(
    "name", ["config.json", INDEX, "x.safetensors", "../x", "a/b", "/x", "", ".", ".hidden", "a\\b"]
)
def test_extra_files_stay_in_their_place(tiny: KimiK25Config, tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="extra_files: a name must be plain"):
        make_checkpoint(tmp_path / "x", tiny, tokenizer_files={name: b""})
    assert not (tmp_path / "x").exists()
