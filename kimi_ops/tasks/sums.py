"""Sums of two numbers of two digits: worked out in thinking mode, from the head in instant mode.

A tenth of all pairs is held out: training sees neither a + b nor b + a of those.
"""

from __future__ import annotations

from kimi_ops.tasks.sample import Rng, Sample, Split, ask, reply


def is_held_out(a: int, b: int) -> bool:
    """Whether a pair belongs to the held-out tenth."""
    return (min(a, b) * 100 + max(a, b)) * 2_654_435_761 % 2**32 < 2**32 // 10


def _pair(rng: Rng, split: Split) -> tuple[int, int]:
    while True:
        a, b = (int(number) for number in rng.integers(10, 100, 2))
        if is_held_out(a, b) == (split == "held-out"):
            return a, b


def worked(a: int, b: int) -> str:
    """The steps of a sum, ones first."""
    ones = a % 10 + b % 10
    carry = f"+{ones // 10}" if ones > 9 else ""
    tens = a // 10 + b // 10 + ones // 10
    return (
        f"ones {a % 10}+{b % 10}={ones}, tens {a // 10}+{b // 10}{carry}={tens}, "
        f"so {tens}{ones % 10}."
    )


def make_thinking(rng: Rng, split: Split, several: bool) -> Sample:
    """A sum with its steps."""
    a, b = _pair(rng, split)
    messages = [ask(f"What is {a} + {b}?"), reply(str(a + b), worked(a, b))]
    return Sample("sums", messages, thinking=True)


def make_instant(rng: Rng, split: Split, several: bool) -> Sample:
    """A sum without; several in training."""
    messages = []
    for _ in range(4 if several else 1):
        a, b = _pair(rng, split)
        messages += [ask(f"What is {a} + {b}?"), reply(str(a + b))]
    return Sample("sums, instant", messages)
