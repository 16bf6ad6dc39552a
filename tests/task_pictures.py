"""What there is to see in the tasks' pictures, found from their pixels alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 90, 240),
    "yellow": (235, 215, 50),
    "purple": (170, 60, 200),
    "white": (240, 240, 240),
}


@dataclass(frozen=True)
class Seen:
    """A coloured shape and its box: first and last row and column."""

    colour: str
    shape: str
    top: int
    bottom: int
    left: int
    right: int

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


def mask_of(image: Image.Image, colour: str) -> np.ndarray:
    """``[H, W]`` bool, the pixels of exactly that colour; the tasks draw without soft edges."""
    return (np.asarray(image) == COLOURS[colour]).all(-1)


def _pieces(mask: np.ndarray) -> list[np.ndarray]:
    """The connected pieces of a mask, each as ``[n, 2]`` rows and columns."""
    left, pieces = set(map(tuple, np.argwhere(mask).tolist())), []
    while left:
        waiting, piece = [left.pop()], []
        while waiting:
            y, x = waiting.pop()
            piece.append((y, x))
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if near in left:
                    left.remove(near)
                    waiting.append(near)
        pieces.append(np.array(piece))
    return pieces


def _shape(piece: np.ndarray) -> str:
    """By the share of the box that is filled, and by its lower left corner."""
    corner = piece.min(0)
    height, width = piece.max(0) - corner + 1
    filled = len(piece) / (height * width)
    assert abs(height - width) <= 1, "every shape is as high as it is wide"
    if filled > 0.95:
        return "square"
    if filled > 0.7:
        return "circle"
    at_the_bottom_left = (piece - corner == (height - 1, 0)).all(-1).any()
    return "triangle" if at_the_bottom_left else "cross"


def seen(image: Image.Image) -> list[Seen]:
    """Every shape in a picture, in no order."""
    found = []
    for colour in COLOURS:
        for piece in _pieces(mask_of(image, colour)):
            (top, left), (bottom, right) = piece.min(0).tolist(), piece.max(0).tolist()
            found.append(Seen(colour, _shape(piece), top, bottom, left, right))
    return found
