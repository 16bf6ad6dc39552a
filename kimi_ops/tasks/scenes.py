"""Pictures of up to four coloured shapes, of many sizes and aspect ratios, and questions on them.

Held-out scenes are drawn from other random numbers than those of training.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from kimi_ops.tasks.sample import Rng, Sample, Split, ask, reply
from kimi_ops.tasks.shapes import COLOURS, SHAPES, draw, ground, third

CELL = 34  # pixels; each shape has one to itself
MOST = 4
QUESTIONS = 5  # in one conversation, at most


@dataclass(frozen=True)
class Thing:
    """A shape in a cell of the picture.

    Attributes:
        shape, colour: keys of `SHAPES` and `COLOURS`.
        row, column: of the cell, from 0.
        place: (row, column) of the third of the picture, 1 to 3, where its centre is.
    """

    shape: str
    colour: str
    row: int
    column: int
    place: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


def make(rng: Rng, split: Split, several: bool) -> Sample:
    """A scene with one question, or with up to five."""
    image, things = _scene(rng)
    questions = _questions(things, rng, several)
    rng.shuffle(questions)
    messages = []
    for number, (question, answer) in enumerate(questions[: QUESTIONS if several else 1]):
        messages += [ask(question, *([image] if number == 0 else [])), reply(answer)]
    return Sample("scenes", messages)


def _scene(rng: Rng) -> tuple[Image.Image, list[Thing]]:
    """The picture, and what is on it from left to right, top to bottom."""
    width, height = (int(side) for side in rng.integers(CELL + 8, 3 * CELL + 24, 2))
    columns, rows = width // CELL, height // CELL
    count = min(int(rng.integers(1, MOST + 1)), rows * columns)
    cells = sorted(rng.choice(rows * columns, count, replace=False).tolist())
    image, things = ground(width, height, rng), []
    # The picture's own grid of patches and that of the cells have nothing to do with each other.
    left, top = rng.uniform(0, width - columns * CELL), rng.uniform(0, height - rows * CELL)
    for cell in cells:
        row, column = divmod(cell, columns)
        shape, colour = str(rng.choice(SHAPES)), str(rng.choice([*COLOURS]))
        size = rng.uniform(20, CELL - 6)
        x, y = (start + rng.uniform(1, CELL - 2 - size) for start in (left, top))
        x, y = x + column * CELL, y + row * CELL
        draw(image, shape, colour, x, y, size)
        place = third(y + size / 2, height), third(x + size / 2, width)
        things.append(Thing(shape, colour, row, column, place))
    return image, things


def _questions(things: list[Thing], rng: Rng, several: bool) -> list[tuple[str, str]]:
    """Every kind of question that has one answer here, with that answer."""
    shapes = [thing.shape for thing in things]
    colours = [thing.colour for thing in things]
    names = [str(thing) for thing in things]
    found = [
        ("How many shapes are there?", str(len(things))),
        ("What is in the picture?", ", ".join(names)),
    ]
    for thing in things:
        if shapes.count(thing.shape) == 1:
            found.append((f"What colour is the {thing.shape}?", thing.colour))
        if colours.count(thing.colour) == 1:
            found.append((f"Which shape is {thing.colour}?", thing.shape))
        if names.count(str(thing)) == 1:
            found.append((f"Where is the {thing}?", "{},{}".format(*thing.place)))
    for there in (True, False) if several else (bool(rng.random() < 0.5),):
        if there:
            asked = str(rng.choice(names))
        else:
            # Half of what is asked in vain shares a colour or a shape with what is there.
            near = things[int(rng.integers(len(things)))]
            shape, colour = str(rng.choice(SHAPES)), str(rng.choice([*COLOURS]))
            asked = f"{near.colour} {shape}" if rng.random() < 0.5 else f"{colour} {near.shape}"
        found.append((f"Is there a {asked}?", "yes" if asked in names else "no"))
    for attribute, words in (("column", ("left", "right")), ("row", ("top", "bottom"))):
        places = [getattr(thing, attribute) for thing in things]
        for word, edge in zip(words, (min(places), max(places)), strict=True):
            if places.count(edge) == 1 and len(things) > 1:
                found.append((f"What is at the {word}?", names[places.index(edge)]))
    return found
