"""The tasks by name."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import numpy as np

from kimi_ops.model.errors import KimiError
from kimi_ops.tasks import clips, digits, photographs, scenes, sums, tools
from kimi_ops.tasks.sample import SPLITS, Rng, Sample, Split

# A maker draws one sample of a split; with `several`, it may ask more than one question of it.
Maker = Callable[[Rng, Split, bool], Sample]

TASKS: Mapping[str, Maker] = {
    "digits": digits.make,
    "scenes": scenes.make,
    "photographs": photographs.make,
    "clips": clips.make,
    "clips, thinking": clips.make_thinking,
    "sums": sums.make_thinking,
    "sums, instant": sums.make_instant,
    "tool calls": tools.make_call,
    "tool results": tools.make_result,
}


def make_sample(
    task: str, split: Split, number: int, *, seed: int = 0, several: bool = False
) -> Sample:
    """Sample ``number`` of a task; the same arguments give the same sample.

    Args:
        task: a key of `TASKS`.
        split: "train" or "held-out"; what is apart between the two is said in each task's module.
        number: from 0.
        seed: of the whole set.
        several: the conversation may have several questions, as in training; else it has one.

    Raises:
        KimiError: an unknown task or split.
    """
    if task not in TASKS:
        raise KimiError(f"unknown task {task!r:.80}, expected one of {', '.join(TASKS)}")
    if split not in SPLITS:
        raise KimiError(f"unknown split {split!r:.80}, expected one of {', '.join(SPLITS)}")
    key = (zlib.crc32(task.encode()), SPLITS.index(split), seed, number)
    return TASKS[task](np.random.default_rng(key), split, several)
