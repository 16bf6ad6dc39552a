"""Loading puts every tensor in its place, and saving gives the same bytes back.

The `safetensors` library, which defines the format, reads what is written here and writes what is
read here. Peak memory is measured in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoint_files import (
    LAYER,
    copy_files,
    make_small,
    read_all,
    same_bytes,
    small_config,
)

from kimi_ops.model.checkpoint import load_parameters, open_checkpoint, save_checkpoint
from kimi_ops.model.config import KimiK25Config
from kimi_ops.model.errors import CheckpointError
from kimi_ops.model.make_checkpoint import make_checkpoint, tiny_config
from kimi_ops.model.weight_map import (
    fused_parameters,
    weight_map,
)


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


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_load_places_every_tensor_and_save_is_byte_equal(
    dtype: torch.dtype, quantized: bool, tmp_path: Path
) -> None:
    config = tiny_config(
        quantized=quantized, text={"n_routed_experts": 5, "num_experts_per_tok": 2}
    )
    make_checkpoint(tmp_path / "a", config, dtype=dtype)
    checkpoint = open_checkpoint(tmp_path / "a")
    assert (checkpoint.dtype, checkpoint.scale_dtype) == (dtype, dtype)
    name = str(dtype).removeprefix("torch.")
    assert checkpoint.config.text_config.dtype == name
    parameters = load_parameters(checkpoint, dtype=dtype)
    specs = fused_parameters(config, dtype=dtype)
    assert {n: (tuple(p.shape), p.dtype) for n, p in parameters.items()} == specs
    stored = read_all(tmp_path / "a")
    for tensor, place in weight_map(config).items():
        assert same_bytes(parameters[place.parameter][place.index], stored[tensor]), tensor

    save_checkpoint(tmp_path / "b", checkpoint.config, parameters)
    saved = read_all(tmp_path / "b")
    assert saved.keys() == stored.keys()
    assert all(same_bytes(saved[tensor], stored[tensor]) for tensor in stored)
    assert open_checkpoint(tmp_path / "b").config == checkpoint.config


def test_rows_are_stacked_in_the_stated_order(made: Path) -> None:
    parameters = load_parameters(open_checkpoint(made), dtype=torch.bfloat16)
    stored = read_all(made)
    qkv_a = torch.cat(
        [
            stored[f"{LAYER}.1.self_attn.q_a_proj.weight"],
            stored[f"{LAYER}.1.self_attn.kv_a_proj_with_mqa.weight"],
        ]
    )
    assert torch.equal(parameters["language.layers.1.attn.qkv_a"], qkv_a)
    experts = f"{LAYER}.2.mlp.experts"
    for part in ("packed", "scale"):
        gate_up = torch.stack(
            [
                torch.cat([stored[f"{experts}.{e}.{p}_proj.weight_{part}"] for p in ("gate", "up")])
                for e in range(6)
            ]
        )
        assert torch.equal(parameters[f"language.layers.2.moe.gate_up_{part}"], gate_up)


def test_loading_casts_floats_alone(made: Path) -> None:
    parameters = load_parameters(open_checkpoint(made), dtype=torch.float32)
    stored = read_all(made)
    assert parameters["language.lm_head"].dtype == torch.float32
    head = stored["language_model.lm_head.weight"]
    assert torch.equal(parameters["language.lm_head"], head.float())
    assert parameters["language.layers.1.moe.down_scale"].dtype == torch.bfloat16
    assert parameters["language.layers.1.moe.bias"].dtype == torch.float32
    assert parameters["language.layers.1.moe.down_packed"].dtype == torch.int32
    for dtype in (torch.int8, torch.float64):
        with pytest.raises(CheckpointError, match="dtype must be one of"):
            load_parameters(open_checkpoint(made), dtype=dtype)


def test_mixed_scale_dtype_survives_a_round_trip(made: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(made)
    save_checkpoint(tmp_path, checkpoint.config, load_parameters(checkpoint, dtype=torch.float32))
    again = open_checkpoint(tmp_path)
    assert (again.dtype, again.scale_dtype) == (torch.float32, torch.bfloat16)
    back = load_parameters(again, dtype=torch.bfloat16)
    original = load_parameters(checkpoint, dtype=torch.bfloat16)
    assert all(same_bytes(back[name], original[name]) for name in original)


def test_single_file_and_int64_weight_shape(made: Path, tmp_path: Path) -> None:
    tensors = read_all(made)
    for name in tensors:
        if name.endswith("weight_shape"):
            tensors[name] = tensors[name].long()
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((made / "config.json").read_bytes())
    single = load_parameters(open_checkpoint(tmp_path), dtype=torch.bfloat16)
    sharded = load_parameters(open_checkpoint(made), dtype=torch.bfloat16)
    assert all(same_bytes(single[name], sharded[name]) for name in sharded)


def test_unaligned_data_is_read(made: Path, tmp_path: Path) -> None:
    # A header of odd length puts every tensor at an odd byte; the format allows it to a reader.
    for file in made.iterdir():
        data = file.read_bytes()
        if file.suffix == ".safetensors":
            length = int.from_bytes(data[:8], "little") + 1
            data = length.to_bytes(8, "little") + data[8 : 7 + length] + b" " + data[7 + length :]
        (tmp_path / file.name).write_bytes(data)
    odd = load_parameters(open_checkpoint(tmp_path), dtype=torch.bfloat16)
    even = load_parameters(open_checkpoint(made), dtype=torch.bfloat16)
    assert all(same_bytes(odd[name], even[name]) for name in even)


def test_partial_load_needs_only_its_shards(made: Path, copied: Path, tiny: KimiK25Config) -> None:
    (copied / "model-00001-of-00006.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-00006.*shard is missing; it holds"):
        open_checkpoint(copied)
    checkpoint = open_checkpoint(copied, layers=range(1, 3))
    parameters = load_parameters(checkpoint, dtype=torch.bfloat16)
    assert parameters.keys() == fused_parameters(tiny, range(1, 3)).keys()
    whole = load_parameters(open_checkpoint(made), dtype=torch.bfloat16)
    assert all(same_bytes(parameters[name], whole[name]) for name in parameters)
    one = load_parameters(checkpoint, dtype=torch.bfloat16, layers=range(2, 3))
    assert one.keys() == fused_parameters(tiny, range(2, 3)).keys()
    with pytest.raises(CheckpointError, match=r"layers\.0\..* is not in the shards"):
        load_parameters(checkpoint, dtype=torch.bfloat16, layers=range(0, 2))


def test_partial_save_opens_with_its_layers(
    made: Path, tiny: KimiK25Config, tmp_path: Path
) -> None:
    layers = range(1, 2)
    parameters = load_parameters(open_checkpoint(made, layers=layers), dtype=torch.bfloat16)
    save_checkpoint(tmp_path, tiny, parameters, layers=layers)
    again = load_parameters(open_checkpoint(tmp_path, layers=layers), dtype=torch.bfloat16)
    assert all(same_bytes(again[name], parameters[name]) for name in parameters)
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.0\..* is missing"):
        open_checkpoint(tmp_path)


def test_opening_reads_no_tensor_data(made: Path, copied: Path) -> None:
    shard = copied / "model-00002-of-00006.safetensors"
    data = shard.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    shard.write_bytes(data[:start] + bytes(len(data) - start))
    checkpoint = open_checkpoint(copied)
    assert checkpoint.nbytes == sum(t.nbytes for t in read_all(made).values())
    with pytest.raises(CheckpointError, match=r"weight_shape must hold \(64, 128\), got \(0, 0\)"):
        load_parameters(checkpoint, dtype=torch.bfloat16)


def test_file_cut_after_opening_is_an_error_not_a_crash(copied: Path) -> None:
    checkpoint = open_checkpoint(copied)
    os.truncate(copied / "model-00003-of-00006.safetensors", 1000)
    with pytest.raises(CheckpointError, match=r"model-00003.*the file was truncated"):
        load_parameters(checkpoint, dtype=torch.bfloat16)


def test_progress_goes_to_stderr_only_when_wanted(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = open_checkpoint(made)
    load_parameters(checkpoint, dtype=torch.bfloat16, progress=True)
    load_parameters(checkpoint, dtype=torch.bfloat16, progress=False)
    assert capsys.readouterr() == ("", "")
    load_parameters(checkpoint, dtype=torch.bfloat16, progress="force")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "loading: 100%" in shown.err


MEASURE = """
import resource, sys
import torch
from kimi_ops.model.checkpoint import load_parameters, open_checkpoint, save_checkpoint
from kimi_ops.model.make_checkpoint import make_checkpoint, tiny_config

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

text = {"hidden_size": 1024, "moe_intermediate_size": 512, "n_routed_experts": 192,
        "vocab_size": 16384, "num_hidden_layers": 3}
config = tiny_config(text=text)
torch.zeros(64, 64, dtype=torch.bfloat16) @ torch.zeros(64, 64, dtype=torch.bfloat16)
base = peak()
make_checkpoint(sys.argv[1], config)
made = peak() - base
parameters = load_parameters(open_checkpoint(sys.argv[1]), dtype=torch.bfloat16)
kept = sum(p.nbytes for p in parameters.values())
loaded = peak() - base
save_checkpoint(sys.argv[1] + "-again", config, parameters)
print(made, loaded, peak() - base - loaded, kept)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
def test_peak_memory(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    making, loading, saving, kept = (int(number) for number in result.stdout.split())
    assert kept > 200e6
    # A window of the file, the tables of names and Python's own growth are all that is allowed.
    assert loading <= 1.1 * kept
    assert saving <= 0.1 * kept
    assert making <= 0.25 * kept
