"""Pictures: reading, the resize plan, and cutting into patches.

Stages, in the order a picture passes them: `load_image` (file, bytes or array to RGB),
`resize_plan` (the size it gets), `fit_image` (bicubic resize), `to_patches` (pad, normalise, cut).
Clips share all but the first (`kimi_ops.model.video`); prompts are in `kimi_ops.model.media`.

Source of every rule: the behaviour of the preprocessing published with the Kimi K2.5 checkpoint.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFile, UnidentifiedImageError

from kimi_ops.model.errors import MediaError
from kimi_ops.model.media_config import MediaConfig, is_integer

# Pillow refuses by itself above this number (twice `Image.MAX_IMAGE_PIXELS`), so it is what the
# published preprocessing accepts too; stated here so that it holds for arrays and for programs
# that have switched Pillow's own check off. A picture takes four bytes a pixel and four more while
# it is converted: 1.4 GB at this limit, which a small file can ask for.
MAX_PIXELS = 178_956_970

# An allow-list. Pillow also opens formats that start other programs (EPS runs Ghostscript), and
# TIFF, where damaged files gave arbitrary exceptions, lines on stderr and a gigabyte of memory; a
# caller who needs one of those opens it and passes the Pillow image.
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM", "AVIF")

# What Pillow's decoders raise on damaged data; damage shows as a different one of them in each
# format (RuntimeError is AVIF's). Anything else is a fault of this package and surfaces as itself.
_DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    RuntimeError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)

_MAX_SIDE = 2**31 - 1

ImageSource: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | npt.NDArray[np.uint8]
)


@dataclass(frozen=True)
class ResizePlan:
    """Size of a picture or frame on its way into the model.

    Attributes:
        new_width, new_height: pixels after the resize.
        pad_right, pad_bottom: black pixels added to reach whole merged patches.
        grid_h, grid_w: patches of the padded picture.
        tokens: tokens that the picture (or a chunk of such frames) takes in the prompt.
    """

    new_width: int
    new_height: int
    pad_right: int
    pad_bottom: int
    grid_h: int
    grid_w: int
    tokens: int


def resize_plan(width: int, height: int, limit: int, config: MediaConfig) -> ResizePlan:
    """Size that a picture of `width` x `height` pixels gets; it is never enlarged.

    With p = patch_size, L = patch_limit_on_one_side and m = merge_kernel_size:
    s = min(1, sqrt(limit / (max(1, width // p) * max(1, height // p))), L*p / width, L*p / height);
    each side becomes min(max(1, int(side * s)), L*p) and is padded to a multiple of m*p.

    Args:
        width: pixels, at least 1.
        height: pixels, at least 1.
        limit: patches, `config.in_patch_limit` or `config.in_patch_limit_each_frame`. Rounding and
            padding may exceed it.
        config: the media configuration.

    Raises:
        MediaError: a size or limit that is no positive integer.
    """
    for name, value in (("width", width), ("height", height), ("limit", limit)):
        if not is_integer(value) or not 1 <= value <= _MAX_SIDE:
            raise MediaError(f"resize: {name} must be an integer from 1 to 2^31 - 1, got {value!r}")
    patch = config.patch_size
    longest = config.patch_limit_on_one_side * patch
    patches = max(1, width // patch) * max(1, height // patch)
    scale = min(1.0, math.sqrt(limit / patches), longest / width, longest / height)
    new_width = min(max(1, int(width * scale)), longest)
    new_height = min(max(1, int(height * scale)), longest)
    multiple = config.merge_kernel_size * patch
    pad_right = -new_width % multiple
    pad_bottom = -new_height % multiple
    grid_h = (new_height + pad_bottom) // patch
    grid_w = (new_width + pad_right) // patch
    return ResizePlan(
        new_width=new_width,
        new_height=new_height,
        pad_right=pad_right,
        pad_bottom=pad_bottom,
        grid_h=grid_h,
        grid_w=grid_w,
        tokens=grid_h * grid_w // config.merge_kernel_size**2,
    )


def load_image(source: ImageSource) -> Image.Image:
    """Reads a picture as RGB, exactly as Pillow's `convert("RGB")` gives it.

    As in the published preprocessing, an alpha channel is dropped (not blended with a background)
    and the EXIF orientation is not applied. An animated file gives its first frame.

    Args:
        source: a path (a regular file in one of `PICTURE_FORMATS`), the bytes of such a file, a
            Pillow image, or a uint8 array [H, W], [H, W, 3] or [H, W, 4] (RGB order).

    Returns:
        A new Pillow image of mode "RGB".

    Raises:
        MediaError: no such file, not a picture, truncated or damaged, no pixels, more than
            `MAX_PIXELS` pixels, or a source of another type.
    """
    label = f"picture {describe_source(source)}"
    if isinstance(source, Image.Image):
        # Pillow reads pixels late and meets a file that was closed before with an assertion.
        if isinstance(source, ImageFile.ImageFile) and source.tile and source.fp is None:
            raise MediaError(f"{label}: its file was closed before the pixels were read")
        return _to_rgb(source, label)
    if isinstance(source, np.ndarray):
        return _to_rgb(_image_of_array(source, label), label)
    try:
        with open_source(source, label) as stream:
            if not stream.read(1):
                raise MediaError(f"{label}: empty, expected a picture")
            stream.seek(0)
            with Image.open(stream, formats=PICTURE_FORMATS) as image:
                return _to_rgb(image, label)
    except UnidentifiedImageError as error:
        expected = ", ".join(PICTURE_FORMATS)
        raise MediaError(f"{label}: not a picture that can be read ({expected})") from error
    except MediaError:
        raise
    except _DECODE_ERRORS as error:
        raise MediaError(f"{label}: cannot be decoded: {_reason(error)}") from error


def fit_image(image: Image.Image, plan: ResizePlan) -> Image.Image:
    """Bicubic resize to the plan, on uint8 and also when the size is already right."""
    return image.resize((plan.new_width, plan.new_height), Image.Resampling.BICUBIC)


def to_patches(
    images: Sequence[Image.Image], plan: ResizePlan, config: MediaConfig
) -> torch.Tensor:
    """Pads, normalises and cuts pictures that `fit_image` brought to one plan.

    Padding is black before normalising, so it ends as (0 - mean) / std.

    Args:
        images: t pictures of plan.new_width x plan.new_height pixels.
        plan: the size they share.
        config: the media configuration.

    Returns:
        [t * grid_h * grid_w, 3, P, P] float32, (value / 255 - mean) / std, patches ordered by
        frame, then row, then column; each patch by channel, row, column.
    """
    patch, grid_h, grid_w = config.patch_size, plan.grid_h, plan.grid_w
    canvas = np.zeros((len(images), grid_h * patch, grid_w * patch, 3), dtype=np.uint8)
    for frame, image in enumerate(images):
        canvas[frame, : plan.new_height, : plan.new_width] = np.asarray(image)
    patches = (
        torch.from_numpy(canvas)
        .view(len(images), grid_h, patch, grid_w, patch, 3)
        .permute(0, 1, 3, 5, 2, 4)
        .reshape(-1, 3, patch, patch)
        .to(torch.float32)
    )
    mean = torch.tensor(config.image_mean, dtype=torch.float32).view(3, 1, 1)
    std = torch.tensor(config.image_std, dtype=torch.float32).view(3, 1, 1)
    return patches.div_(255).sub_(mean).div_(std)


def preprocess_image(
    image: ImageSource, config: MediaConfig
) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Turns one picture into the input of the vision tower.

    Args:
        image: whatever `load_image` takes.
        config: the media configuration.

    Returns:
        pixel_values [grid_h * grid_w, 3, P, P] float32 and the grid (1, grid_h, grid_w), both
        numbers of the grid being multiples of merge_kernel_size.

    Raises:
        MediaError: see `load_image`.
    """
    rgb = load_image(image)
    plan = resize_plan(rgb.width, rgb.height, config.in_patch_limit, config)
    pixel_values = to_patches([fit_image(rgb, plan)], plan, config)
    return pixel_values, (1, plan.grid_h, plan.grid_w)


def open_source(
    source: str | os.PathLike[str] | bytes | bytearray | memoryview, label: str
) -> BinaryIO:
    """Opens a regular file, or bytes, for reading. Raises MediaError for anything else."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source)
    if not isinstance(source, (str, os.PathLike)):
        raise MediaError(f"{label}: expected a path, bytes, picture or array")
    # A named pipe would wait for ever and a device never ends; `isfile` is also False, not an
    # error, for names that no file can have.
    if not os.path.isfile(source):
        problem = "not a regular file" if os.path.exists(source) else "no such file"
        raise MediaError(f"{label}: {problem}")
    try:
        return open(source, "rb")
    except OSError as error:
        raise MediaError(f"{label}: cannot be opened: {error.strerror or error}") from error


def describe_source(source: object) -> str:
    """Names a source in messages: the path, or what kind of object it is."""
    if isinstance(source, (str, os.PathLike)):
        return repr(os.fspath(source))
    if isinstance(source, memoryview):
        return f"({source.nbytes} bytes)"
    if isinstance(source, (bytes, bytearray)):
        return f"({len(source)} bytes)"
    return f"({type(source).__name__})"


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _image_of_array(array: npt.NDArray[Any], label: str) -> Image.Image:
    shape_is_right = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not shape_is_right:
        raise MediaError(
            f"{label}: expected a uint8 array [H, W], [H, W, 3] or [H, W, 4], "
            f"got {array.dtype} {list(array.shape)}"
        )
    _check_size(array.shape[1], array.shape[0], label)
    return Image.fromarray(np.ascontiguousarray(array))


def _to_rgb(image: Image.Image, label: str) -> Image.Image:
    _check_size(image.width, image.height, label)
    try:
        return image.convert("RGB")
    except _DECODE_ERRORS as error:
        raise MediaError(f"{label}: cannot be decoded: {_reason(error)}") from error


def _check_size(width: int, height: int, label: str) -> None:
    if width < 1 or height < 1:
        raise MediaError(f"{label}: has no pixels ({width}x{height})")
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"{label}: {width}x{height} is {width * height} pixels, expected at most {MAX_PIXELS}"
        )
