"""Ten photographs of scikit-image, in crops of many sizes.

Held-out crops are other random crops of the same photographs: it is recognition, not
generalisation to other cats.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from PIL import Image

from kimi_ops.tasks.sample import Rng, Sample, Split, ask, reply

PHOTOGRAPHS = {
    "astronaut.png": "an astronaut",
    "brick.png": "bricks",
    "chelsea.png": "a cat",
    "clock_motion.png": "a clock",
    "coffee.png": "a cup of coffee",
    "coins.png": "coins",
    "grass.png": "grass",
    "moon.png": "the moon",
    "motorcycle_left.png": "a motorcycle",
    "rocket.jpg": "a rocket",
}
LONGEST = 200  # pixels that a photograph is reduced to before it is cut


@cache
def _photograph(name: str) -> Image.Image:
    import skimage.data

    image = Image.open(Path(skimage.data.__file__).parent / name).convert("RGB")
    image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return image


def make(rng: Rng, split: Split, several: bool) -> Sample:
    """A crop of at least six tenths of each side, sometimes mirrored."""
    file = str(rng.choice([*PHOTOGRAPHS]))
    image = _photograph(file)
    width, height = (int(side * rng.uniform(0.6, 1)) for side in image.size)
    left = int(rng.integers(image.width - width + 1))
    top = int(rng.integers(image.height - height + 1))
    image = image.crop((left, top, left + width, top + height))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    longest = int(rng.integers(56, 99))
    scale = longest / max(image.size)
    size = tuple(max(28, round(side * scale)) for side in image.size)
    image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    messages = [ask("What does the photograph show?", image), reply(PHOTOGRAPHS[file])]
    return Sample("photographs", messages)
