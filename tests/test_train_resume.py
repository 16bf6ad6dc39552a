"""A run goes on bit for bit, and what was killed, cut or flipped on disk is refused by name."""

from __future__ import annotations

import hashlib
import io
import os
import random
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kimi_ops.model.errors import KimiError
from kimi_ops.train import resume
from kimi_ops.train.balance import update_bias_
from kimi_ops.train.muon import Muon
from kimi_ops.train.resume import NonFiniteError, ResumeError, States, check_finite, read_state
from kimi_ops.train.schedule import WarmupStableDecay

DATA = torch.arange(640.0).view(40, 16).sin()


@pytest.fixture(autouse=True)
def _generators_as_before() -> Iterator[None]:
    kept = resume.rng_state()
    yield
    resume.set_rng_state(kept)


class Net(nn.Module):
    """A matrix, stacked experts, a bias that no gradient moves, bfloat16, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(24, 16) * 0.2)
        self.experts = nn.Parameter(torch.randn(3, 24, 24) * 0.2)
        self.narrow = nn.Parameter(torch.randn(24, 8).bfloat16())
        self.norm = nn.Parameter(torch.ones(24))
        self.bias = nn.Parameter(torch.zeros(4), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.dropout(x @ self.first.T, 0.2) * self.norm
        x = torch.einsum("td,edf->tf", x, self.experts).relu()
        return (x.bfloat16() @ self.narrow).float()


class Run:
    """A small training run that draws from every generator."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        self.net = Net()
        self.order = torch.Generator().manual_seed(seed)
        matrices = [self.net.first, self.net.experts, self.net.narrow]
        self.optimizers = [
            Muon([{"params": matrices[:1], "rows": (8, 16)}, {"params": matrices[1:]}], lr=0.01),
            torch.optim.AdamW([self.net.norm], lr=0.01),
        ]
        factor = WarmupStableDecay(2, 3, 4)
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in self.optimizers]
        self.step, self.losses = 0, []

    def parts(self) -> dict[str, Any]:
        named = {"model": self.net}
        for i, (optimizer, schedule) in enumerate(
            zip(self.optimizers, self.schedules, strict=True)
        ):
            named |= {f"optimizer {i}": optimizer, f"schedule {i}": schedule}
        return named

    def save(self, states: States) -> Path:
        data = {"order": self.order.get_state(), "epoch": (self.step // 3, "train")}
        return states.save(self.step, self.parts(), data)

    def restore(self, states: States) -> None:
        found = states.restore(self.parts())
        assert found is not None
        self.step = found.step
        self.order.set_state(found.data["order"])
        assert found.data["epoch"] == (self.step // 3, "train")

    def train(self, steps: int) -> None:
        for _ in range(steps):
            rows = torch.randperm(len(DATA), generator=self.order)[:8]
            noise = random.gauss(0, 1) + float(np.random.standard_normal())
            loss = (self.net(DATA[rows]) + 0.1 * noise).square().mean()
            loss.backward()
            for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            update_bias_(self.net.bias.data, torch.randint(9, (4,)))
            self.step += 1
            self.losses.append(loss.item())


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("before", [0, 1, 4, 8])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, before):
    whole = Run(1)
    whole.train(9)
    end = {n: p.state_dict() for n, p in whole.parts().items()}, resume.rng_state()
    first, states = Run(1), States(tmp_path / "states")
    first.train(before)
    first.save(states)
    again = Run(2)  # other weights, other random numbers: all of it must come from the file
    again.train(1)
    again.losses.clear()
    again.restore(states)
    again.train(9 - before)
    assert first.losses + again.losses == whole.losses
    assert len(set(whole.losses)) == 9
    assert _same(({n: p.state_dict() for n, p in again.parts().items()}, resume.rng_state()), end)


def test_saving_changes_nothing(tmp_path):
    quiet, saving = Run(3), None
    quiet.train(4)
    saving = Run(3)
    for _ in range(4):
        saving.save(States(tmp_path))
        saving.train(1)
    assert saving.losses == quiet.losses


def _two_states(folder: Path) -> tuple[States, Run, list[Path]]:
    states, run = States(folder), Run(5)
    paths = [run.save(states)]
    run.train(1)
    return states, run, [*paths, run.save(states)]


def _fails_by_name(states: States, bad: Path, words: str) -> None:
    run = Run(6)
    weights = run.net.first.detach().clone()
    with pytest.raises(ResumeError, match=words) as caught:
        states.restore(run.parts())
    assert str(bad) in str(caught.value)
    assert "to go on from step-000000000.state" in str(caught.value)
    assert torch.equal(run.net.first, weights)


def test_flipped_bytes_are_refused_by_name_and_the_one_before_is_good(tmp_path):
    states, _, (good, bad) = _two_states(tmp_path)
    whole = bad.read_bytes()
    start = whole.index(b"\n") + 1
    places = [*range(start), *range(start, len(whole), 997), len(whole) - 1]
    for place in places:
        bad.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ResumeError) as caught:
            read_state(bad)
        assert str(caught.value).startswith(f"{bad}: ")
    _fails_by_name(states, bad, "damaged: its checksum")
    bad.rename(tmp_path / "moved")
    found = states.restore(Run(6).parts())
    assert (found.step, found.path) == (0, good)


@pytest.mark.parametrize("length", [0, 5, 60, 300, -1])
def test_truncated_file_is_refused_by_name(tmp_path, length):
    states, _, (_, bad) = _two_states(tmp_path)
    bad.write_bytes(bad.read_bytes()[:length])
    _fails_by_name(states, bad, "first line is damaged" if 0 <= length < 100 else "truncated")


def _saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_longer_file_and_other_format_are_refused(tmp_path):
    states, _, (_, bad) = _two_states(tmp_path)
    whole = bad.read_bytes()
    bad.write_bytes(whole + b"\0")
    _fails_by_name(states, bad, "truncated or damaged")
    bad.write_bytes(whole.replace(b" state 1 ", b" state 2 ", 1))
    _fails_by_name(states, bad, "has format 2, this version reads 1")
    for content in (b"", b"nothing", _saved([1]), _saved({"step": 1})):
        digest = hashlib.sha256(content).hexdigest()
        line = f"kimi-ops training state 1 {digest} {len(content)}\n"
        bad.write_bytes(line.encode() + content)
        _fails_by_name(states, bad, "holds more than tensors|not what `States.save` writes")
    bad.unlink()
    bad.mkdir()
    _fails_by_name(states, bad, "not readable: Is a directory")


def test_no_code_of_a_file_is_run(tmp_path):
    states, _, (_, bad) = _two_states(tmp_path)

    class Trap:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    with pytest.raises(ResumeError, match="holds more than tensors and plain values"):
        states.save(2, {}, {"trap": Trap()})
    assert not (tmp_path / "sprung").exists()
    assert states.latest() == bad  # and the state that cannot be read has replaced none
    with pytest.raises(ResumeError, match="cannot be written"):
        states.save(2, {}, {"lambda": lambda: 0})
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_of_file_size() -> None:
    """Killed by the kernel with 1,000 bytes written."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


KILLS = {
    "in the content": _die_of_file_size,
    "before the flush": lambda: setattr(os, "fsync", _die),
    "before the check": lambda: setattr(resume, "read_state", _die),
    "before the name": lambda: setattr(os, "replace", _die),
}


@pytest.mark.parametrize("moment", KILLS)
def test_killed_while_writing_leaves_the_last_state_whole(tmp_path, moment):
    states, run, paths = _two_states(tmp_path)
    kept = [path.read_bytes() for path in paths]
    run.train(1)
    child = os.fork()
    if child == 0:  # a process of its own, to be killed for real
        try:
            KILLS[moment]()
            run.save(states)
        finally:
            os._exit(7)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status)
    assert [path.read_bytes() for path in paths] == kept
    assert states.paths() == paths
    assert len(list(tmp_path.glob(".step-*.tmp"))) == 1
    again = Run(9)
    again.restore(states)
    assert again.step == 1
    again.train(1)
    again.save(states)
    assert list(tmp_path.glob(".step-*.tmp")) == []  # the next one clears it away
    assert again.losses == run.losses[1:]


def test_full_disk_is_an_error_and_leaves_the_last_state(tmp_path, monkeypatch):
    states, run, paths = _two_states(tmp_path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    run.step = 2
    with pytest.raises(ResumeError, match=r"step-000000002.state: not written: No space left"):
        run.save(states)
    assert sorted(tmp_path.iterdir()) == paths


def test_newest_states_are_kept_and_later_ones_never_overtaken(tmp_path):
    states, run = States(tmp_path, keep=3), Run(1)
    (tmp_path / "notes.txt").touch()
    assert states.restore(run.parts()) is None
    for run.step in (0, 5, 10, 200, 200):
        run.save(states)
    assert [p.name for p in states.paths()] == [f"step-{s:09}.state" for s in (5, 10, 200)]
    run.step = 11
    with pytest.raises(ResumeError, match=r"step-000000200.state: is of a later step than 11"):
        run.save(states)
    assert (tmp_path / "notes.txt").exists()


def test_other_parts_are_refused_by_name(tmp_path):
    states, run, (_, path) = _two_states(tmp_path)
    with pytest.raises(ResumeError, match=r"has the parts \['model', .*not \['model'\]"):
        states.restore({"model": run.net})
    parts = run.parts() | {"model": nn.Linear(2, 2)}
    with pytest.raises(ResumeError, match="its model is of another run") as caught:
        states.restore(parts)
    assert str(path) in str(caught.value)
    with pytest.raises(KimiError, match="keep"):
        States(tmp_path, keep=0)


def test_non_finite_values_stop_with_step_tensor_and_last_state(tmp_path):
    states, run, (_, path) = _two_states(tmp_path)
    huge = torch.full((2, 2), 3e38)  # finite, though its sum is not
    check_finite(3, {"loss": torch.tensor(1.0), "huge": huge, "none": None})
    check_finite(3, {})
    run.net.experts.grad = torch.ones(3, 24, 24)
    run.net.experts.grad[1, 2, 3] = -torch.inf
    gradients = {f"gradient of {n}": p.grad for n, p in run.net.named_parameters()}
    with pytest.raises(NonFiniteError) as caught:
        check_finite(3, {"loss": torch.tensor(1.0), **gradients}, last_good=states.latest())
    assert str(caught.value) == (
        f"step 3: gradient of experts is not finite (1 of 1728 values); the last state is {path}"
    )
    found = caught.value.step, caught.value.tensor, caught.value.last_good
    assert found == (3, "gradient of experts", path)
    with pytest.raises(NonFiniteError, match=r"step 0: loss .* there is no state yet"):
        check_finite(0, {"loss": torch.tensor(torch.nan)})
