"""Media of a prompt: pictures and clips in order of appearance, and the text that stands for them.

`MediaProcessor` turns pictures and clips into the input of the vision tower; `expand_placeholders`
puts as many `<|media_pad|>` tokens into the rendered prompt as each of them takes. The stages are
in `kimi_ops.model.picture` and `kimi_ops.model.video`; their public names are here as well.

Source: the prompt format published with Kimi K2.5 (chat template and preprocessing).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from kimi_ops.model.errors import MediaError
from kimi_ops.model.media_config import MediaConfig
from kimi_ops.model.picture import ResizePlan, load_image, preprocess_image, resize_plan
from kimi_ops.model.video import (
    VideoChunk,
    VideoClip,
    format_timestamp,
    load_video,
    preprocess_video,
    sample_frames,
)

__all__ = [
    "MEDIA_BEGIN",
    "MEDIA_CONTENT",
    "MEDIA_END",
    "MEDIA_PAD",
    "VIDEO_PLACEHOLDER",
    "MediaBatch",
    "MediaConfig",
    "MediaItem",
    "MediaProcessor",
    "Medium",
    "ResizePlan",
    "VideoChunk",
    "VideoClip",
    "expand_placeholders",
    "format_timestamp",
    "load_image",
    "load_video",
    "preprocess_image",
    "preprocess_video",
    "resize_plan",
    "sample_frames",
]

MEDIA_BEGIN = "<|media_begin|>"
MEDIA_CONTENT = "<|media_content|>"
MEDIA_PAD = "<|media_pad|>"
MEDIA_END = "<|media_end|>"
VIDEO_PLACEHOLDER = "<|kimi_k25_video_placeholder|>"

MediaKind: TypeAlias = Literal["image", "video"]

_KIND_OF_PLACEHOLDER: dict[str, MediaKind] = {MEDIA_PAD: "image", VIDEO_PLACEHOLDER: "video"}
_PLACEHOLDER = re.compile("|".join(re.escape(token) for token in _KIND_OF_PLACEHOLDER))


@dataclass(frozen=True)
class MediaItem:
    """A picture or clip to process.

    Attributes:
        kind: "image" or "video".
        source: whatever `load_image` or `load_video` takes.
        fps: frames per second, for a clip given as a sequence of frames.
    """

    kind: MediaKind
    source: Any
    fps: float | None = None


@dataclass(frozen=True)
class Medium:
    """What one picture or clip became.

    Attributes:
        kind: "image" or "video".
        grids: (t, h, w) of its entries of `grid_thws`: one of a picture, one per chunk of a clip.
        tokens: how many `<|media_pad|>` it takes, the sum of h * w / merge_kernel_size^2.
        replacement: the text that takes the place of the template's placeholder.
        text: the same with the frame around it, for a prompt written without a template. A clip's
            placeholder stands outside the frames of its chunks, so there both are equal.
    """

    kind: MediaKind
    grids: tuple[tuple[int, int, int], ...]
    tokens: int
    replacement: str
    text: str


@dataclass(frozen=True)
class MediaBatch:
    """Input of the vision tower for a sequence of media.

    Attributes:
        pixel_values: [sum of t*h*w, 3, P, P] float32, the patches of all media in order.
        grid_thws: [n, 3] int64, one row per picture and per chunk of a clip.
        media: one entry per picture or clip, in order.
    """

    pixel_values: torch.Tensor
    grid_thws: torch.Tensor
    media: tuple[Medium, ...]


class MediaProcessor:
    """Prepares the pictures and clips of a prompt."""

    def __init__(self, config: MediaConfig | None = None) -> None:
        """Uses the released values of Kimi K2.5 where `config` is None."""
        self.config = MediaConfig() if config is None else config

    def __call__(self, items: Sequence[MediaItem]) -> MediaBatch:
        """Processes media in the order in which they appear in the prompt.

        Args:
            items: pictures and clips; none at all gives empty tensors.

        Raises:
            MediaError: a medium that cannot be read; the message starts with its place.
        """
        pixel_values: list[torch.Tensor] = []
        media: list[Medium] = []
        for place, item in enumerate(items):
            try:
                patches, medium = self._process(item)
            except MediaError as error:
                raise MediaError(f"medium {place}: {error}") from error
            pixel_values.extend(patches)
            media.append(medium)
        patch = self.config.patch_size
        grids = [grid for medium in media for grid in medium.grids]
        return MediaBatch(
            pixel_values=torch.cat([torch.empty(0, 3, patch, patch), *pixel_values]),
            grid_thws=torch.tensor(grids, dtype=torch.int64).view(-1, 3),
            media=tuple(media),
        )

    def _process(self, item: MediaItem) -> tuple[list[torch.Tensor], Medium]:
        if not isinstance(item, MediaItem):
            raise MediaError(f"expected a MediaItem, got {type(item).__name__}")
        if item.kind == "image":
            if item.fps is not None:
                raise MediaError(f"a picture has no fps, got {item.fps!r}")
            patches, grid = preprocess_image(item.source, self.config)
            pads = grid[1] * grid[2] // self.config.merge_kernel_size**2
            replacement = MEDIA_PAD * pads
            text = _framed("image", replacement)
            return [patches], Medium("image", (grid,), pads, replacement, text)
        if item.kind == "video":
            clip = load_video(item.source, self.config, fps=item.fps)
            chunks = preprocess_video(clip, self.config)
            text = "".join(
                chunk.timestamp + _framed("video", MEDIA_PAD * chunk.tokens) for chunk in chunks
            )
            grids = tuple(chunk.grid for chunk in chunks)
            tokens = sum(chunk.tokens for chunk in chunks)
            patches_of_chunks = [chunk.pixel_values for chunk in chunks]
            return patches_of_chunks, Medium("video", grids, tokens, text, text)
        raise MediaError(f"kind must be 'image' or 'video', got {item.kind!r}")


def expand_placeholders(text: str, media: Sequence[Medium]) -> str:
    """Replaces each placeholder of a rendered prompt by the text of its medium, in order.

    A picture's placeholder is the one `<|media_pad|>` that the template writes between
    `<|media_content|>` and `<|media_end|>`; a clip's is `<|kimi_k25_video_placeholder|>`.

    Args:
        text: the rendered prompt, not expanded yet.
        media: `MediaBatch.media`, in order of appearance.

    Raises:
        MediaError: the numbers of placeholders and media differ, or their order does.
    """
    kinds = [_KIND_OF_PLACEHOLDER[match.group()] for match in _PLACEHOLDER.finditer(text)]
    given = [medium.kind for medium in media]
    if Counter(kinds) != Counter(given):
        raise MediaError(
            f"the prompt has placeholders for {_numbers(kinds)}, but {_numbers(given)} were given"
        )
    for place, (expected, got) in enumerate(zip(kinds, given, strict=True)):
        if expected != got:
            raise MediaError(
                f"medium {place}: the prompt has a placeholder for {expected!r} here, "
                f"but {got!r} was given"
            )
    replacements = iter(media)
    return _PLACEHOLDER.sub(lambda _: next(replacements).replacement, text)


def _framed(kind: MediaKind, pads: str) -> str:
    return f"{MEDIA_BEGIN}{kind}{MEDIA_CONTENT}{pads}{MEDIA_END}"


def _numbers(kinds: Sequence[MediaKind]) -> str:
    counts = Counter(kinds)
    return f"{counts['image']} image(s) and {counts['video']} video(s)"
