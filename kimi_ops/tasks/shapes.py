"""Coloured shapes on a dark ground, for scenes and clips."""

from __future__ import annotations

from PIL import Image, ImageDraw

from kimi_ops.tasks.sample import Rng

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 90, 240),
    "yellow": (235, 215, 50),
    "purple": (170, 60, 200),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "cross")


def ground(width: int, height: int, rng: Rng) -> Image.Image:
    """An empty picture of some dark grey."""
    grey = int(rng.integers(0, 60))
    return Image.new("RGB", (width, height), (grey, grey, grey))


def draw(image: Image.Image, shape: str, colour: str, x: float, y: float, size: float) -> None:
    """Draws a shape whose square of side ``size`` has its upper left corner at ``x, y``."""
    pen, fill = ImageDraw.Draw(image), COLOURS[colour]
    right, bottom = x + size, y + size
    if shape == "circle":
        pen.ellipse((x, y, right, bottom), fill=fill)
    elif shape == "square":
        pen.rectangle((x, y, right, bottom), fill=fill)
    elif shape == "triangle":
        pen.polygon(((x + size / 2, y), (right, bottom), (x, bottom)), fill=fill)
    else:
        third = size / 3
        pen.rectangle((x + third, y, right - third, bottom), fill=fill)
        pen.rectangle((x, y + third, right, bottom - third), fill=fill)


def third(place: float, side: float) -> int:
    """The third of a side, 1 to 3, that a place on it lies in."""
    return 1 + int(3 * place / side)
