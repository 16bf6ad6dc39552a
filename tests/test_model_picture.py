"""Pictures: size plan, reading and patches of Kimi K2.5.

Expected values are the released numbers of the preprocessing, a slow loop written from the formula,
or the pure functions of transformers' own Kimi K2.5 image processor. That processor as a whole
needs torchvision and resizes with it instead of Pillow, so `navit_resize` and `patchify` are taken
out of its source file and run alone: sizes and patch order are compared, resized pixels are not.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kimi_ops.model.errors import KimiError, MediaError
from kimi_ops.model.media import (
    MediaConfig,
    ResizePlan,
    load_image,
    preprocess_image,
    resize_plan,
)
from kimi_ops.model.picture import MAX_PIXELS, to_patches

CONFIG = MediaConfig()


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def slow_patches(padded: np.ndarray, patch: int = 14) -> np.ndarray:
    """[H, W, 3] uint8 -> patches, one value at a time, in fp32 arithmetic."""
    grid_h, grid_w = padded.shape[0] // patch, padded.shape[1] // patch
    out = np.empty((grid_h * grid_w, 3, patch, patch), dtype=np.float32)
    half = np.float32(0.5)
    for row in range(grid_h):
        for column in range(grid_w):
            for c in range(3):
                for dy in range(patch):
                    for dx in range(patch):
                        value = np.float32(padded[row * patch + dy, column * patch + dx, c])
                        out[row * grid_w + column, c, dy, dx] = (
                            value / np.float32(255) - half
                        ) / half
    return out


def transformers_function(file: str, name: str) -> Any:
    """One pure function out of a transformers source file that cannot be imported here."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        pytest.skip("transformers is not installed")
    path = Path(spec.origin).parent / "models" / "kimi_k25" / file
    if not path.exists():
        pytest.skip("this transformers has no kimi_k25")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            scope: dict[str, Any] = {"math": math}
            module = ast.Module(body=[node], type_ignores=[])
            exec(compile(module, str(path), "exec"), scope)
            return scope[name]
    raise AssertionError(f"{path} has no function {name}")


# width, height, limit -> new width, new height, pad right, pad bottom, grid h, grid w, tokens
PLANS = [
    (1, 1, 16384, 1, 1, 27, 27, 2, 2, 1),
    (29, 28, 16384, 29, 28, 27, 0, 2, 4, 2),
    (224, 224, 16384, 224, 224, 0, 0, 16, 16, 64),
    (640, 480, 16384, 640, 480, 4, 24, 36, 46, 414),
    (1000, 700, 16384, 1000, 700, 8, 0, 50, 72, 900),
    (1920, 1080, 16384, 1920, 1080, 12, 12, 78, 138, 2691),
    (1920, 1080, 4096, 1196, 672, 8, 0, 48, 86, 1032),
    (3000, 3000, 16384, 1794, 1794, 26, 26, 130, 130, 4225),
    (4000, 3000, 16384, 2073, 1554, 27, 14, 112, 150, 4200),
    (10000, 100, 16384, 7168, 71, 0, 13, 6, 512, 768),
    (7168, 7168, 16384, 1792, 1792, 0, 0, 128, 128, 4096),
    (7168, 7168, 4096, 896, 896, 0, 0, 64, 64, 1024),
]


@pytest.mark.parametrize("values", PLANS, ids=lambda values: "{}x{}-{}".format(*values))
def test_plan_has_the_released_values(values: tuple[int, ...]) -> None:
    width, height, limit, *expected = values
    assert resize_plan(width, height, limit, CONFIG) == ResizePlan(*expected)


def test_plan_agrees_with_transformers() -> None:
    navit_resize = transformers_function("image_processing_kimi_k25.py", "navit_resize")
    rng = np.random.default_rng(5)
    sides = np.exp(rng.uniform(0, np.log(60000), (4000, 2))).astype(int) + 1
    for width, height in sides.tolist():
        for limit in (16384, 4096):
            plan = resize_plan(width, height, limit, CONFIG)
            resized, padded = navit_resize(height, width, 14, 2, limit, 512)
            assert (plan.new_height, plan.new_width) == resized
            assert (plan.new_height + plan.pad_bottom, plan.new_width + plan.pad_right) == padded


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 2**31 - 1), st.integers(1, 2**31 - 1), st.sampled_from([16384, 4096]))
def test_plan_of_any_size_is_legal(width: int, height: int, limit: int) -> None:
    plan = resize_plan(width, height, limit, CONFIG)
    assert 1 <= plan.new_width <= min(width, 7168)
    assert 1 <= plan.new_height <= min(height, 7168)
    assert 0 <= plan.pad_right < 28
    assert 0 <= plan.pad_bottom < 28
    assert plan.new_width + plan.pad_right == plan.grid_w * 14
    assert plan.new_height + plan.pad_bottom == plan.grid_h * 14
    assert plan.grid_h % 2 == plan.grid_w % 2 == 0
    assert max(plan.grid_h, plan.grid_w) <= 512
    assert plan.tokens == plan.grid_h * plan.grid_w // 4 >= 1


@pytest.mark.parametrize("bad", [0, -1, 2**31, 1.5, True, None, "7", math.nan])
def test_plan_refuses_sizes_that_are_none(bad: Any) -> None:
    for name, arguments in {
        "width": (bad, 5, 16384),
        "height": (5, bad, 16384),
        "limit": (5, 5, bad),
    }.items():
        with pytest.raises(MediaError, match=f"{name} must be an integer"):
            resize_plan(*arguments, CONFIG)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (45, 31), (56, 28), (13, 70)])
def test_patches_equal_a_slow_loop(width: int, height: int) -> None:
    array = picture(width, height)
    pixel_values, grid = preprocess_image(array, CONFIG)
    padded = np.zeros((-(-height // 28) * 28, -(-width // 28) * 28, 3), dtype=np.uint8)
    padded[:height, :width] = array
    assert grid == (1, padded.shape[0] // 14, padded.shape[1] // 14)
    assert pixel_values.dtype == torch.float32
    np.testing.assert_array_equal(pixel_values.numpy(), slow_patches(padded))


def test_resized_picture_is_pillows_bicubic_on_uint8() -> None:
    config = MediaConfig(in_patch_limit=16)
    array = picture(97, 61)
    # 6 x 4 whole patches, so s = sqrt(16 / 24); int() truncates 79.2 and 49.8
    resized = Image.fromarray(array).resize((79, 49), Image.Resampling.BICUBIC)
    padded = np.zeros((56, 84, 3), dtype=np.uint8)
    padded[:49, :79] = np.asarray(resized)
    pixel_values, grid = preprocess_image(array, config)
    assert grid == (1, 4, 6)
    np.testing.assert_array_equal(pixel_values.numpy(), slow_patches(padded))


def test_patch_order_agrees_with_transformers() -> None:
    patchify = transformers_function("image_processing_kimi_k25.py", "patchify")
    array = picture(84, 56)
    plan = resize_plan(84, 56, 16384, CONFIG)
    ours = to_patches([Image.fromarray(array)], plan, CONFIG)
    normalised = (torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
    theirs, grid_h, grid_w = patchify(None, normalised, 14)
    assert (grid_h, grid_w) == (plan.grid_h, plan.grid_w)
    assert torch.equal(ours, theirs[0])


def test_padding_is_black_before_normalising() -> None:
    mean, std = (0.25, 0.5, 0.75), (0.5, 1.0, 2.0)
    config = MediaConfig(image_mean=mean, image_std=std)
    pixel_values, _ = preprocess_image(np.full((1, 1, 3), 255, np.uint8), config)
    expected = torch.tensor([(0 - m) / s for m, s in zip(mean, std, strict=True)])
    white = torch.tensor([(1 - m) / s for m, s in zip(mean, std, strict=True)])
    flat = pixel_values.permute(0, 2, 3, 1).reshape(-1, 3)
    assert torch.equal(flat[0], white)
    assert torch.equal(flat[1:], expected.expand(len(flat) - 1, 3))


@pytest.mark.parametrize(("width", "height", "grid"), [(1, 1, (2, 2)), (20000, 10, (2, 512))])
def test_extreme_pictures_are_legal(width: int, height: int, grid: tuple[int, int]) -> None:
    data = encoded(Image.new("RGB", (width, height), (1, 2, 3)), "PNG")
    pixel_values, found = preprocess_image(data, CONFIG)
    assert found == (1, *grid)
    assert pixel_values.shape == (grid[0] * grid[1], 3, 14, 14)


def test_every_form_of_a_source_gives_the_same_picture(tmp_path: Path) -> None:
    array = picture(9, 7)
    image = Image.fromarray(array)
    data = encoded(image, "PNG")
    file = tmp_path / "bild \N{SNOWMAN}.png"
    file.write_bytes(data)
    wide = np.zeros((7, 9, 4), dtype=np.uint8)
    wide[..., :3] = array
    forms = [str(file), file, data, bytearray(data), memoryview(data), image, array, wide]
    for source in [*forms, np.repeat(array, 2, axis=1)[:, ::2]]:
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        assert loaded is not image
        np.testing.assert_array_equal(np.asarray(loaded), array)
    gray = load_image(array[..., 0])
    np.testing.assert_array_equal(np.asarray(gray), np.repeat(array[..., :1], 3, axis=2))


def test_alpha_is_dropped_and_not_blended() -> None:
    clear = Image.new("RGBA", (3, 2), (200, 100, 50, 0))
    palette = Image.new("P", (3, 2), 0)
    palette.putpalette([200, 100, 50])
    for data in (encoded(clear, "PNG"), encoded(palette, "PNG", transparency=0)):
        assert load_image(data).getpixel((0, 0)) == (200, 100, 50)


def test_orientation_tag_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter
    assert load_image(encoded(Image.new("RGB", (30, 20)), "JPEG", exif=exif)).size == (30, 20)


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(data).getpixel((1, 1)) == (255, 0, 0)


def png_that_claims(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = (
        struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    )
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 9) + b"IDAT"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "empty, expected a picture"),
        (b"hello", r"\(5 bytes\): not a picture that can be read"),
        (encoded(Image.fromarray(picture(60, 60)), "PNG")[:-2000], "cannot be decoded"),
        (encoded(Image.fromarray(picture(60, 60)), "JPEG")[:-700], "cannot be decoded.*truncated"),
        (encoded(Image.new("L", (3, 3)), "TIFF"), "not a picture that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture that can be read"),
        (png_that_claims(60000, 60000), "cannot be decoded.*3600000000"),
        (png_that_claims(0, 5), "picture"),
        (Image.new("RGB", (0, 4)), "has no pixels"),
        (np.zeros((0, 4, 3), np.uint8), "has no pixels"),
        (np.broadcast_to(np.uint8(0), (1, MAX_PIXELS + 1)), "expected at most 178956970"),
        (np.zeros((4, 4, 3), np.float32), r"expected a uint8 array.*float32 \[4, 4, 3\]"),
        (np.zeros((4, 4, 2), np.uint8), "expected a uint8 array"),
        (np.zeros((1, 4, 4, 3), np.uint8), "expected a uint8 array"),
        (None, r"\(NoneType\): expected a path"),
        (7, "expected a path"),
        (["a.png"], "expected a path"),
        ("no such\0file", "no such file"),
        ("x" * 5000, "no such file"),
        ("http://host/a.png", "no such file"),
        (".", "not a regular file"),
    ],
    ids=range(21),
)
def test_bad_pictures_are_one_clear_error(source: Any, message: str) -> None:
    with pytest.raises(MediaError, match=message) as caught:
        load_image(source)
    assert isinstance(caught.value, KimiError)
    assert "\n" not in str(caught.value)


def test_a_pipe_and_a_closed_picture_are_errors(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(MediaError, match="not a regular file"):
        load_image(pipe)
    file = tmp_path / "a.png"
    file.write_bytes(encoded(Image.fromarray(picture(9, 9)), "PNG"))
    with Image.open(file) as image:
        pass
    with pytest.raises(MediaError, match="closed before the pixels were read"):
        load_image(image)
