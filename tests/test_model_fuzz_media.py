"""Damaged pictures, clips and media configurations: each is a MediaError or decodes, nothing else.

The damage is done in a child process, so that a crash of a decoder, a hang, more memory than
allowed or a line on stderr is a failed test that names the seed of the case, and not the end of
the test run. Every case is made from its own number, so a failing one can be made again alone.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, features

from kimi_ops.model.errors import MediaError
from kimi_ops.model.media import (
    MediaConfig,
    load_video,
    preprocess_image,
    preprocess_video,
)

CASES = {"pictures": 1500, "clips": 600, "configs": 600}
ALLOWED_MEGABYTES = 200
CONFIG = MediaConfig()
CASE_FILE = Path("case.txt")  # names the running case, in the folder of the child

Samples = dict[str, bytes]


def picture_samples() -> Samples:
    rows, columns = np.mgrid[:13, :17]
    array = (np.stack([rows * 15, columns * 12, rows * columns], axis=-1) % 256).astype(np.uint8)
    image = Image.fromarray(array)
    forms: list[tuple[str, dict[str, object]]] = [
        ("PNG", {}),
        ("PNG", {"save_all": True, "append_images": [Image.fromarray(array[::-1])]}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("GIF", {"save_all": True, "append_images": [Image.fromarray(array[::-1])]}),
        ("BMP", {}),
        ("PPM", {}),
    ]
    if features.check("avif"):
        forms.append(("AVIF", {}))
    samples = {}
    for kind, options in forms:
        for mode in ("RGB", "L") if kind in ("JPEG", "PPM") else ("RGB", "L", "P", "RGBA"):
            buffer = io.BytesIO()
            image.convert(mode).save(buffer, kind, **options)
            samples[f"{kind} {mode} {'+'.join(options)}"] = buffer.getvalue()
    return samples


def clip_samples() -> Samples:
    forms = [
        ("mp4", "libx264"),
        ("mp4", "mpeg4"),
        ("webm", "libvpx"),
        ("matroska", "libx264"),
        ("avi", "mpeg4"),
        ("mpegts", "libx264"),
        ("gif", "gif"),
        ("flv", "libx264"),
    ]
    samples = {}
    for kind, codec in forms:
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=kind) as container:
            stream = container.add_stream(codec, rate=6)
            stream.width = stream.height = 16
            stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
            for index in range(7):
                frame = np.zeros((16, 16, 3), dtype=np.uint8)
                frame[index : index + 5, index : index + 5] = 200
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
            container.mux(stream.encode(None))
        samples[f"{kind} {codec}"] = buffer.getvalue()
    return samples


def config_samples() -> Samples:
    return {"released": json.dumps({"media_proc_cfg": CONFIG.to_dict()}).encode()}


def absurd_headers() -> Samples:
    """Headers that ask for more than there is, without the pixels to go with it."""
    samples = {}
    for width, height in ((2**31 - 1, 2**31 - 1), (2**32 - 1, 1), (30000, 30000), (13000, 13000)):
        header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        crc = struct.pack(">I", zlib.crc32(header))
        start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + crc
        samples[f"PNG {width}x{height}"] = (
            start + struct.pack(">I", 2**31 - 1) + b"IDAT" + b"\0" * 9
        )
        size = struct.pack("<ii", width % 2**31, -(height % 2**31))
        dib = struct.pack("<I", 40) + size + struct.pack("<HHIIiiII", 1, 24, 0, 0, 0, 0, 0, 0)
        samples[f"BMP {width}x{height}"] = b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + dib
    for width, height in ((65535, 65535), (0, 0), (65535, 1), (1, 65535)):
        screen = struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0" * 6
        frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\0;"
        samples[f"GIF {width}x{height}"] = b"GIF89a" + screen + frame
        frame_header = struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\x01\x11\0"
        samples[f"JPEG {width}x{height}"] = b"\xff\xd8\xff\xc0" + frame_header + b"\xff\xd9"
        canvas = (max(width, 1) - 1).to_bytes(3, "little") + (2**24 - 1).to_bytes(3, "little")
        chunk = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + canvas
        samples[f"WEBP {width}"] = b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk
    return samples


def damage(data: bytes, rng: random.Random) -> bytes:
    """Cuts, flips, overwrites (mostly in the header), removes or repeats a part."""
    out = bytearray(data)
    way = rng.randrange(6)
    if way == 0:
        return data[: rng.randrange(len(data))]
    if way in (1, 2):
        for _ in range(rng.choice((1, 1, 2, 4, 16))):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif way == 3:
        for _ in range(rng.choice((1, 2, 3))):
            out[rng.randrange(min(len(out), 64))] = rng.choice((0, 127, 128, 255))
    elif way == 4:
        at = rng.randrange(len(out) - 4)
        out[at : at + 4] = rng.choice(
            (b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\x4e\x20")
        )
    else:
        at = rng.randrange(len(out))
        part = out[at : at + rng.randrange(1, 40)]
        out[at : at + len(part)] = part * rng.choice((0, 2))
    return bytes(out)


def read_picture(data: bytes) -> None:
    preprocess_image(data, CONFIG)


def read_clip(data: bytes) -> None:
    preprocess_video(load_video(data, CONFIG), CONFIG)


def read_config(data: bytes) -> None:
    file = Path("preprocessor_config.json")  # the child runs in a folder of its own
    file.write_bytes(data)
    MediaConfig.from_file(file)


READERS: dict[str, tuple[Callable[[], Samples], Callable[[bytes], None]]] = {
    "pictures": (picture_samples, read_picture),
    "clips": (clip_samples, read_clip),
    "configs": (config_samples, read_config),
}


def run_cases(kind: str) -> dict[str, object]:
    """In the child: damages and reads, and reports what came of it."""
    warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
    make_samples, read = READERS[kind]
    samples = make_samples()
    for data in samples.values():
        read(data)  # undamaged, each must decode; also loads every decoder before memory is noted
    names = sorted(samples)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cases = []
    for number in range(CASES[kind]):
        rng = random.Random(number)
        name = rng.choice(names)
        cases.append((f"{name}, seed {number}", damage(samples[name], rng)))
    if kind == "pictures":
        cases.extend(absurd_headers().items())
    refused, decoded, bad_messages = 0, 0, []
    for name, data in cases:
        CASE_FILE.write_text(name)
        try:
            read(data)
            decoded += 1
        except MediaError as error:
            refused += 1
            if not str(error) or "\n" in str(error):
                bad_messages.append(f"{name}: {str(error)!r}")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "refused": refused,
        "decoded": decoded,
        "bad_messages": bad_messages,
        "megabytes": (after - before) // 1024,
    }


@pytest.mark.parametrize("kind", list(READERS))
def test_damaged_files_are_refused_or_decode(kind: str, tmp_path: Path) -> None:
    file = Path(__file__).resolve()
    paths = [str(file.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    # The limit only ends a hang: a run takes a few seconds.
    child = subprocess.run(
        [sys.executable, str(file), kind],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    case = tmp_path / CASE_FILE
    last = case.read_text() if case.exists() else "none"
    assert child.returncode == 0, f"ended in case {last!r}: {child.stderr[-2000:]}"
    report = json.loads(child.stdout)
    assert report["bad_messages"] == []
    assert report["refused"] + report["decoded"] >= CASES[kind]
    assert report["refused"] > 0
    assert report["decoded"] > 0
    assert report["megabytes"] < ALLOWED_MEGABYTES
    assert child.stderr == ""


if __name__ == "__main__":
    print(json.dumps(run_cases(sys.argv[1])))
