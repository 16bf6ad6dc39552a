"""`kimi-ops eval`: what it takes and what it prints. Imports what it needs when it runs."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kimi_ops._arguments import add_dtype, add_number
from kimi_ops._dispatch import parse_choice, use_backend
from kimi_ops._version import __version__
from kimi_ops.model.errors import KimiError, check_count
from kimi_ops.model.settings import usable_device

if TYPE_CHECKING:
    from kimi_ops.evaluate.answers import Answered
    from kimi_ops.evaluate.scores import Row
    from kimi_ops.model.conversation import PromptBuilder
    from kimi_ops.model.kimi import KimiK25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "Asks a checkpoint held-out samples of small tasks with known answers, greedily, and "
        "prints how many it gets right and how evenly its experts are used."
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint directory")
    parser.add_argument(
        "--task", nargs="+", default=[], metavar="NAME", help="names of tasks (all)"
    )
    add_number(parser, "--samples", "of each task (200)", 200)
    parser.add_argument(
        "--backend", metavar="SPEC", help="as KIMI_OPS_BACKEND, such as reference (automatic)"
    )
    parser.add_argument(
        "--execute",
        choices=("emulate", "interpret"),
        help="run the GPU kernels that --backend names on the CPU: minutes for a few samples",
    )
    add_dtype(parser, "of the float weights")
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda or cuda:N (cpu)")
    add_number(parser, "--seed", "of the samples (0)", 0)
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON")
    add_number(parser, "--show", "print so many wrong answers of each task (0)", 0)


def run(args: argparse.Namespace) -> int:
    """Asks, prints, writes.

    Returns:
        0; what cannot be carried out is a `KimiError`.
    """
    from kimi_ops.evaluate.router import to_json
    from kimi_ops.model.conversation import PromptBuilder
    from kimi_ops.model.generate_command import note
    from kimi_ops.model.kimi import KimiK25

    tasks, backend = _checked(args)
    builder = PromptBuilder(args.checkpoint)
    if builder.random_weights:
        note(f"the weights in {builder.directory} are random, so the answers are noise")
    model = KimiK25.from_pretrained(builder.directory, device=args.device, dtype=args.dtype)
    with use_backend(args.backend or ""), _execution(args.execute):
        rows, answers, loads = _evaluated(model, builder, tasks, args.samples, args.seed)
    shares = to_json(loads)
    _print(rows, shares)
    for task, given in answers.items():
        _show(task, given, args.show)
    if args.out is not None:
        _write(
            Path(args.out),
            {
                "checkpoint": str(builder.directory),
                "random_weights": builder.random_weights,
                "dtype": args.dtype,
                "device": args.device,
                "backend": backend,
                "execute": args.execute,
                "seed": args.seed,
                "samples": args.samples,
                "versions": {"torch": str(torch.__version__), "kimi-ops": __version__},
                "rows": [row.to_json() for row in rows],
                "router": shares,
            },
        )
    return 0


def _checked(args: argparse.Namespace) -> tuple[list[str], str]:
    """The tasks' names and the choice of backends, after whatever can be refused before work."""
    from kimi_ops.tasks import TASKS, make_sample

    check_count("samples", args.samples)
    for name in ("seed", "show"):
        check_count(name, getattr(args, name), minimum=0)
    backend = args.backend or os.environ.get("KIMI_OPS_BACKEND") or "auto"
    try:
        parse_choice(args.backend or "")
    except ValueError as error:
        raise KimiError(f"--backend: {error}") from None
    device = usable_device(args.device)
    if args.execute is not None:
        if backend == "auto" or device.type != "cpu":
            raise KimiError("--execute runs what --backend names, on the CPU: name a backend")
        if args.execute == "interpret" and importlib.util.find_spec("triton") is None:
            raise KimiError("triton is not installed: pip install 'kimi-ops[triton]'")
    if args.out is not None:
        out = Path(args.out)
        if out.is_dir() or not out.parent.is_dir():
            raise KimiError(f"--out: {out} is no file that can be written")
    tasks = list(dict.fromkeys(args.task or TASKS))
    for task in tasks:
        make_sample(task, "held-out", 0, seed=args.seed)  # a name, or a package, may be missing
    return tasks, backend


@contextlib.contextmanager
def _execution(how: str | None) -> Iterator[None]:
    """Kernels for a GPU take CPU tensors within the block, as PTX or interpreted."""
    if how is None:
        yield
        return
    from kimi_ops._target import targeting
    from kimi_ops.testing.runner import emulated, target_of
    from kimi_ops.testing.static import MissingToolError

    with contextlib.ExitStack() as stack:
        if how == "emulate":
            stack.enter_context(emulated())
        else:
            interpreter = importlib.import_module("kimi_ops.testing.triton_interpreter")
            stack.enter_context(targeting(target_of(80)))
            stack.enter_context(interpreter.interpreted())
        try:
            yield
        except MissingToolError as error:
            raise KimiError(str(error)) from None


def _evaluated(
    model: KimiK25, builder: PromptBuilder, tasks: Sequence[str], samples: int, seed: int
) -> tuple[list[Row], dict[str, list[Answered]], Mapping[int, Any]]:
    """Rows of the table, answers by task, and loads of the experts by layer."""
    from tqdm import tqdm

    from kimi_ops.evaluate.answers import answered
    from kimi_ops.evaluate.router import router_load
    from kimi_ops.evaluate.scores import rows_of
    from kimi_ops.train.examples import Encoder

    encoder, rows, answers = Encoder(builder), [], {}
    total, hidden = samples * len(tasks), not sys.stderr.isatty()
    with (
        router_load(model) as loads,
        tqdm(total=total, unit="sample", disable=hidden, file=sys.stderr) as bar,
    ):
        for task in tasks:
            bar.set_description(task)
            started = time.perf_counter()
            given = list(answered(model, encoder, task, samples, seed=seed, on_done=bar.update))
            rows += rows_of(task, given, time.perf_counter() - started)
            answers[task] = given
    return rows, answers, loads


def _print(rows: Sequence[Row], shares: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 100)
    table = Table(title="Held-out samples", title_justify="left")
    table.add_column("task")
    for name in ("samples", "right", "accuracy", "95 % interval", "seconds"):
        table.add_column(name, justify="right")
    for row in rows:
        low, high = row.interval
        table.add_row(
            row.task,
            str(row.samples),
            str(row.right),
            f"{100 * row.accuracy:.1f} %",
            f"{100 * low:.1f} .. {100 * high:.1f} %",
            "" if row.seconds is None else f"{row.seconds:.1f}",
        )
    console.print(table)
    load = Table(title="Load of experts, mean 1", title_justify="left")
    for name in ("layer", "least", "largest"):
        load.add_column(name, justify="right")
    for share in shares:
        load.add_row(str(share["layer"]), f"{share['least']:.2f}", f"{share['largest']:.2f}")
    console.print(load)


def _show(task: str, answers: Sequence[Answered], most: int) -> None:
    wrong = [answer for answer in answers if not answer.right]
    if not wrong or not most:
        return
    print(f"{task}: {min(most, len(wrong))} of {len(wrong)} wrong answers")
    for answer in wrong[:most]:
        print(f"  sample {answer.number}: {answer.question}")
        print(f"    expected {answer.expected}")
        print(f"    got      {answer.got}")


def _write(out: Path, content: Mapping[str, Any]) -> None:
    try:
        out.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    except OSError as error:
        raise KimiError(f"--out: {out}: {error.strerror or error}") from None
