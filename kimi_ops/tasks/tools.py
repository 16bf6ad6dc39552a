"""Calls of a calculator, and answers from what it returned.

Held-out expressions are drawn from other random numbers than those of training; of a million and
more there are, training sees a few percent.
"""

from __future__ import annotations

import json
from typing import Any

from kimi_ops.tasks.sample import Rng, Sample, Split, ask, reply

CALCULATOR: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Works out an expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}


def _expression(rng: Rng) -> tuple[str, int]:
    a, b = (int(rng.integers(1, 10 ** int(rng.integers(1, 4)))) for _ in range(2))
    sign = str(rng.choice(["+", "-", "*"]))
    value = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return f"{a} {sign} {b}", value


def _call(expression: str) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "functions.calculator:0",
                "type": "function",
                "function": {
                    "name": "calculator",
                    "arguments": json.dumps({"expression": expression}),
                },
            }
        ],
    }


def make_call(rng: Rng, split: Split, several: bool) -> Sample:
    """A question for the calculator."""
    expression, _ = _expression(rng)
    messages = [ask(f"What is {expression}?"), _call(expression)]
    return Sample("tool calls", messages, tools=[CALCULATOR])


def make_result(rng: Rng, split: Split, several: bool) -> Sample:
    """The calculator has returned; what is the answer?"""
    expression, value = _expression(rng)
    returned = {"role": "tool", "tool_call_id": "functions.calculator:0", "content": str(value)}
    messages = [ask(f"What is {expression}?"), _call(expression), returned, reply(str(value))]
    return Sample("tool results", messages, tools=[CALCULATOR])
