"""Clips: sampling, reading, and cutting into chunks of frames.

A clip is sampled at 2 frames a second, its frames are grouped by four, and each group becomes one
chunk: one grid entry (t, h, w) of the vision tower and one timestamp in the prompt.

Source of every rule: the behaviour of the preprocessing published with the Kimi K2.5 checkpoint,
except where a comment says that it is not published.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

import av
import numpy as np
import numpy.typing as npt
import torch
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from PIL import Image

from kimi_ops.model.errors import MediaError
from kimi_ops.model.media_config import MediaConfig, is_integer, is_positive_number
from kimi_ops.model.picture import (
    ImageSource,
    ResizePlan,
    describe_source,
    fit_image,
    load_image,
    open_source,
    resize_plan,
    to_patches,
)

# Context of Kimi K2.5. A clip that alone needs more can never be used, so it is refused before its
# frames are read: that also bounds the memory that a clip can take.
CONTEXT_TOKENS = 262_144

# An allow-list of container formats, because others (HLS playlists, concat scripts, image
# sequences) make FFmpeg open further files and network addresses named inside the clip.
CLIP_FORMATS = "mov,matroska,avi,mpegts,mpeg,ogg,flv,asf,gif"

# FFmpeg refuses larger frames before it allocates them. 8K video has 35,389,440 pixels.
MAX_FRAME_PIXELS = 8192 * 4320

# Relative difference between the announced rate and the one of the timestamps from which the
# former is not believed. Millisecond timestamps are off by less; where it matters (recordings with
# a variable rate in Matroska or WebM) the announced rate is a guess and off by a factor.
_RATE_TOLERANCE = 0.05

ClipSource: TypeAlias = (
    ImageSource | Sequence[Image.Image] | Sequence[npt.NDArray[np.uint8]] | npt.NDArray[np.uint8]
)


@dataclass(frozen=True)
class VideoClip:
    """The sampled frames of a clip.

    Attributes:
        frames: RGB pictures at the sampled positions, already resized to `plan`, so that a clip
            takes no more memory than the model sees of it.
        plan: the size that all frames share.
        fps: frames per second of the whole clip (its average, for a variable rate).
        frame_ids: position of each sampled frame in the clip, from 0.
        n_frames: frames of the whole clip.
    """

    frames: tuple[Image.Image, ...]
    plan: ResizePlan
    fps: float
    frame_ids: tuple[int, ...]
    n_frames: int


@dataclass(frozen=True)
class VideoChunk:
    """Up to `temporal_merge_kernel_size` consecutive sampled frames.

    Attributes:
        pixel_values: [t * h * w, 3, P, P] float32.
        grid: (t, h, w), frames and patches.
        timestamp: start of the chunk, "HH:MM:SS.mmm".
        tokens: tokens in the prompt, the same for any number of frames.
    """

    pixel_values: torch.Tensor
    grid: tuple[int, int, int]
    timestamp: str
    tokens: int


def sample_frames(n_frames: int, fps: float, config: MediaConfig) -> list[int]:
    """Positions of the frames that are taken from a clip.

    n = max(round(n_frames * min(sample_fps, fps) / fps), 1), at most max_num_frames_each_video,
    spread evenly from the first to the last frame and rounded half to even.

    Raises:
        MediaError: n_frames or fps is no positive number, or so many frames are sampled that the
            clip cannot fit into the context of the model at any picture size.
    """
    if not is_integer(n_frames) or n_frames < 1:
        raise MediaError(f"clip: expected at least 1 frame, got {n_frames!r}")
    if not is_positive_number(fps):
        raise MediaError(f"clip: fps must be a finite number above 0, got {fps!r}")
    wanted = max(round(n_frames * min(config.sample_fps, fps) / fps), 1)
    if config.max_num_frames_each_video is not None:
        wanted = min(wanted, config.max_num_frames_each_video)
    _check_tokens(wanted, 1, config, label="clip")
    return [int(position) for position in np.round(np.linspace(0, n_frames - 1, wanted))]


def format_timestamp(seconds: float) -> str:
    """Formats a time as "HH:MM:SS.mmm": truncated to milliseconds, hours wrapping at 24.

    Raises:
        MediaError: a time that is negative or not finite.
    """
    if seconds != 0 and not is_positive_number(seconds):
        raise MediaError(f"clip: a timestamp must be a finite number from 0, got {seconds!r}")
    whole = int(seconds)
    hours, minutes, rest = whole // 3600 % 24, whole // 60 % 60, whole % 60
    return f"{hours:02d}:{minutes:02d}:{rest:02d}.{int(seconds % 1 * 1000):03d}"


def load_video(source: ClipSource, config: MediaConfig, *, fps: float | None = None) -> VideoClip:
    """Reads the sampled frames of a clip.

    The number of frames is that of the frames which decode, whatever the container announces.
    The frame rate is the container's average rate, or the one of the timestamps where the two
    disagree by more than 5 percent. The rotation that phones write into a clip is applied, as in
    every player (how the published preprocessing treats it is not known); the shape of
    non-square pixels is not. A clip that was cut off is an error where the container shows it
    (MP4 and AVI, unless between two frames); Matroska, WebM, FLV and GIF often do not and are then
    read as far as they go.

    Args:
        source: a path or the bytes of a clip (`CLIP_FORMATS`); or its frames: a sequence of Pillow
            images or uint8 arrays [H, W, 3], or one uint8 array [N, H, W, 3].
        config: the media configuration.
        fps: frames per second; needed with a sequence of frames, and only with it.

    Raises:
        MediaError: no such file, not a clip, no video stream or no frame in it, damaged data,
            frames of different sizes, no frame rate, or more tokens than `CONTEXT_TOKENS`.
    """
    label = f"clip {describe_source(source)}"
    if isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
        if fps is not None:
            raise MediaError(f"{label}: fps is read from the file and cannot be given, got {fps!r}")
        return _load_file(source, config, label)
    return _load_frames(source, config, fps, label)


def preprocess_video(clip: VideoClip, config: MediaConfig) -> list[VideoChunk]:
    """Cuts a clip into chunks, the last of which may be shorter.

    Args:
        clip: what `load_video` returned for this same configuration.
        config: the media configuration.

    Raises:
        MediaError: the clip was loaded with another patch size or has frames of another size.
    """
    plan = clip.plan
    padded = (plan.new_width + plan.pad_right, plan.new_height + plan.pad_bottom)
    grid = (plan.grid_w * config.patch_size, plan.grid_h * config.patch_size)
    sizes = {frame.size for frame in clip.frames}
    if padded != grid or sizes != {(plan.new_width, plan.new_height)}:
        raise MediaError(
            f"clip: expected frames of {plan.new_width}x{plan.new_height} pixels, padded to a "
            f"{plan.grid_w}x{plan.grid_h} grid of {config.patch_size}-pixel patches, got sizes "
            f"{sorted(sizes)}; was it loaded with another media config?"
        )
    chunks = []
    step = config.temporal_merge_kernel_size
    for start in range(0, len(clip.frames), step):
        frames = clip.frames[start : start + step]
        chunks.append(
            VideoChunk(
                pixel_values=to_patches(frames, plan, config),
                grid=(len(frames), plan.grid_h, plan.grid_w),
                timestamp=format_timestamp(clip.frame_ids[start] / clip.fps),
                tokens=plan.tokens,
            )
        )
    return chunks


def _check_tokens(frames: int, tokens_per_chunk: int, config: MediaConfig, label: str) -> None:
    chunks = math.ceil(frames / config.temporal_merge_kernel_size)
    if chunks * tokens_per_chunk > CONTEXT_TOKENS:
        raise MediaError(
            f"{label}: {frames} sampled frames need {chunks * tokens_per_chunk} tokens, expected "
            f"at most {CONTEXT_TOKENS}; cut the clip, or lower sample_fps or "
            f"max_num_frames_each_video"
        )


def _load_frames(source: Any, config: MediaConfig, fps: float | None, label: str) -> VideoClip:
    if not isinstance(source, (Sequence, np.ndarray)):
        raise MediaError(f"{label}: expected a path, bytes, or a sequence of frames")
    if fps is None:
        raise MediaError(f"{label}: a sequence of frames needs fps, got None")
    if isinstance(source, np.ndarray) and source.ndim != 4:
        raise MediaError(f"{label}: expected an array [N, H, W, 3], got {list(source.shape)}")
    if len(source) == 0:
        raise MediaError(f"{label}: has no frames")
    collector = _FrameCollector(sample_frames(len(source), fps, config), config, label)
    for position in collector.frame_ids:
        try:
            image = load_image(source[position])
        except MediaError as error:
            raise MediaError(f"{label}: frame {position}: {error}") from error
        collector.check_size(image.width, image.height, position)
        collector.add(image)
    return collector.clip(fps=float(fps), n_frames=len(source))


def _load_file(source: Any, config: MediaConfig, label: str) -> VideoClip:
    packets, fps = _scan(source, label)
    n_frames = packets
    # Packets and frames agree but for damaged and unusual streams; there the first reading gives
    # the number and the second one samples by it. More readings mean a file that is being written.
    for _ in range(3):
        collector = _FrameCollector(sample_frames(n_frames, fps, config), config, label)
        decoded = _decode(source, collector, label)
        if decoded == n_frames:
            return collector.clip(fps=fps, n_frames=n_frames)
        if decoded == 0:
            raise MediaError(f"{label}: none of its {packets} video packets gives a frame")
        n_frames = decoded
    raise MediaError(f"{label}: gives another number of frames at each reading")


class _FrameCollector:
    """Keeps the sampled frames of one reading, each resized as it comes."""

    def __init__(self, frame_ids: list[int], config: MediaConfig, label: str) -> None:
        self.frame_ids = frame_ids
        self.config = config
        self.label = label
        self.frames: list[Image.Image] = []
        self.size: tuple[int, int] | None = None
        self.plan: ResizePlan | None = None

    def check_size(self, width: int, height: int, position: int) -> None:
        if self.size is None:
            self.size = (width, height)
        elif self.size != (width, height):
            raise MediaError(
                f"{self.label}: frame {position} has {width}x{height} pixels, expected "
                f"{self.size[0]}x{self.size[1]} like the frames before it"
            )

    def add(self, image: Image.Image) -> None:
        if self.plan is None:
            limit = self.config.in_patch_limit_each_frame
            self.plan = resize_plan(image.width, image.height, limit, self.config)
            _check_tokens(len(self.frame_ids), self.plan.tokens, self.config, self.label)
        self.frames.append(fit_image(image, self.plan))

    def clip(self, fps: float, n_frames: int) -> VideoClip:
        assert self.plan is not None  # frame 0 is always among the sampled ones
        return VideoClip(tuple(self.frames), self.plan, fps, tuple(self.frame_ids), n_frames)


@contextmanager
def _opened(source: Any, label: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens the first video stream; cover art of an audio file is none.

    Everything that FFmpeg says about the data becomes MediaError, also inside the `with` block.
    """
    options = {"format_whitelist": CLIP_FORMATS}
    try:
        with (
            open_source(source, label) as file,
            av.open(file, "r", options=options, metadata_errors="replace") as container,
        ):
            for stream in container.streams.video:
                if not stream.disposition & Disposition.attached_pic:
                    break
            else:
                raise MediaError(f"{label}: has no video stream")
            if stream.codec_context is None:
                raise MediaError(f"{label}: its video codec is not supported")
            stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
            yield container, stream
    except av.FFmpegError as error:
        reason = error.strerror or type(error).__name__
        raise MediaError(f"{label}: not a clip that can be decoded: {reason}") from error


def _scan(source: Any, label: str) -> tuple[int, float]:
    """Number of video packets and frames per second, without decoding."""
    count = 0
    times = []
    with _opened(source, label) as (container, stream):
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise MediaError(f"{label}: truncated or damaged, from video packet {count} on")
            if packet.size:
                count += 1
                times.append(packet.pts)
        announced, time_base = stream.average_rate, stream.time_base
    if count == 0:
        raise MediaError(f"{label}: has no frames")
    known = [time for time in times if time is not None]
    span = (max(known) - min(known)) * (time_base or 0) if len(known) == count else 0
    measured = Fraction(count - 1) / span if span > 0 else None
    if announced and (measured is None or abs(announced / measured - 1) <= _RATE_TOLERANCE):
        return count, float(announced)
    if measured:
        return count, float(measured)
    if count == 1:
        return count, 1.0  # a single frame stands at time 0 at any rate
    raise MediaError(f"{label}: states neither a frame rate nor the times of its frames")


def _decode(source: Any, collector: _FrameCollector, label: str) -> int:
    """Decodes the clip once, gives the sampled frames to `collector`, returns how many exist."""
    wanted = set(collector.frame_ids)
    count = 0
    with _opened(source, label) as (container, stream):
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise MediaError(f"{label}: frame {count} is damaged")
            collector.check_size(frame.width, frame.height, count)
            if count in wanted:
                collector.add(_upright(frame))
            count += 1
    return count


def _upright(frame: av.VideoFrame) -> Image.Image:
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    turn = {
        90: Image.Transpose.ROTATE_90,
        180: Image.Transpose.ROTATE_180,
        270: Image.Transpose.ROTATE_270,
    }.get(frame.rotation % 360)  # FFmpeg and Pillow both count counter-clockwise
    return image if turn is None else image.transpose(turn)
