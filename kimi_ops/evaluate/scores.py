"""Shares of right answers, with the interval that so many samples allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from kimi_ops.evaluate.answers import Answered
from kimi_ops.model.errors import KimiError, check_count

_Z = NormalDist().inv_cdf(0.975)  # of a two-sided interval of 95 %


def wilson_interval(right: int, samples: int) -> tuple[float, float]:
    """The 95 % interval of a share, ``right`` of ``samples``, within 0 .. 1.

    Unlike the textbook's share +- 1.96 standard errors it has a width where all or none are right.

    Raises:
        KimiError: samples below 1, or right not among them.

    Source: Wilson, Journal of the American Statistical Association 22 (1927), 209-212.
    """
    check_count("samples", samples)
    check_count("right", right, minimum=0)
    if right > samples:
        raise KimiError(f"right must be at most samples, {samples}, got {right}")
    share, weight = right / samples, _Z * _Z / samples
    centre = (share + weight / 2) / (1 + weight)
    half = math.sqrt(weight * (share * (1 - share) + weight / 4)) / (1 + weight)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        task: name of the task, and what was counted where that is not right answers.
        samples, right: counts.
        seconds: wall-clock time of drawing, asking and judging; None where the same answers are
            counted another way.
    """

    task: str
    samples: int
    right: int
    seconds: float | None

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.right / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy."""
        return wilson_interval(self.right, self.samples)

    def to_json(self) -> dict[str, Any]:
        """All of it, accuracy and interval included."""
        return {
            "task": self.task,
            "samples": self.samples,
            "right": self.right,
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "seconds": self.seconds,
        }


def rows_of(task: str, answers: Sequence[Answered], seconds: float) -> list[Row]:
    """The row of a task; of tool calls a second one, of those that keep to the format."""
    rows = [Row(task, len(answers), sum(answer.right for answer in answers), seconds)]
    if task == "tool calls":
        formed = sum(answer.well_formed for answer in answers)
        rows.append(Row(f"{task}, well formed", len(answers), formed, None))
    return rows
