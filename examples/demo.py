"""The whole of Kimi K2.5 in one run, in miniature, and then every op checked on this machine.

The small trained model that ships with the package reads a digit and a scene, names a photograph,
follows a clip, works out a sum aloud, and calls a tool; then the hostile cases of each op run
against its float64 reference. Needs no download. Exit code 1 if an op is wrong; wrong answers of
the model are only said.
"""

from __future__ import annotations

import json
import operator
import sys
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
from kimi_ops.checkpoints import TINY
from kimi_ops.model import KimiK25
from kimi_ops.model.conversation import PromptBuilder, answer
from kimi_ops.model.generate import Sampling
from kimi_ops.model.generate_command import Display
from kimi_ops.model.parameter_counts import parameter_counts
from kimi_ops.tasks.tools import CALCULATOR
from kimi_ops.testing import cases, check_op

MEDIA = Path(__file__).parent / "media"
NEW_TOKENS = 96
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
# Question, the medium it is about, thinking mode, and the right answer. All of it is held out from
# the training: of the photograph other crops were seen, of the sum neither this pair nor its swap.
QUESTIONS: list[tuple[str, str | None, bool, str]] = [
    ("Which digit is this?", "digit.png", False, "6"),
    ("Which shape is blue?", "scene.png", False, "cross"),
    ("What does the photograph show?", "photograph.png", False, "the moon"),
    ("Which way does the triangle move?", "motion.gif", False, "down"),
    ("What is 46 + 94?", None, True, "140"),
]
CALCULATION = "What is 384 * 29?"


class Speaker:
    """The model, asked on the terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.builder = PromptBuilder(TINY)
        self.model = KimiK25.from_pretrained(TINY)

    def ask(
        self,
        messages: list[dict[str, Any]],
        *,
        thinking: bool,
        tools: list[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Answers a conversation, streaming; the assistant's message."""
        prompt = self.builder.build(messages, tools=tools, thinking=thinking)
        display = Display(sys.stdout)
        result = answer(
            self.model,
            self.builder.tokenizer,
            prompt,
            thinking=thinking,
            max_new_tokens=NEW_TOKENS,
            sampling=Sampling(temperature=0),
            on_event=display.show,
        )
        display.end()
        generation = result.generation
        vision = sum(medium.tokens for medium in prompt.media.media)
        self.console.print(
            f"[dim]{generation.prompt_tokens} prompt tokens ({vision} of them vision), "
            f"{generation.new_tokens} new tokens, {generation.tokens_per_second:.0f} tokens/s, "
            f"finish reason: {result.message.finish_reason}[/dim]",
        )
        return result.message.to_message()


def converse(console: Console) -> None:
    """Asks everything, and says how much of it was answered right."""
    speaker = Speaker(console)
    parameters = parameter_counts(speaker.model.config)["total"]
    console.print(
        f"The small model of this package: {parameters:,} parameters, "
        f"{len(speaker.model.decoder_layers)} layers, int4 experts, trained by "
        "examples/train_tiny. It knows its few tasks and nothing else."
    )
    right = 0
    for question, medium, thinking, expected in QUESTIONS:
        console.rule(question + (f"  ({medium})" if medium else ""), align="left")
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if medium:
            kind = "video" if medium.endswith(".gif") else "image"
            content.insert(0, {"type": kind, kind: MEDIA / medium})
        reply = speaker.ask([{"role": "user", "content": content}], thinking=thinking)
        right += judge(console, reply["content"], expected)
    right += calculate(speaker)
    console.print(f"Answered right: {right} of {len(QUESTIONS) + 1}")


def judge(console: Console, content: str, expected: str) -> bool:
    """Whether an answer is the right one; says so."""
    correct = content.strip() == expected
    console.print("[green]right[/green]" if correct else f"[red]wrong[/red], it is {expected}")
    return correct


def calculate(speaker: Speaker) -> bool:
    """Has the model call the calculator, works its expression out, and hands the result back."""
    speaker.console.rule(f"{CALCULATION}  (with a calculator)", align="left")
    messages: list[dict[str, Any]] = [{"role": "user", "content": CALCULATION}]
    called = speaker.ask(messages, thinking=False, tools=[CALCULATOR])
    calls = called.get("tool_calls", [])
    if not calls:
        return judge(speaker.console, "", "a call of the calculator")
    expression = json.loads(calls[0]["function"]["arguments"]).get("expression", "")
    a, sign, b = [*expression.split(), "", "", ""][:3]
    if sign not in SIGNS or not (a.isdecimal() and b.isdecimal()):
        return judge(speaker.console, "", "an expression of two numbers")
    value = str(SIGNS[sign](int(a), int(b)))
    speaker.console.print(f"calculator: {value}")
    returned = {"role": "tool", "tool_call_id": calls[0]["id"], "content": value}
    final = speaker.ask([*messages, called, returned], thinking=False, tools=[CALCULATOR])
    return judge(speaker.console, final["content"], str(384 * 29))


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
