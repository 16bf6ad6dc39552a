"""Trains the small Kimi K2.5 that ships with the package, from nothing, on two cores.

    python examples/train_tiny/train.py OUT

writes OUT/int4 (the checkpoint in the released format), OUT/bf16 (the same before quantisation),
OUT/log.jsonl, OUT/loss.svg and OUT/states. Run again with the same OUT, it goes on from the last
state, and the result has the same bits as that of a run in one piece.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from plot import plot_log
from recipe import MIXTURE, Recipe, build_config, vocabulary_text
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from kimi_ops.model.checkpoint import save_checkpoint
from kimi_ops.model.config import KimiK25Config
from kimi_ops.model.config_quantization import QuantizationConfig
from kimi_ops.model.conversation import PromptBuilder
from kimi_ops.model.errors import KimiError
from kimi_ops.model.kimi import KimiK25
from kimi_ops.model.random_files import small_files
from kimi_ops.quant import int4
from kimi_ops.train.balance import ExpertLoad, update_bias_
from kimi_ops.train.examples import Batch, Lessons
from kimi_ops.train.forward import Options, forward
from kimi_ops.train.initial import initialize_
from kimi_ops.train.muon import make_optimizers
from kimi_ops.train.qk_clip import clip_model_
from kimi_ops.train.resume import States, check_finite
from kimi_ops.train.schedule import WarmupStableDecay


def round_trip(weight: Tensor) -> Tensor:
    """An expert's weights as the released format would give them back; gradients pass."""
    return int4.fake_quantize(weight.bfloat16()).to(weight.dtype)


class Run:
    """Everything that a state on disk holds, and one step of it."""

    def __init__(self, out: Path, recipe: Recipe) -> None:
        self.out, self.recipe = out, recipe
        self.config = build_config()
        self.model = KimiK25(self.config, dtype=torch.float32)
        initialize_(self.model, seed=recipe.seed)
        self.muon, self.adamw = make_optimizers(
            self.model, self.config, lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        factor = WarmupStableDecay(recipe.warmup, recipe.stable, recipe.decay, final=recipe.final)
        self.steps = factor.steps
        self.schedules = [LambdaLR(o, factor) for o in (self.muon, self.adamw)]
        text = self.config.text_config
        self.loads = {
            layer: ExpertLoad(text.n_routed_experts)
            for layer in range(text.num_hidden_layers)
            if text.is_moe_layer(layer)
        }
        self.parts = {
            "model": self.model,
            "muon": self.muon,
            "adamw": self.adamw,
            "schedule of muon": self.schedules[0],
            "schedule of adamw": self.schedules[1],
        }

    def step(self, number: int, batch: Batch, last_good: Path | None) -> dict[str, Any]:
        """Forward, backward, MuonClip and balance; what is logged of it."""
        quantize = number >= self.recipe.quantize_from
        options = Options(quantize=round_trip if quantize else None, watch_logits=True)
        logits, seen = forward(self.model, batch, options)
        loss = F.cross_entropy(logits, batch.targets)
        (loss + self.recipe.balance * seen.balance_loss).backward()
        parameters = dict(self.model.named_parameters())
        gradients = {
            f"gradient of {n}": p.grad for n, p in parameters.items() if p.grad is not None
        }
        check_finite(number, {"loss": loss.detach(), **gradients}, last_good=last_good)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        for optimizer, schedule in zip((self.muon, self.adamw), self.schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        clip_model_(self.model, seen.largest, threshold=self.recipe.threshold)
        worst = 0.0
        for layer, load in self.loads.items():
            load.add(seen.chosen[layer])
            bias = self.model.get_parameter(f"language.layers.{layer}.moe.bias")
            update_bias_(bias.data, load.counts, speed=self.recipe.bias_speed)
            worst = max(worst, load.violation())
            load.reset()
        right = exact(logits.detach(), batch)
        return {
            "step": number,
            "loss": float(loss.detach()),
            "lr": self.schedules[0].get_last_lr()[0],
            "gradient": norm,
            "largest logit": max(float(x.max()) for x in seen.largest.values()),
            "violation": worst,
            "tokens": len(batch.ids),
            "right": right,
        }

    def save(self) -> None:
        """The checkpoint in bf16, and with int4 experts, which is the one that ships."""
        files = small_files(self.config, vocabulary_text())
        plain = {n: p.detach() for n, p in self.model.named_parameters()}
        rounded = {n: p if n.endswith("moe.bias") else p.bfloat16() for n, p in plain.items()}
        options: dict[str, Any] = {"extra_files": files, "overwrite": True, "progress": False}
        save_checkpoint(self.out / "bf16", self.config, rounded, **options)
        config = dataclasses.replace(self.config, quantization_config=QuantizationConfig())
        packed = dict(rounded)
        for layer in self.loads:
            for matrix in ("gate_up", "down"):
                name = f"language.layers.{layer}.moe.{matrix}"
                packed[f"{name}_packed"], packed[f"{name}_scale"] = int4.quantize(packed.pop(name))
        one_file = {"max_shard_bytes": 2**30}
        save_checkpoint(self.out / "int4", config, packed, **options, **one_file)


def exact(logits: Tensor, batch: Batch) -> dict[str, float]:
    """Share of conversations by task in which every target is the likeliest token."""
    wrong = (batch.targets >= 0) & (logits.argmax(-1) != batch.targets)
    sums = F.pad(wrong.cumsum(0), (1, 0))[batch.cu_seqlens.long()].diff()
    right, first, shares = (sums == 0).tolist(), 0, {}
    for task, count in MIXTURE.items():
        shares[task] = sum(right[first : first + count]) / count
        first += count
    return shares


def builder_of(out: Path, config: KimiK25Config) -> PromptBuilder:
    """Template, tokenizer and preprocessing of the checkpoint that is to be."""
    folder = out / "files"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    for name, content in small_files(config, vocabulary_text()).items():
        (folder / name).write_bytes(content)
    return PromptBuilder(folder)


def batches(builder: PromptBuilder, recipe: Recipe, first: int, steps: int) -> Iterator[Batch]:
    """Batches from number ``first`` on, made by another process one ahead."""
    lessons = Lessons(builder, MIXTURE, steps, seed=recipe.seed)
    loader = DataLoader(
        lessons, batch_size=None, sampler=range(first, steps), num_workers=1, prefetch_factor=4
    )
    return iter(loader)


def train(out: Path, recipe: Recipe, *, stop_after: int | None = None) -> None:
    """The whole run, from the last state in ``out`` if there is one.

    Raises:
        ResumeError: a damaged state, or one of another run.
        NonFiniteError: a NaN or infinity, with the step and the tensor.
    """
    run, states = Run(out, recipe), States(out / "states")
    found = states.restore(run.parts)
    first = found.step if found else 0
    if found and found.data != {"recipe": dataclasses.asdict(recipe)}:
        raise KimiError(f"{found.path}: of another recipe ({found.data}); choose another folder")
    builder = builder_of(out, run.config)
    log_file = out / "log.jsonl"
    kept = log_file.read_text().splitlines()[:first] if log_file.exists() else []
    log_file.write_text("".join(line + "\n" for line in kept))
    last = run.steps if stop_after is None else min(run.steps, stop_after)
    lessons = batches(builder, recipe, first, last)
    data = {"recipe": dataclasses.asdict(recipe)}
    with log_file.open("a") as log, tqdm(total=run.steps, initial=first, unit="step") as bar:
        for number in range(first, last):
            started = time.perf_counter()
            entry = run.step(number, next(lessons), states.latest())
            entry["seconds"] = round(time.perf_counter() - started, 4)
            log.write(json.dumps(entry) + "\n")
            bar.set_postfix(loss=f"{entry['loss']:.3f}", refresh=False)
            bar.update()
            if (number + 1) % recipe.save_every == 0 or number + 1 == last:
                log.flush()
                states.save(number + 1, run.parts, data)
    if last == run.steps:
        run.save()
    plot_log(log_file, out / "loss.svg")


def main() -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the run")
    for field in dataclasses.fields(Recipe):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=type(field.default), default=field.default)
    parser.add_argument("--stop-after", type=int, help="stop at this step, to go on later")
    parser.add_argument("--threads", type=int, default=2)
    given = vars(parser.parse_args())
    out, stop_after = given.pop("out"), given.pop("stop_after")
    torch.set_num_threads(given.pop("threads"))
    try:
        train(out, Recipe(**given), stop_after=stop_after)
    except KimiError as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
