"""Random checkpoints: released format, stated moments, determined by seed and name alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import (
    INDEX,
    LAYER,
    make_small,
    read_all,
    same_bytes,
    small_config,
)

from kimi_ops.model.checkpoint import open_checkpoint
from kimi_ops.model.config import KimiK25Config
from kimi_ops.model.errors import CheckpointError
from kimi_ops.model.make_checkpoint import make_checkpoint
from kimi_ops.model.weight_map import (
    expected_tensors,
)


@pytest.fixture(scope="module")
def tiny() -> KimiK25Config:
    return small_config()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that no test changes."""
    return make_small(tmp_path_factory.mktemp("made") / "tiny")


def test_made_files_are_released_format(made: Path, tiny: KimiK25Config) -> None:
    names = sorted(file.name for file in made.iterdir())
    # Released: a shard per decoder layer, then text ends, projector, vision (61 + 3 = 64).
    shards = [f"model-{i:05d}-of-00006.safetensors" for i in range(1, 7)]
    assert names == sorted(["config.json", "tiktoken.model", INDEX, *shards])
    tensors = read_all(made)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == expected_tensors(tiny)
    index = json.loads((made / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"]["mm_projector.proj.0.bias"] == shards[4]
    assert index["weight_map"]["vision_tower.patch_embed.proj.bias"] == shards[5]
    value = tensors[f"{LAYER}.1.mlp.experts.5.down_proj.weight_shape"]
    assert value.tolist() == [128, 64]
    for shard in shards:
        header = (made / shard).read_bytes()[:8]
        assert int.from_bytes(header, "little") % 8 == 0


def test_made_weights_have_the_stated_moments(made: Path) -> None:
    tensors = read_all(made)
    packed = tensors[f"{LAYER}.2.mlp.experts.0.gate_proj.weight_packed"]
    nibbles = torch.stack([(packed >> (4 * j)) & 0xF for j in range(8)], dim=-1)
    counts = torch.bincount(nibbles.flatten().long(), minlength=16)
    # 64 x 128 even draws of 16 values: 512 each, standard deviation 22; six of them never come.
    assert ((counts - 512).abs() < 6 * 22).all()
    scale = tensors[f"{LAYER}.2.mlp.experts.0.gate_proj.weight_scale"].float()
    assert scale.min() > 0
    scales = scale.repeat_interleave(32, dim=1)
    weights = (nibbles.flatten(1).float() - 8) * scales
    # Fan-in 128; 8,192 weights estimate a standard deviation to about 1 %.
    assert weights.std().item() == pytest.approx(128**-0.5, rel=0.1)
    query = tensors[f"{LAYER}.1.self_attn.q_b_proj.weight"].float()
    assert query.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert tensors[f"{LAYER}.1.input_layernorm.weight"].float().mean() == pytest.approx(1, abs=0.05)
    assert all(bool(torch.isfinite(t.float()).all()) for t in tensors.values())


def test_made_weights_depend_on_seed_and_name_alone(
    made: Path, tiny: KimiK25Config, tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        make_checkpoint(tmp_path / "again", tiny, seed=3, max_shard_bytes=100_000)
    finally:
        torch.set_num_threads(threads)
    make_checkpoint(tmp_path / "part", tiny, seed=3, layers=range(2, 3))
    make_checkpoint(tmp_path / "other", tiny, seed=4, layers=range(2, 3))
    reference, again = read_all(made), read_all(tmp_path / "again")
    assert reference.keys() == again.keys()
    assert all(same_bytes(reference[name], again[name]) for name in reference)
    part, other = read_all(tmp_path / "part"), read_all(tmp_path / "other")
    assert part.keys() == expected_tensors(tiny, range(2, 3)).keys()
    assert all(same_bytes(part[name], reference[name]) for name in part)
    name = f"{LAYER}.2.mlp.experts.1.up_proj.weight_packed"
    assert not torch.equal(part[name], other[name])
    assert not torch.equal(part[name], reference[name.replace("experts.1", "experts.2")])


def test_max_shard_bytes_splits(tiny: KimiK25Config, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tiny, max_shard_bytes=60_000)
    specs = expected_tensors(tiny)
    sizes: dict[str, list[int]] = {}
    for name, shard in json.loads((tmp_path / INDEX).read_text())["weight_map"].items():
        sizes.setdefault(shard, []).append(specs[name].nbytes)
    assert all(sum(shard) <= 60_000 or len(shard) == 1 for shard in sizes.values())
    assert len(sizes) > 20
    open_checkpoint(tmp_path)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, None])
def test_bad_seed(tiny: KimiK25Config, tmp_path: Path, seed: Any) -> None:
    with pytest.raises(CheckpointError, match="seed must be an integer"):
        make_checkpoint(tmp_path / "x", tiny, seed=seed)
    assert not (tmp_path / "x").exists()


def test_config_and_file_dtype_agree(made: Path, tiny: KimiK25Config, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tiny, dtype=torch.float32)
    text = dataclasses.replace(tiny.text_config, dtype="float32")
    assert open_checkpoint(tmp_path).config == dataclasses.replace(tiny, text_config=text)
    assert open_checkpoint(made).config == tiny
