"""Handwritten digits: scikit-learn's 1,797 of 8 x 8 pixels, enlarged to many sizes.

Held out are 360 digits that training never sees.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image

from kimi_ops.tasks.sample import Pixels, Rng, Sample, Split, ask, reply

HELD_OUT = 360


@cache
def _digits() -> tuple[Pixels, Pixels]:
    """``[1797, 8, 8]`` of 0 to 255, and ``[1797]`` labels, in one shuffled order."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images = np.round(found.images[order] * (255 / 16)).astype(np.uint8)
    return images, found.target[order].astype(np.uint8)


def _draw(rng: Rng, split: Split) -> tuple[int, int]:
    """Number of a digit in the split, and its label."""
    labels = _digits()[1]
    limits = (0, HELD_OUT) if split == "held-out" else (HELD_OUT, len(labels))
    place = int(rng.integers(*limits))
    return place, int(labels[place])


def make(rng: Rng, split: Split, several: bool) -> Sample:
    """One digit, or in training sometimes up to four in a row."""
    count = int(rng.integers(2, 5)) if several and rng.random() < 0.5 else 1
    height = int(rng.integers(36, 57))
    pieces, labels = [], []
    for _ in range(count):
        place, label = _draw(rng, split)
        labels.append(str(label))
        image = Image.fromarray(_digits()[0][place])
        width = int(height * rng.uniform(0.8, 1.1))
        if several:
            image = _bent(image, rng)
        pieces.append(image.resize((width, height), Image.Resampling.BICUBIC))
    canvas = Image.new("L", (sum(piece.width for piece in pieces), height))
    x = 0
    for piece in pieces:
        canvas.paste(piece, (x, 0))
        x += piece.width
    question = "Which digit is this?" if count == 1 else "Which digits are these?"
    return Sample("digits", [ask(question, canvas.convert("RGB")), reply("".join(labels))])


def _bent(image: Image.Image, rng: Rng) -> Image.Image:
    """A little turned, scaled, sheared and shifted, as other hands would write."""
    a, d = rng.uniform(0.88, 1.12, 2)
    b, c = rng.uniform(-0.15, 0.15, 2)
    x, y = rng.uniform(-0.6, 0.6, 2)
    centre = 3.5
    matrix = (
        a,
        b,
        centre - a * centre - b * centre + x,
        c,
        d,
        centre - c * centre - d * centre + y,
    )
    return image.transform((8, 8), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
