"""States of a run on disk, from which it goes on bit for bit, and the stop of a run gone wrong.

A file is one line of text (magic, format, SHA-256 and length of the rest) and what `torch.save`
makes of the state. It is written under another name, flushed to the disk, read back, and only then
given its name, so that a run killed at any moment leaves its last state whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from kimi_ops.model.errors import KimiError, check_count, checked_path

FORMAT = 1
_HEADER = re.compile(rb"kimi-ops training state ([0-9]{1,6}) ([0-9a-f]{64}) ([0-9]{1,15})\n")
_LONGEST_HEADER = 128
_KEYS = {"step", "parts", "rng", "data"}
_NAME = re.compile(r"step-([0-9]{9})\.state")


class ResumeError(KimiError):
    """A state that cannot be written, or one that is damaged or of another run; names the file."""


class NonFiniteError(KimiError):
    """A NaN or infinity in training. Says where: `step`, `tensor`, and the `last_good` state."""

    def __init__(self, message: str, step: int, tensor: str, last_good: Path | None) -> None:
        super().__init__(message)
        self.step = step
        self.tensor = tensor
        self.last_good = last_good


class Stateful(Protocol):
    """Modules, optimizers, schedules and data loaders have these."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, text, and containers of them."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Takes back what `state_dict` gave."""
        ...


class Resumed(NamedTuple):
    """What `States.restore` found: steps done, the position in the data, and the file."""

    step: int
    data: dict[str, Any]
    path: Path


def rng_state() -> dict[str, Any]:
    """States of the global generators of Python, NumPy and torch (all its CUDA devices too)."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Sets what `rng_state` gave. Raises `KimiError` on another number of CUDA devices."""
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(state["cuda"]) != here:
        raise KimiError(
            f"the state has random numbers of {len(state['cuda'])} CUDA devices, here are {here}"
        )
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if here:
        torch.cuda.set_rng_state_all(state["cuda"])


class States:
    """The states of one run, in a folder of their own, the newest ``keep`` of them.

    Args:
        folder: made by the first `save`.
        keep: files kept, at least 1.

    Raises:
        KimiError: no path, or keep below 1.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2) -> None:
        check_count("keep", keep)
        self.folder = checked_path(folder)
        self.keep = keep

    def paths(self) -> list[Path]:
        """The states there are, oldest step first; whole or not."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))

    def latest(self) -> Path | None:
        """The newest state, or None."""
        return next(reversed(self.paths()), None)

    def save(
        self, step: int, parts: Mapping[str, Stateful], data: Mapping[str, Any] | None = None
    ) -> Path:
        """Writes the state after ``step`` steps, complete or not at all, and removes the oldest.

        Holds the file's content twice in memory.

        Args:
            step: optimizer steps done, below 10^9.
            parts: model, optimizers, schedules and what else has a state, by name.
            data: position in the data: numbers, text, tensors (a `torch.Generator`'s state is
                one), and containers of them.

        Returns:
            The file.

        Raises:
            ResumeError: the folder holds a later step (of another run, or of one that was taken
                up again before it), the disk is full or the like, or a part's state holds
                something else than tensors, numbers, text and containers of them.
        """
        check_count("step", step, minimum=0)
        target = self.folder / f"step-{step:09}.state"
        if not _NAME.fullmatch(target.name):
            raise ResumeError(f"step must be below 10^9, got {step}")
        later = [path for path in self.paths() if path.name > target.name]
        if later:
            raise ResumeError(
                f"{later[-1]}: is of a later step than {step}; move it away, or write elsewhere"
            )
        state = {
            "step": step,
            "parts": {name: part.state_dict() for name, part in parts.items()},
            "rng": rng_state(),
            "data": dict(data or {}),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".step-*.tmp"):  # of a run killed while writing
                left.unlink()
            _write(target, state)
        except OSError as fault:
            raise ResumeError(f"{target}: not written: {fault.strerror}") from fault
        for path in self.paths()[: -self.keep]:
            path.unlink()
        return target

    def restore(self, parts: Mapping[str, Stateful]) -> Resumed | None:
        """Puts the newest state back into ``parts`` and into the global generators.

        Args:
            parts: those of `save`, by the same names.

        Returns:
            None where there is no state yet.

        Raises:
            ResumeError: a file that is damaged or truncated (with the name of the one before it,
                from which the run goes on once the damaged one is moved away), or that has other
                parts. Where a part refuses its state, earlier parts have theirs already.
        """
        path = self.latest()
        if path is None:
            return None
        try:
            state = read_state(path)
        except ResumeError as fault:
            before = self.paths()[:-1]
            hint = f"; move it away to go on from {before[-1].name}" if before else ""
            raise ResumeError(f"{fault}{hint}") from fault
        if state["parts"].keys() != parts.keys():
            raise ResumeError(f"{path}: has the parts {[*state['parts']]}, not {[*parts]}")
        for name, part in parts.items():
            try:
                part.load_state_dict(state["parts"][name])
            except (KeyError, RuntimeError, ValueError) as fault:
                raise ResumeError(f"{path}: its {name} is of another run: {fault}") from fault
        try:
            set_rng_state(state["rng"])
        except KimiError as fault:
            raise ResumeError(f"{path}: {fault}") from fault
        return Resumed(state["step"], state["data"], path)


def _write(target: Path, state: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
    except (pickle.PicklingError, AttributeError, TypeError) as fault:
        raise ResumeError(f"{target}: cannot be written: {fault}") from fault
    content = buffer.getbuffer()
    digest = hashlib.sha256(content).hexdigest()
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(f"kimi-ops training state {FORMAT} {digest} {len(content)}\n".encode())
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        read_state(temporary)  # what cannot be read must not replace what can
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(PermissionError):  # Windows opens no folders
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, is on the disk
        finally:
            os.close(folder)


def read_state(path: str | Path) -> dict[str, Any]:
    """Reads a file that `States.save` wrote; all of it, or an error.

    Args:
        path: the file. No code in it is run, whoever wrote it.

    Returns:
        ``step``, ``parts``, ``rng`` and ``data``; tensors on the CPU.

    Raises:
        ResumeError: what is wrong with which file.
    """
    path = checked_path(path, ResumeError)
    try:
        with path.open("rb") as file:
            header = _HEADER.fullmatch(file.readline(_LONGEST_HEADER))
            content = file.read()
    except OSError as fault:
        raise ResumeError(f"{path}: not readable: {fault.strerror}") from fault
    if header is None:
        raise ResumeError(f"{path}: no training state, or its first line is damaged")
    if int(header[1]) != FORMAT:
        raise ResumeError(f"{path}: has format {int(header[1])}, this version reads {FORMAT}")
    if len(content) != int(header[3]):
        raise ResumeError(
            f"{path}: truncated or damaged: {len(content)} of {int(header[3])} bytes are there"
        )
    if hashlib.sha256(content).hexdigest().encode() != header[2]:
        raise ResumeError(f"{path}: damaged: its checksum does not match")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as fault:
        first = str(fault).strip().partition("\n")[0]
        raise ResumeError(f"{path}: holds more than tensors and plain values: {first}") from fault
    if not isinstance(state, dict) or state.keys() != _KEYS:
        raise ResumeError(f"{path}: is not what `States.save` writes")
    return state


def check_finite(
    step: int, tensors: Mapping[str, Tensor | None], *, last_good: Path | None = None
) -> None:
    """Stops a run whose loss, gradients or other tensors hold a NaN or an infinity.

    To be called between the backward and the optimizer's step, before anything is written: the
    states on disk are then all from before. Waits for the device once.

    Args:
        step: number of the step.
        tensors: any shapes and float dtypes, by name, in order of suspicion: the first bad one is
            named. None (a parameter without gradient) is fine.
        last_good: state to name, `States.latest`.

    Raises:
        NonFiniteError: with step, tensor and state.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if not given:
        return
    # A sum would overflow where every element is finite.
    device = next(iter(given.values())).device
    finite = torch.stack([tensor.isfinite().all().to(device) for tensor in given.values()])
    for (name, tensor), good in zip(given.items(), finite.tolist(), strict=True):
        if not good:
            count = int((~tensor.isfinite()).sum())
            kept = (
                "there is no state yet" if last_good is None else f"the last state is {last_good}"
            )
            raise NonFiniteError(
                f"step {step}: {name} is not finite ({count} of {tensor.numel()} values); {kept}",
                step,
                name,
                last_good,
            )
