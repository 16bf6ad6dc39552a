"""Logs of runs as pictures.

    python examples/train_tiny/plot.py PICTURE LABEL=LOG ...

draws the largest attention logit of several runs, to see what QK-Clip does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

matplotlib.rcParams["svg.hashsalt"] = "kimi-ops"  # the same log gives the same file
WINDOW = 50  # steps that a curve is averaged over


def _smooth(values: Sequence[float]) -> np.ndarray:
    window = min(WINDOW, len(values))
    return np.convolve(values, np.ones(window) / window, mode="valid")[:: max(1, window // 5)]


def _entries(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def plot_logits(logs: Mapping[str, Path], picture: Path) -> None:
    """The largest attention logit by step, of each run by its label."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for label, log in logs.items():
        axis.plot([entry["largest logit"] for entry in _entries(log)], label=label)
    axis.set_xlabel("step")
    axis.set_ylabel("largest attention logit, before the step's clip")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(picture, metadata={"Date": None})
    plt.close(figure)


def plot_log(log: Path, picture: Path) -> None:
    """Loss, share of right conversations by task, largest attention logit and balance."""
    entries = _entries(log)
    if not entries:
        return
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    (loss, right), (largest, balance) = axes
    steps = [entry["step"] for entry in entries]
    loss.semilogy(_smooth(steps), _smooth([entry["loss"] for entry in entries]))
    loss.set_title("cross entropy of the answers")
    for task in entries[-1]["right"]:
        found = [(e["step"], e["right"][task]) for e in entries if task in e["right"]]
        where, shares = zip(*found, strict=True)
        right.plot(_smooth(where), _smooth(shares), label=task)
    right.set_title("share of training conversations without a wrong token")
    right.legend(fontsize=8)
    largest.plot(_smooth(steps), _smooth([entry["largest logit"] for entry in entries]))
    largest.set_title("largest attention logit")
    balance.plot(_smooth(steps), _smooth([entry["violation"] for entry in entries]))
    balance.set_title("largest load of an expert over the mean, less 1")
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(picture, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    plot_logits(
        {label: Path(log) for label, _, log in (a.partition("=") for a in sys.argv[2:])},
        Path(sys.argv[1]),
    )
