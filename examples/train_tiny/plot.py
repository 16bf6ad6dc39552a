"""The log of a run as a picture."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

matplotlib.rcParams["svg.hashsalt"] = "kimi-ops"  # the same log gives the same file
WINDOW = 50  # steps that a curve is averaged over


def _smooth(values: list[float]) -> np.ndarray:
    window = min(WINDOW, len(values))
    return np.convolve(values, np.ones(window) / window, mode="valid")


def plot_log(log: Path, picture: Path) -> None:
    """Loss, share of right conversations by task, largest attention logit and balance."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    if not entries:
        return
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    (loss, right), (largest, balance) = axes
    loss.semilogy(_smooth([entry["loss"] for entry in entries]))
    loss.set_title("cross entropy of the answers")
    for task in entries[0]["right"]:
        right.plot(_smooth([entry["right"][task] for entry in entries]), label=task)
    right.set_title("conversations without a wrong token (training, before the step)")
    right.legend(fontsize=8)
    largest.plot([entry["largest logit"] for entry in entries], linewidth=0.5)
    largest.set_title("largest attention logit")
    balance.plot(_smooth([entry["violation"] for entry in entries]))
    balance.set_title("largest load of an expert over the mean, less 1")
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(picture, metadata={"Date": None})
    plt.close(figure)
