"""A training step of the small model, ours beside transformers': `python bench/train_step.py`.

Both compute the loss of the same batch of the training (half of one of `examples/train_tiny`, text,
pictures and clips) in float32 from the same weights, and its gradients; the losses are compared
before anything is timed. Ours packs the conversations, transformers' module (eager attention) gets
them padded to the longest, and media one by one, since several lengths of clips at once fail there.
The optimizer's step is the same for both and not part of it. Contenders take turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from kimi_ops.checkpoints import TINY
from kimi_ops.model.conversation import PromptBuilder
from kimi_ops.model.kimi import KimiK25
from kimi_ops.quant import int4
from kimi_ops.train.examples import IGNORED, Batch, Lessons
from kimi_ops.train.forward import Options, forward
from kimi_ops.train.initial import initialize_

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples/train_tiny")]
from recipe import build_config, share_of_mixture  # noqa: E402
from transformers_model import as_encoder_output, their_media, their_model  # noqa: E402


def trained_weights() -> KimiK25:
    """The shipped model in float32, its experts no longer packed, ready to train on."""
    packed = KimiK25.from_pretrained(TINY, dtype=torch.float32, progress=False)
    model = KimiK25(build_config(), dtype=torch.float32)
    initialize_(model)
    state = dict(packed.state_dict())
    for name in [n for n in state if n.endswith("_packed")]:
        scale = state.pop(name.replace("_packed", "_scale"))
        state[name.removesuffix("_packed")] = int4.dequantize(state.pop(name), scale, torch.float32)
    model.load_state_dict(state)
    return model


def our_step(model: KimiK25, batch: Batch) -> Callable[[], float]:
    """Forward and backward of `kimi_ops.train`."""

    def step() -> float:
        model.zero_grad()
        logits, _ = forward(model, batch, Options())
        loss = F.cross_entropy(logits, batch.targets[batch.targets != IGNORED])
        loss.backward()
        return float(loss.detach())

    return step


def their_step(model: KimiK25, batch: Batch) -> Callable[[], float]:
    """The same of transformers' module in training mode."""
    theirs = their_model(model).train()
    lengths = batch.cu_seqlens.diff().tolist()

    def padded(x: Tensor, value: int) -> Tensor:
        rows = x.split(lengths)
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    pad = model.config.pad_token_id
    ids, targets = padded(batch.ids, pad), padded(batch.targets, IGNORED)
    mask = padded(torch.ones_like(batch.ids), 0)

    def step() -> float:
        theirs.zero_grad()
        media = their_media(theirs, batch.pixel_values, batch.grid_thws)
        output = theirs(
            input_ids=ids,
            attention_mask=mask,
            mm_encoder_outputs=as_encoder_output(media),
            use_cache=False,
        )
        loss = F.cross_entropy(output.logits[targets != IGNORED], targets[targets != IGNORED])
        loss.backward()
        return float(loss.detach())

    return step


def main() -> None:
    """Prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = trained_weights()
    batch = Lessons(PromptBuilder(TINY), share_of_mixture(2), 1)[0]
    steps = {
        "kimi_ops.train": our_step(model, batch),
        f"transformers {transformers.__version__}": their_step(model, batch),
    }
    losses = {name: step() for name, step in steps.items()}  # and the warm-up
    first, second = losses.values()
    assert abs(first - second) < 1e-4, losses
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - started)
    print(f"{len(batch.ids)} tokens, {len(batch.pixel_values)} patches, {args.threads} threads")
    for name, seconds in times.items():
        low, median = min(seconds), statistics.median(seconds)
        print(f"{name}: median {median * 1e3:.0f} ms, least {low * 1e3:.0f} ms")
    mine, other = (statistics.median(seconds) for seconds in times.values())
    print(f"ratio of the medians: {other / mine:.2f}")


if __name__ == "__main__":
    main()
