"""Draws the two media files of the examples: `picture.png` and `clip.mp4`.

    python examples/media/make_media.py [FOLDER]

Both show things that can be asked about: the picture a house, a tree, a sun and a striped flag at
known places, the clip a red ball that crosses the scene and a blue square that grows. Nothing is
random, so the same versions of Pillow, PyAV and FFmpeg write the same bytes.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

PICTURE_SIZE = (501, 333)  # odd, not square, no multiple of the 28 pixels of a merged patch
CLIP_SIZE = (320, 180)
CLIP_FPS = 8
CLIP_SECONDS = 4


def draw_picture() -> Image.Image:
    """The still: sky, sun, meadow, house, tree and flag."""
    width, height = PICTURE_SIZE
    horizon = 230
    rows = np.linspace(0.0, 1.0, height)[:, None, None]
    sky = (1 - rows) * np.array([92, 160, 232]) + rows * np.array([226, 238, 248])
    picture = Image.fromarray(np.broadcast_to(sky, (height, width, 3)).round().astype(np.uint8))
    draw = ImageDraw.Draw(picture)

    sun = (420, 70)
    for ray in range(12):
        angle = ray * math.pi / 6
        start = (sun[0] + 42 * math.cos(angle), sun[1] + 42 * math.sin(angle))
        end = (sun[0] + 62 * math.cos(angle), sun[1] + 62 * math.sin(angle))
        draw.line([start, end], fill=(255, 214, 70), width=4)
    draw.ellipse([sun[0] - 34, sun[1] - 34, sun[0] + 34, sun[1] + 34], fill=(255, 214, 70))

    draw.rectangle([0, horizon, width, height], fill=(96, 168, 84))
    for blade in range(0, width, 9):
        top = horizon + 20 + (blade * 37) % 70
        draw.line([(blade, top + 9), (blade + 3, top)], fill=(70, 136, 62), width=2)

    draw.rectangle([70, 150, 230, 280], fill=(214, 92, 72))
    draw.polygon([(50, 150), (150, 80), (250, 150)], fill=(120, 62, 52))
    draw.rectangle([132, 205, 172, 280], fill=(92, 54, 36))
    draw.ellipse([162, 240, 168, 246], fill=(240, 208, 96))
    for left in (86, 186):
        draw.rectangle([left, 170, left + 32, 198], fill=(250, 240, 170), outline=(60, 40, 30))
        draw.line([(left + 16, 170), (left + 16, 198)], fill=(60, 40, 30))

    draw.rectangle([322, 190, 338, 285], fill=(110, 76, 48))
    for x, y in ((300, 150), (330, 128), (360, 152), (330, 168)):
        draw.ellipse([x - 30, y - 28, x + 30, y + 28], fill=(42, 122, 60))

    draw.line([(440, 170), (440, 290)], fill=(90, 90, 96), width=3)
    for stripe, colour in enumerate([(206, 42, 52), (250, 250, 250), (38, 72, 160)]):
        draw.rectangle([442, 172 + stripe * 14, 490, 185 + stripe * 14], fill=colour)
    return picture


def draw_frame(seconds: float) -> Image.Image:
    """One frame of the clip: the ball bounces from left to right, the square grows."""
    width, height = CLIP_SIZE
    frame = Image.new("RGB", CLIP_SIZE, (236, 232, 220))
    draw = ImageDraw.Draw(frame)
    draw.rectangle([0, height - 24, width, height], fill=(150, 140, 120))

    progress = seconds / CLIP_SECONDS
    side = 12 + 44 * progress
    draw.rectangle([250 - side / 2, 60 - side / 2, 250 + side / 2, 60 + side / 2], (52, 92, 190))

    x = 24 + progress * (width - 48)
    y = height - 42 - 84 * abs(math.sin(math.pi * seconds))
    draw.ellipse([x - 18, y - 18, x + 18, y + 18], fill=(212, 48, 44))
    return frame


def write_clip(path: Path) -> None:
    """Encodes the clip as H.264 in MP4."""
    with av.open(str(path), "w", format="mp4") as container:
        # One thread: the encoder cuts a frame differently for each number of them.
        options = {"crf": "26", "threads": "1"}
        stream = container.add_stream("libx264", rate=CLIP_FPS, options=options)
        stream.width, stream.height = CLIP_SIZE
        stream.pix_fmt = "yuv420p"
        for index in range(CLIP_FPS * CLIP_SECONDS):
            frame = av.VideoFrame.from_ndarray(np.asarray(draw_frame(index / CLIP_FPS)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws picture.png and clip.mp4.")
    here = Path(__file__).parent
    parser.add_argument("folder", nargs="?", type=Path, default=here, help="default: this folder")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    draw_picture().save(folder / "picture.png", optimize=True)
    write_clip(folder / "clip.mp4")
    for name in ("picture.png", "clip.mp4"):
        print(f"{folder / name}: {(folder / name).stat().st_size} bytes")


if __name__ == "__main__":
    main()
