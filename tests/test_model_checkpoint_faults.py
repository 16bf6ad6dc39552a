"""Every fault of a checkpoint is found before a weight is read, and named with tensor and file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoint_files import (
    INDEX,
    LAYER,
    copy_files,
    make_small,
    rewrite,
    shard_of,
)

from kimi_ops.model.checkpoint import load_parameters, open_checkpoint
from kimi_ops.model.errors import CheckpointError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that no test changes."""
    return make_small(tmp_path_factory.mktemp("made") / "tiny")


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """A checkpoint to break."""
    return copy_files(made, tmp_path / "copy")


NORM = f"{LAYER}.1.input_layernorm.weight"
PACKED = f"{LAYER}.1.mlp.experts.0.up_proj.weight_packed"


def _change_tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    def break_it(directory: Path) -> None:
        rewrite(shard_of(directory, name), lambda t: t.update({name: make(t[name]).contiguous()}))

    return break_it


def _change_index(change: Callable[[dict[str, Any]], None]) -> Callable[..., None]:
    def break_it(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        change(index)
        (directory / INDEX).write_text(json.dumps(index))

    return break_it


def _drop(name: str, from_index: bool) -> Callable[..., None]:
    def break_it(directory: Path) -> None:
        rewrite(shard_of(directory, name), lambda tensors: tensors.__delitem__(name))
        if from_index:
            _change_index(lambda index: index["weight_map"].pop(name))(directory)

    return break_it


def _resize(extra: int) -> Callable[..., None]:
    def break_it(directory: Path) -> None:
        shard = shard_of(directory, NORM)
        os.truncate(shard, shard.stat().st_size + extra)

    return break_it


def _duplicate(directory: Path) -> None:
    tensor = safetensors.torch.load_file(shard_of(directory, NORM))[NORM]
    last = directory / "model-00006-of-00006.safetensors"
    rewrite(last, lambda tensors: tensors.update({NORM: tensor}))


def _move(directory: Path) -> None:
    tensor = safetensors.torch.load_file(shard_of(directory, NORM))[NORM]
    rewrite(shard_of(directory, NORM), lambda tensors: tensors.__delitem__(NORM))
    rewrite(
        directory / "model-00001-of-00006.safetensors",
        lambda tensors: tensors.update({NORM: tensor}),
    )


def _only_pickle(directory: Path) -> None:
    for file in directory.glob("model*"):
        file.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"not to be opened")


def _header(change: Callable[[dict[str, Any]], None]) -> Callable[..., None]:
    def break_it(directory: Path) -> None:
        shard = shard_of(directory, NORM)
        data = shard.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        change(header)
        text = json.dumps(header).encode()
        shard.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

    return break_it


def _write_shard(content: bytes) -> Callable[..., None]:
    return lambda directory: shard_of(directory, NORM).write_bytes(content)


def _shard_name(value: Any) -> Callable[..., None]:
    return _change_index(lambda index: index["weight_map"].update({NORM: value}))


S2 = r"model-00002-of-00006\.safetensors"
FAULTS: dict[str, tuple[Callable[..., None], str]] = {
    "shape": (_change_tensor(NORM, lambda t: t[:-1]), rf"{S2}: tensor {NORM}: shape .*128.*127"),
    "float dtype": (
        _change_tensor(NORM, lambda t: t.float()),
        rf"{S2}: tensor {NORM}: dtype must be torch.bfloat16, that of .*got torch.float32",
    ),
    "int for float": (_change_tensor(NORM, lambda t: t.int()), rf"tensor {NORM}: dtype .*float"),
    "packed dtype": (
        _change_tensor(PACKED, lambda t: t.long()),
        rf"{S2}: tensor {PACKED}: dtype must be torch.int32, got torch.int64",
    ),
    "bias dtype": (
        _change_tensor(f"{LAYER}.1.mlp.gate.e_score_correction_bias", lambda t: t.bfloat16()),
        "e_score_correction_bias: dtype must be torch.float32, got torch.bfloat16",
    ),
    "shape dtype": (
        _change_tensor(f"{LAYER}.1.mlp.experts.0.up_proj.weight_shape", lambda t: t.short()),
        "weight_shape: dtype must be torch.int32 or torch.int64, got torch.int16",
    ),
    "missing everywhere": (_drop(NORM, True), rf"{INDEX}: tensor {NORM} is missing"),
    "missing in shard": (_drop(NORM, False), rf"{S2}: tensor {NORM} is missing; .* lists it"),
    "extra in index": (
        _change_index(
            lambda i: i["weight_map"].update({"a.b": next(iter(i["weight_map"].values()))})
        ),
        rf"{INDEX}: unexpected tensor a\.b",
    ),
    "unlisted in shard": (
        lambda d: rewrite(shard_of(d, NORM), lambda t: t.update({"a.b": torch.ones(1)})),
        rf"{S2}: tensor a\.b is in this shard, but .* lists it nowhere",
    ),
    "duplicated": (_duplicate, rf"model-00006.*: tensor {NORM} is also in model-00002"),
    "in another shard": (_move, rf"tensor {NORM} is in this shard, but .* lists it in {S2}"),
    "truncated": (_resize(-1), rf"{S2}: truncated: the data of tensor .* ends at byte"),
    "too long": (_resize(1), rf"{S2}: longer than announced"),
    "empty shard": (_write_shard(b""), rf"{S2}: truncated: 0 bytes"),
    "huge header": (_write_shard(b"\xff" * 64), rf"{S2}: truncated: 64 bytes, but the header"),
    "header not json": (_write_shard(b"\4" + bytes(7) + b"{{{{"), rf"{S2}: header: not valid JSON"),
    "header a list": (_write_shard(b"\2" + bytes(7) + b"[]"), "header: expected a JSON object"),
    "metadata": (_header(lambda h: h.update(__metadata__={"a": 1})), "__metadata__ must map"),
    "entry": (_header(lambda h: h.update({NORM: 3})), rf"tensor {NORM}: its header entry must"),
    "dtype name": (_header(lambda h: h[NORM].update(dtype="BF17")), "dtype must be one of .*BF17"),
    "dtype list": (_header(lambda h: h[NORM].update(dtype=["BF16"])), "dtype must be one of"),
    "negative": (_header(lambda h: h[NORM].update(shape=[-128])), "shape must be a list of sizes"),
    "huge": (_header(lambda h: h[NORM].update(shape=[2**62, 2**62])), "takes .* bytes, but"),
    "offsets": (_header(lambda h: h[NORM].update(data_offsets=[0])), r"must be \[start, end\]"),
    "overlap": (
        _header(lambda h: h[NORM].update(data_offsets=[0, 256])),
        "overlaps the one before",
    ),
    "no index": (lambda d: (d / INDEX).unlink(), "neither model.safetensors.index.json nor"),
    "index not json": (lambda d: (d / INDEX).write_text("{"), rf"{INDEX}: not valid JSON"),
    "index empty": (lambda d: (d / INDEX).write_text("{}"), f"{INDEX}: weight_map must be"),
    "index list": (_change_index(lambda i: i.update(weight_map=[])), "weight_map must be"),
    "shard number": (_shard_name(3), rf"{INDEX}: tensor {NORM}: the shard must be the plain name"),
    "shard above": (_shard_name("../x.safetensors"), "the shard must be the plain name"),
    "shard absolute": (_shard_name("/etc/x.safetensors"), "the shard must be the plain name"),
    "shard windows": (_shard_name("a\\x.safetensors"), "the shard must be the plain name"),
    "shard nul": (_shard_name("a\0.safetensors"), "the shard must be the plain name"),
    "shard pickle": (_shard_name("pytorch_model.bin"), "the shard must be the plain name"),
    "shard absent": (
        _shard_name("y.safetensors"),
        rf"y\.safetensors: the shard is missing.*{NORM}",
    ),
    "only pickle": (_only_pickle, r"pytorch_model\.bin is not read: only safetensors"),
    "no config": (lambda d: (d / "config.json").unlink(), r"config\.json is missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named_before_any_data_is_read(copied: Path, fault: str) -> None:
    open_checkpoint(copied)
    break_it, message = FAULTS[fault]
    break_it(copied)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(copied)


def test_not_a_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        open_checkpoint(tmp_path / "nowhere")


def test_code_in_a_checkpoint_is_never_run(copied: Path, tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    (copied / "modeling_evil.py").write_text(f"open({str(witness)!r}, 'w')")
    config = json.loads((copied / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_evil.Evil"}
    (copied / "config.json").write_text(json.dumps(config))
    load_parameters(open_checkpoint(copied), dtype=torch.bfloat16)
    assert not witness.exists()
