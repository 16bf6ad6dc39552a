"""Trains the small Kimi K2.5 that ships with the package, from nothing, on two cores.

    python examples/train_tiny/train.py OUT

computes each batch in two processes of one thread, half of its conversations in each, and writes
OUT/int4 (the checkpoint in the released format), OUT/bf16 (the same before quantisation),
OUT/log.jsonl, OUT/loss.svg and OUT/states. Run again with the same OUT, it goes on from the last
state, and the result has the same bits as that of a run in one piece.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from plot import plot_log
from recipe import MIXTURE, Recipe, build_config, share_of_mixture, vocabulary_text
from shares import SharedMuon
from torch import Tensor, multiprocessing
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
from kimi_ops.train.examples import IGNORED, Batch, Lessons
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
    """Everything that a state on disk holds, and one step of it; the same in every process."""

    def __init__(self, out: Path, recipe: Recipe) -> None:
        self.out, self.recipe = out, recipe
        self.config = build_config()
        self.model = KimiK25(self.config, dtype=torch.float32)
        initialize_(self.model, seed=recipe.seed)
        self.muon, self.adamw = make_optimizers(
            self.model,
            self.config,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            nesterov=True,  # as in the public code of the predecessor
        )
        factor = WarmupStableDecay(recipe.warmup, recipe.stable, recipe.decay, final=recipe.final)
        self.steps = factor.steps
        self.schedules = [LambdaLR(o, factor) for o in (self.muon, self.adamw)]
        self.optimizers = (SharedMuon(self.muon), self.adamw)
        text = self.config.text_config
        self.loads = {
            layer: ExpertLoad(text.n_routed_experts)
            for layer in range(text.num_hidden_layers)
            if text.is_moe_layer(layer)
        }
        # All gradients are views of one array, so that the processes add them up in one go.
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.gradient = torch.zeros(sum(p.numel() for p in self.trained.values()))
        sizes = [p.numel() for p in self.trained.values()]
        pieces = self.gradient.split(sizes)
        for parameter, piece in zip(self.trained.values(), pieces, strict=True):
            parameter.grad = piece.view_as(parameter)
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
        options = Options(
            quantize=round_trip if quantize else None,
            balance=self.recipe.balance,
            watch_logits=True,
        )
        targets = batch.targets[batch.targets != IGNORED]
        count = summed(torch.tensor([len(targets), len(batch.ids)]))
        logits, seen = forward(self.model, batch, options)
        loss = F.cross_entropy(logits, targets, reduction="sum") / count[0]
        (loss + seen.balance_loss / dist.get_world_size()).backward()
        summed(self.gradient)
        total = summed(loss.detach())
        if not (total.isfinite() and self.gradient.isfinite().all()):
            named = {f"gradient of {name}": p.grad for name, p in self.trained.items()}
            check_finite(number, {"loss": total, **named}, last_good=last_good)
        norm = float(torch.linalg.vector_norm(self.gradient))
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
        self.gradient.zero_()
        for largest in seen.largest.values():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        clip_model_(self.model, seen.largest, threshold=self.recipe.threshold)
        worst = 0.0
        for layer, load in self.loads.items():
            load.add(seen.chosen[layer])
            summed(load.counts)
            bias = self.model.get_parameter(f"language.layers.{layer}.moe.bias")
            update_bias_(bias.data, load.counts, speed=self.recipe.bias_speed)
            worst = max(worst, load.violation())
            load.reset()
        return {
            "step": number,
            "loss": float(total),
            "lr": self.schedules[0].get_last_lr()[0],
            "gradient": norm,
            "largest logit": max(float(x.max()) for x in seen.largest.values()),
            "violation": worst,
            "tokens": int(count[1]),
            "right": exact(logits.detach(), batch),
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
        save_checkpoint(self.out / "int4", config, packed, **options)


def summed(x: Tensor) -> Tensor:
    """``x``, overwritten with its sum over the processes."""
    dist.all_reduce(x)
    return x


def exact(logits: Tensor, batch: Batch) -> dict[str, float]:
    """Share of all processes' conversations, by task, in which every target is the likeliest."""
    has_target = batch.targets != IGNORED
    wrong = torch.zeros(len(batch.ids), dtype=torch.int64)
    wrong[has_target] = (logits.argmax(-1) != batch.targets[has_target]).long()
    faults = F.pad(wrong.cumsum(0), (1, 0))[batch.cu_seqlens.long()].diff()
    counts = [*share_of_mixture(dist.get_world_size()).values()]
    right = summed(torch.stack([(part == 0).sum() for part in faults.split(counts)]))
    return {task: int(n) / count for (task, count), n in zip(MIXTURE.items(), right, strict=True)}


def builder_of(folder: Path, config: KimiK25Config) -> PromptBuilder:
    """Template, tokenizer and preprocessing of the checkpoint that is to be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    for name, content in small_files(config, vocabulary_text()).items():
        (folder / name).write_bytes(content)
    return PromptBuilder(folder)


def batches(builder: PromptBuilder, recipe: Recipe, first: int, last: int) -> Iterator[Batch]:
    """This process's part of the batches from number ``first`` on, made ahead in another one."""
    rank, world = dist.get_rank(), dist.get_world_size()
    lessons = Lessons(builder, share_of_mixture(world), last * world, seed=recipe.seed)
    mine = range(first * world + rank, last * world, world)
    return iter(DataLoader(lessons, batch_size=None, sampler=mine, num_workers=1))


def train(rank: int, out: Path, recipe: Recipe, stop_after: int | None) -> None:
    """The whole run in one of the processes, from the last state in ``out`` if there is one.

    Raises:
        ResumeError: a damaged state, or one of another run.
        NonFiniteError: a NaN or infinity, with the step and the tensor.
    """
    torch.set_num_threads(1)
    run, states = Run(out, recipe), States(out / "states")
    found = states.restore(run.parts)
    first = found.step if found else 0
    data = {"recipe": dataclasses.asdict(recipe)}
    if found and found.data != data:
        raise KimiError(f"{found.path}: of another recipe ({found.data}); choose another folder")
    builder = builder_of(out / "files" / str(rank), run.config)
    last = run.steps if stop_after is None else min(run.steps, stop_after)
    lessons = batches(builder, recipe, first, last)
    log = Log(out / "log.jsonl", first) if rank == 0 else None
    with tqdm(total=run.steps, initial=first, unit="step", disable=rank > 0) as bar:
        for number in range(first, last):
            started = time.perf_counter()
            entry = run.step(number, next(lessons), states.latest())
            bar.set_postfix(loss=f"{entry['loss']:.3f}", refresh=False)
            bar.update()
            if log is not None:
                log.write(entry | {"seconds": round(time.perf_counter() - started, 4)})
            if (number + 1) % recipe.save_every == 0 or number + 1 == last:
                run.optimizers[0].share_state()
                if rank == 0:
                    states.save(number + 1, run.parts, data)
    if rank == 0 and last == run.steps:
        run.save()


class Log:
    """One line of JSON per step; those of steps that are done again are dropped."""

    def __init__(self, path: Path, first: int) -> None:
        lines = path.read_text().splitlines()[:first] if path.exists() else []
        self._path = path
        path.write_text("".join(f"{line}\n" for line in lines))

    def write(self, entry: dict[str, Any]) -> None:
        """Appends, so that a killed run keeps every line."""
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def process(rank: int, world: int, meeting: Path, *args: Any) -> int:
    """One process: joins the others, and trains; the exit code.

    The others end with the first, which is the one that was started: its connections close.
    """
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    try:
        train(rank, *args)
    except KimiError as error:
        if rank == 0:
            print(f"train: {error}", file=sys.stderr)
        return 1
    dist.destroy_process_group()
    return 0


def main() -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the run")
    for field in dataclasses.fields(Recipe):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=type(field.default), default=field.default)
    parser.add_argument("--stop-after", type=int, help="stop at this step, to go on later")
    parser.add_argument("--processes", type=int, default=2, choices=(1, 2))
    given = vars(parser.parse_args())
    out, stop_after, world = (given.pop(name) for name in ("out", "stop_after", "processes"))
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        args = (world, Path(folder) / "meeting", out, Recipe(**given), stop_after)
        context = multiprocessing.get_context("spawn")
        others = [context.Process(target=process, args=(rank, *args)) for rank in range(1, world)]
        for other in others:
            other.start()
        code = process(0, *args)
        for other in others:
            other.join()
    if code:
        return code
    plot_log(out / "log.jsonl", out / "loss.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
