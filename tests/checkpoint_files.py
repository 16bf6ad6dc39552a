"""What the checkpoint tests share: a small checkpoint, and an independent reader of its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

from kimi_ops.model.config import KimiK25Config
from kimi_ops.model.make_checkpoint import make_checkpoint, tiny_config

LAYER = "language_model.model.layers"
INDEX = "model.safetensors.index.json"


def small_config() -> KimiK25Config:
    """One dense and two MoE layers with six experts and a shared expert of double width."""
    return tiny_config(text={"n_routed_experts": 6, "n_shared_experts": 2})


def make_small(directory: Path) -> Path:
    """Writes the checkpoint of `small_config` with seed 3 to `directory`."""
    files = {"tiktoken.model": b"IQ== 0\n"}
    make_checkpoint(directory, small_config(), seed=3, tokenizer_files=files)
    return directory


def copy_files(source: Path, directory: Path) -> Path:
    """Copies a checkpoint to a new `directory`, to be broken there."""
    directory.mkdir()
    for file in source.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by the independent library."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(file)
    return tensors


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits, NaNs included."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Applies `change` to the tensors of one shard."""
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)


def shard_of(directory: Path, name: str) -> Path:
    """The shard in which the index lists a tensor."""
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][name]
