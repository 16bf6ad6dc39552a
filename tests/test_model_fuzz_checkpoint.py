"""720 corrupted checkpoints, seeded: each is a `KimiError` that fits on a screen, or still loads.

A case breaks one file of a good checkpoint in one way. Ways that cannot leave a valid checkpoint
must end in an error; a flipped bit may be harmless (white space, a weight), and then everything
must load with the shapes of the config. Any other exception, and any case that takes seconds,
fails.
"""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from kimi_ops.model.checkpoint import load_parameters, open_checkpoint
from kimi_ops.model.errors import KimiError
from kimi_ops.model.make_checkpoint import make_checkpoint, tiny_config
from kimi_ops.model.weight_map import fused_parameters

INDEX = "model.safetensors.index.json"
CASES_PER_WAY = 60
CASE_LIMIT_SECONDS = 20

Files = dict[str, bytes]
Way = Callable[[random.Random, Files], None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fuzz")
    text = {"n_routed_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    config = tiny_config(text=text | {"vocab_size": 512}, vision={"vt_num_hidden_layers": 1})
    make_checkpoint(directory / "good", config)
    return directory / "good"


@contextmanager
def limited() -> Iterator[None]:
    """Ends a case that hangs."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise AssertionError(f"the case took more than {CASE_LIMIT_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(CASE_LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def pick_shard(rng: random.Random, files: Files) -> str:
    return rng.choice(sorted(name for name in files if name.endswith(".safetensors")))


def split_shard(data: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def join_shard(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def flip(rng: random.Random, data: bytes, start: int, end: int, count: int) -> bytes:
    changed = bytearray(data)
    for _ in range(count):
        changed[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_header(rng: random.Random, files: Files) -> None:
    name = pick_shard(rng, files)
    end = 8 + int.from_bytes(files[name][:8], "little")
    files[name] = flip(rng, files[name], 0, end, rng.choice([1, 1, 2, 8]))


def flip_length(rng: random.Random, files: Files) -> None:
    name = pick_shard(rng, files)
    files[name] = flip(rng, files[name], 0, 8, 1)


def flip_text(rng: random.Random, files: Files) -> None:
    name = rng.choice([INDEX, "config.json"])
    files[name] = flip(rng, files[name], 0, len(files[name]), rng.choice([1, 1, 2, 5]))


def cut_or_grow(rng: random.Random, files: Files) -> None:
    name = pick_shard(rng, files)
    size = len(files[name])
    length = rng.choice([0, 1, 7, 8, 9, rng.randrange(size), size - 1, size + 1, size + 4096])
    files[name] = files[name][:length] + bytes(max(0, length - size))


def cut_text(rng: random.Random, files: Files) -> None:
    name = rng.choice([INDEX, "config.json"])
    # The last byte is a line end, without which the file is still whole.
    files[name] = files[name][: rng.randrange(len(files[name]) - 2)]


def rename_tensor(rng: random.Random, files: Files) -> None:
    name = pick_shard(rng, files)
    header, data = split_shard(files[name])
    old = rng.choice(sorted(set(header) - {"__metadata__"}))
    new = rng.choice(["", "x", old + "x", old[:-1], old.upper(), old + "\x00", "__metadata__", "é"])
    header[new] = header.pop(old)
    files[name] = join_shard(header, data)


def change_entry(rng: random.Random, files: Files) -> None:
    name = pick_shard(rng, files)
    header, data = split_shard(files[name])
    tensor = rng.choice(sorted(set(header) - {"__metadata__"}))
    key = rng.choice(["dtype", "shape", "data_offsets"])
    strange = [None, True, -1, 2**64, 1.5, "x", {}, [], [-1], [0, 2**63], [[1]], ["1"], [1.0, 2.0]]
    dtypes = ["F64", "I64", "U8", "F8_E4M3", "bf16", ""]
    header[tensor][key] = rng.choice(strange + (dtypes if key == "dtype" else []))
    files[name] = join_shard(header, data)


def change_shape(rng: random.Random, files: Files) -> None:
    name = pick_shard(rng, files)
    header, data = split_shard(files[name])
    tensor = rng.choice(sorted(set(header) - {"__metadata__"}))
    shape = header[tensor]["shape"]
    # The same number of elements in another shape, which the offsets cannot give away.
    header[tensor]["shape"] = rng.choice([[1, *shape], [*shape, 1], [1, *shape, 1]])
    files[name] = join_shard(header, data)


def swap_shards(rng: random.Random, files: Files) -> None:
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    left, right = rng.sample(shards, 2)
    files[left], files[right] = files[right], files[left]


def drop_file(rng: random.Random, files: Files) -> None:
    del files[rng.choice(sorted(files))]


def change_index(rng: random.Random, files: Files) -> None:
    index = json.loads(files[INDEX])
    names = sorted(index["weight_map"])
    tensor, value = rng.choice(names), index["weight_map"][rng.choice(names)]
    strange: list[Any] = [None, 3, [], "", ".", "..", "../good", "/dev/zero", "a/b.safetensors"]
    strange += ["config.json", "x" * 300 + ".safetensors", "\ud800.safetensors", "-.safetensors"]
    change = rng.randrange(4)
    if change == 0:
        index["weight_map"][tensor] = rng.choice(strange)
    elif change == 1:
        del index["weight_map"][tensor]
    elif change == 2:
        index["weight_map"][tensor + rng.choice(["x", ".", "\n"])] = value
    else:
        index["weight_map"] = rng.choice([None, [], {}, 3, names, "x"])
    files[INDEX] = json.dumps(index).encode()


def change_config(rng: random.Random, files: Files) -> None:
    config = json.loads(files["config.json"])
    section = rng.choice([config, config["text_config"], config["vision_config"]])
    key = rng.choice(sorted(section))
    strange = [None, -1, 0, 1, 2**40, 1e300, "x", [], {}, [2, 2], True, False, 33, 10**400]
    section[key] = rng.choice(strange)
    files["config.json"] = json.dumps(config).encode()


# (way, whether it always leaves an invalid checkpoint)
WAYS: list[tuple[Way, bool]] = [
    (flip_header, False),
    (flip_length, True),
    (flip_text, False),
    (cut_or_grow, True),
    (cut_text, True),
    (rename_tensor, True),
    (change_entry, True),
    (change_shape, True),
    (swap_shards, True),
    (drop_file, True),
    (change_index, True),
    (change_config, False),
]


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs an alarm to end a hanging case")
@pytest.mark.parametrize(("way", "always_invalid"), WAYS, ids=[way.__name__ for way, _ in WAYS])
def test_corrupted_checkpoint(good: Path, tmp_path: Path, way: Way, always_invalid: bool) -> None:
    originals = {file.name: file.read_bytes() for file in good.iterdir()}
    errors: set[str] = set()
    failed = 0
    for seed in range(CASES_PER_WAY):
        files = dict(originals)
        way(random.Random(f"{way.__name__} {seed}"), files)
        for name in originals:
            (tmp_path / name).unlink(missing_ok=True)
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        try:
            with limited():
                checkpoint = open_checkpoint(tmp_path)
                parameters = load_parameters(checkpoint, dtype=torch.bfloat16)
        except KimiError as error:
            failed += 1
            errors.add(str(error))
            assert 10 < len(str(error)) < 1500, (seed, str(error)[:3000])
        else:
            assert not always_invalid, f"case {seed} of {way.__name__} was accepted"
            expected = fused_parameters(checkpoint.config)
            assert {n: (tuple(p.shape), p.dtype) for n, p in parameters.items()} == expected
    # Enough cases must really be broken, or the corruption has stopped corrupting.
    assert failed == CASES_PER_WAY if always_invalid else failed >= CASES_PER_WAY // 3
    assert len(errors) > 3


def test_good_checkpoint_loads(good: Path) -> None:
    checkpoint = open_checkpoint(good)
    parameters = load_parameters(checkpoint, dtype=torch.bfloat16)
    assert parameters.keys() == fused_parameters(checkpoint.config).keys()
    assert CASES_PER_WAY * len(WAYS) >= 500
