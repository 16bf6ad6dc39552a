"""Short clips of one moving shape, sometimes beside one that rests.

Held-out clips are drawn from other random numbers than those of training.
"""

from __future__ import annotations

from dataclasses import dataclass

from kimi_ops.tasks.sample import Clip, Rng, Sample, Split, ask, reply
from kimi_ops.tasks.shapes import COLOURS, SHAPES, draw, ground, third

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SIZE = 20.0  # pixels, of a shape
# From five frames on, so that a clip makes two chunks: of a single one, whose features are averaged
# over time, small encoders learn the axis of a motion and not its direction.
FRAMES = (5, 9)


@dataclass(frozen=True)
class Motion:
    """A clip, and what is to be seen on it.

    Attributes:
        clip: five to eight frames.
        shape, colour: of what moves.
        direction: a key of `DIRECTIONS`.
        first, last: (row, column) of the third of the picture, 1 to 3, where its centre is in the
            first and in the last frame.
    """

    clip: Clip
    shape: str
    colour: str
    direction: str
    first: tuple[int, int]
    last: tuple[int, int]


def make(rng: Rng, split: Split, several: bool) -> Sample:
    """Which way does it move? In training also: what colour is it?"""
    motion = _motion(rng)
    messages = [ask(f"Which way does the {motion.shape} move?", motion.clip)]
    messages.append(reply(motion.direction))
    if several:
        messages += [ask(f"What colour is the {motion.shape}?"), reply(motion.colour)]
    return Sample("clips", messages)


def make_thinking(rng: Rng, split: Split, several: bool) -> Sample:
    """Which way does it move, after saying from where to where."""
    motion = _motion(rng)
    reasoning = "from {},{} to {},{}.".format(*motion.first, *motion.last)
    question = ask(f"Which way does the {motion.shape} move?", motion.clip)
    messages = [question, reply(motion.direction, reasoning)]
    return Sample("clips, thinking", messages, thinking=True)


def _motion(rng: Rng) -> Motion:
    frames = int(rng.integers(*FRAMES))
    sides = rng.integers(48, 85, 2)
    shape, still = (str(name) for name in rng.choice(SHAPES, 2, replace=False))
    colour, other = (str(name) for name in rng.choice([*COLOURS], 2, replace=False))
    word = str(rng.choice([*DIRECTIONS]))
    along = 0 if word in ("left", "right") else 1
    room = float(sides[along]) - SIZE - 2
    distance = rng.uniform(max(12.0, 0.5 * room), room)
    first = [1 + rng.uniform(0, side - SIZE - 2) for side in sides]
    start = 1 + rng.uniform(0, room - distance)
    forward = word in ("right", "down")
    empty = ground(int(sides[0]), int(sides[1]), rng)
    if rng.random() < 0.3:
        # Beside the path, not under it.
        across = 1 - along
        free = float(sides[across]) - 2 * SIZE - 4
        rest = [1 + rng.uniform(0, side - SIZE - 2) for side in sides]
        low = bool(rng.random() < 0.5)
        first[across] = 1 + rng.uniform(0, free) + (0 if low else SIZE + 2)
        # The two share no row (or column): one keeps below the other.
        split_at = first[across] + SIZE + 2 if low else first[across] - SIZE - 2
        rest[across] = min(max(split_at, 0), float(sides[across]) - SIZE)
        draw(empty, still, other, rest[0], rest[1], SIZE)
    pictures = []
    for frame in range(frames):
        done = frame / (frames - 1)
        place = list(first)
        place[along] = start + distance * (done if forward else 1 - done)
        image = empty.copy()
        draw(image, shape, colour, place[0], place[1], SIZE)
        pictures.append(image)
    ends = []
    for done in (0, 1) if forward else (1, 0):
        place = list(first)
        place[along] = start + distance * done
        column, row = (third(x + SIZE / 2, side) for x, side in zip(place, sides, strict=True))
        ends.append((row, column))
    return Motion(Clip(tuple(pictures)), shape, colour, word, ends[0], ends[1])
