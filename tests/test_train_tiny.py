"""The training script: a run in pieces equals one in one piece, and refuses what is damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from command_calls import ROOT

from kimi_ops.model.conversation import PromptBuilder
from kimi_ops.model.kimi import KimiK25
from kimi_ops.train.muon import Muon

SHORT = [
    "--warmup",
    "1",
    "--stable",
    "1",
    "--decay",
    "2",
    "--quantize-from",
    "2",
    "--save-every",
    "1",
]


def train(folder, *options: str, code: int = 0) -> str:
    result = subprocess.run(
        [sys.executable, "examples/train_tiny/train.py", str(folder), *SHORT, *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == code, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


def test_the_log_and_the_checkpoints_of_a_run(whole):
    entries = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [0, 1, 2, 3]
    assert all(5 < entry["loss"] < 8 for entry in entries)
    assert entries[-1]["loss"] < entries[0]["loss"]
    assert all(0 < entry["largest logit"] < 100 for entry in entries)
    assert "<svg" in (whole / "loss.svg").read_text()
    sizes = {}
    for kind in ("bf16", "int4"):
        model = KimiK25.from_pretrained(whole / kind, progress=False)
        prompt = PromptBuilder(whole / kind).build([{"role": "user", "content": "What is 1 + 1?"}])
        assert len(model.generate([prompt.ids], max_new_tokens=2, stop_ids=()).tokens[0]) == 2
        sizes[kind] = sum(file.stat().st_size for file in (whole / kind).iterdir())
    assert sizes["int4"] < 0.8 * sizes["bf16"]


def test_a_run_in_pieces_has_the_same_bits(whole, tmp_path):
    train(tmp_path, "--stop-after", "2")
    assert not (tmp_path / "int4").exists()
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 2, "of": "a step that was killed before its state was saved"}\n')
    train(tmp_path)
    written = sorted(file.name for file in (whole / "int4").iterdir())
    assert "config.json" in written
    assert "tiktoken.model" in written
    for name in written:
        assert (tmp_path / "int4" / name).read_bytes() == (whole / "int4" / name).read_bytes(), name
    lines = [(folder / "log.jsonl").read_text().splitlines() for folder in (tmp_path, whole)]
    for mine, other in zip(*lines, strict=True):
        a, b = (json.loads(line) for line in (mine, other))
        assert a | {"seconds": 0} == b | {"seconds": 0}


def moved(rank: int, world: int, folder: str) -> None:
    """Steps of Muon by shares, and alone: the same bits of matrices and of momentum."""
    sys.path.insert(0, str(ROOT / "examples/train_tiny"))
    from shares import SharedMuon

    dist.init_process_group("gloo", init_method=f"file://{folder}/m", rank=rank, world_size=world)
    matrices: list[list[torch.nn.Parameter]] = [[], []]
    for mine in matrices:
        torch.manual_seed(0)
        mine += [torch.nn.Parameter(torch.randn(s)) for s in ((12, 8), (3, 6, 10), (4, 4), (8, 30))]
    shared, alone = (Muon(mine, lr=0.1, nesterov=True) for mine in matrices)
    steps = SharedMuon(shared)
    assert 0 < len(steps.mine) < 4
    for _ in range(3):
        for a, b in zip(*matrices, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        steps.step()
        alone.step()
    steps.share_state()
    for a, b in zip(*matrices, strict=True):
        assert a.grad is not None
        assert torch.equal(a, b)
        states = shared.state[a], alone.state[b]
        assert torch.equal(*(state["momentum_buffer"] for state in states))
    dist.destroy_process_group()


def test_muon_by_shares_is_muon(tmp_path):
    torch.multiprocessing.spawn(moved, (2, str(tmp_path)), nprocs=2)


def test_a_damaged_state_and_another_recipe_are_refused(whole, tmp_path):
    error = train(whole, "--lr", "0.001", "--processes", "1", code=1)
    assert "train: " in error
    assert "of another recipe" in error
    states = tmp_path / "states"
    states.mkdir()
    for state in sorted((whole / "states").iterdir()):
        content = bytearray(state.read_bytes())
        content[len(content) // 2] ^= 1
        (states / state.name).write_bytes(content)
    error = train(tmp_path, "--processes", "1", code=1)
    assert "step-000000004.state" in error
    assert "move it away to go on from step-000000003.state" in error


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    error = train(tmp_path, "--lr", "1e30", "--processes", "1", code=1)
    assert "step " in error
    assert "step-00000000" in error  # the last good state
    assert list((tmp_path / "states").iterdir())
