"""The whole of Kimi K2.5 in one run, in miniature, and then every op checked on this machine.

Makes a tiny checkpoint with random weights, answers a question about a picture, one about a clip,
and one with a tool to call; then runs the hostile cases of each op against its float64 reference.
Needs no download. Exit code 1 if an op is wrong.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kimi_ops import op_names
from kimi_ops._backends import BACKENDS, has_kernel
from kimi_ops._dispatch import get_op
from kimi_ops.model import KimiK25
from kimi_ops.model.conversation import PromptBuilder, answer
from kimi_ops.model.generate import Sampling
from kimi_ops.model.generate_command import Display
from kimi_ops.model.make_checkpoint import make_checkpoint, tiny_config
from kimi_ops.model.parameter_counts import parameter_counts
from kimi_ops.model.random_files import random_checkpoint_files
from kimi_ops.testing import cases, check_op

MEDIA = Path(__file__).parent / "media"
NEW_TOKENS = 48
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather at a place.",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string"}},
                "required": ["place"],
            },
        },
    }
]
# Title, thinking mode, tools, content of the user's message.
TURNS: list[tuple[str, bool, list[dict[str, Any]] | None, list[dict[str, Any]]]] = [
    (
        "Instant mode, with a picture",
        False,
        None,
        [
            {"type": "image", "image": MEDIA / "picture.png"},
            {"type": "text", "text": "What is in this picture?"},
        ],
    ),
    (
        "Thinking mode, with a clip (the reasoning is dim)",
        True,
        None,
        [
            {"type": "video", "video": MEDIA / "clip.mp4"},
            {"type": "text", "text": "What happens in this clip?"},
        ],
    ),
    (
        "Text with a tool that may be called",
        False,
        TOOLS,
        [{"type": "text", "text": "Will it rain in Oslo tomorrow?"}],
    ),
]


def converse(console: Console) -> None:
    """Makes the checkpoint and answers each of `TURNS`, streaming."""
    with tempfile.TemporaryDirectory() as folder:
        config = tiny_config()
        make_checkpoint(folder, config, tokenizer_files=random_checkpoint_files(config))
        builder = PromptBuilder(folder)
        model = KimiK25.from_pretrained(folder)
    parameters, layers = parameter_counts(config)["total"], len(model.decoder_layers)
    console.print(
        f"A checkpoint in the released format: {parameters:,} parameters, {layers} layers. "
        "[bold]Its weights are random, so the text below is noise[/bold]: what runs is the whole "
        "path from pixels and text to text."
    )
    for title, thinking, tools, content in TURNS:
        console.rule(title, align="left")
        message = {"role": "user", "content": content}
        prompt = builder.build([message], tools=tools, thinking=thinking)
        console.print(f"[bold]you:[/bold] {content[-1]['text']}", highlight=False)
        display = Display(sys.stdout)
        result = answer(
            model,
            builder.tokenizer,
            prompt,
            thinking=thinking,
            max_new_tokens=NEW_TOKENS,
            sampling=Sampling(temperature=1.0 if thinking else 0.6, top_p=0.95, seed=1),
            on_event=display.show,
        )
        display.end()
        generation = result.generation
        vision = sum(medium.tokens for medium in prompt.media.media)
        console.print(
            f"{generation.prompt_tokens} prompt tokens ({vision} of them vision), "
            f"{generation.new_tokens} new tokens, {generation.tokens_per_second:.0f} tokens/s, "
            f"finish reason: {result.message.finish_reason}",
            highlight=False,
        )


def verify(op: str, backend: str) -> tuple[tuple[str, ...], bool]:
    """Runs all ordinary cases of an op on a backend; the row for the table, and whether all hold.

    A case that the backend declares it cannot run is counted as not run, with its reason.
    """
    contract = get_op(op)
    device = "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"
    ran, worst, wrong = 0, 0.0, ""
    reason = contract.why_not(backend, None)
    started = time.perf_counter()
    every = cases(op)
    for case in every if reason is None else ():
        args = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in case.args())
        declined = contract.why_not(backend, args)
        if declined is not None:
            reason = declined
            continue
        ran += 1
        try:
            compared = check_op(op, args, backend, device=device)
        except AssertionError as error:
            wrong = wrong or f"{case}: {error}"
        else:
            worst = max(worst, *(result.ratio for result in compared))
    note = wrong or (f"not run: {reason}" if reason is not None else "")
    state = "[red]WRONG[/red]" if wrong else f"{worst:.0%}" if ran else "-"
    seconds = f"{time.perf_counter() - started:.1f}"
    return (op, backend, f"{ran} of {len(every)}", state, seconds, escape(note)), not wrong


def main() -> int:
    """Runs the demo; the exit code."""
    console = Console(highlight=False)
    converse(console)
    console.rule("Every op on this machine, against its float64 reference", align="left")
    table = Table("op", "backend", "cases", "worst error / budget", "s", "note")
    rows, elsewhere = [], Counter()
    for op in op_names():
        for backend in (name for name in BACKENDS if has_kernel(op, name)):
            row, correct = verify(op, backend)
            if row[2].startswith("0 of ") and correct:
                elsewhere[backend, row[-1]] += 1
                continue
            rows.append((row, correct))
            table.add_row(*row)
    console.print(table)
    for (backend, note), ops in elsewhere.items():
        console.print(f"{backend}, {ops} ops: {note}")
    failed = sum(not correct for _, correct in rows)
    console.print(
        f"[red]Wrong: {failed} of {len(rows)} rows[/red]"
        if failed
        else "All within budget: twice the error of plain torch in the same precision."
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
