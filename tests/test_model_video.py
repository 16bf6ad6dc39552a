"""Clips: sampling, timestamps, frames in memory and chunks of Kimi K2.5.

Expected values are worked out from the published rules: positions rounded half to even, times
truncated to milliseconds, chunks of four sampled frames.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kimi_ops.model.errors import MediaError
from kimi_ops.model.media import (
    MediaConfig,
    format_timestamp,
    load_video,
    preprocess_image,
    preprocess_video,
    sample_frames,
)

CONFIG = MediaConfig()


@pytest.mark.parametrize(
    ("n_frames", "fps", "expected"),
    [
        (1, 30.0, [0]),
        (10, 30.0, [0]),  # round(10 * 2 / 30) = 1
        (100, 30.0, [0, 16, 33, 50, 66, 82, 99]),  # 16.5, 49.5 and 82.5 go to the even number
        (5, 4.0, [0, 4]),  # round(2.5) = 2
        (7, 4.0, [0, 2, 4, 6]),  # round(3.5) = 4
        (4, 1.0, [0, 1, 2, 3]),  # slower than 2 a second: every frame
        (3, 1e-300, [0, 1, 2]),
        (3, 1e300, [0]),
    ],
)
def test_sampled_positions(n_frames: int, fps: float, expected: list[int]) -> None:
    assert sample_frames(n_frames, fps, CONFIG) == expected


def test_sampling_obeys_the_configured_rate_and_cap() -> None:
    assert sample_frames(9, 8.0, MediaConfig(sample_fps=8)) == list(range(9))
    assert sample_frames(100, 1.0, MediaConfig(max_num_frames_each_video=4)) == [0, 33, 66, 99]


@pytest.mark.parametrize(
    ("n_frames", "fps", "message"),
    [
        (0, 2.0, "at least 1 frame, got 0"),
        (True, 2.0, "at least 1 frame"),
        (2.0, 2.0, "at least 1 frame"),
        (5, 0, "fps must be a finite number above 0, got 0"),
        (5, float("nan"), "fps must be"),
        (5, float("inf"), "fps must be"),
        (5, "30", "fps must be"),
        (10**18, 2.0, "at most 262144"),
    ],
)
def test_sampling_refuses_what_is_no_clip(n_frames: Any, fps: Any, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        sample_frames(n_frames, fps, CONFIG)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "00:00:00.000"),
        (3661.5, "01:01:01.500"),
        (100 / 29.97, "00:00:03.336"),  # 3.33666...: truncated, not rounded
        (86399.9999, "23:59:59.999"),
        (86400, "00:00:00.000"),
        (90061.25, "01:01:01.250"),
    ],
)
def test_timestamps(seconds: float, expected: str) -> None:
    assert format_timestamp(seconds) == expected


def test_timestamps_agree_with_the_clock_of_the_system() -> None:
    for seconds in np.random.default_rng(1).uniform(0, 200_000, 2000).tolist():
        clock = time.strftime("%H:%M:%S", time.gmtime(seconds))
        assert format_timestamp(seconds) == f"{clock}.{int(seconds % 1 * 1000):03d}"


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf"), "1", None])
def test_timestamps_of_no_time(seconds: Any) -> None:
    with pytest.raises(MediaError, match="a timestamp must be"):
        format_timestamp(seconds)


def test_frames_in_memory_are_sampled_like_a_file() -> None:
    gray = [np.full((16, 32, 3), index, np.uint8) for index in range(20)]
    for source in (gray, np.stack(gray), [Image.fromarray(frame) for frame in gray]):
        clip = load_video(source, CONFIG, fps=8)
        assert clip.n_frames == 20
        assert clip.fps == 8.0
        assert list(clip.frame_ids) == [0, 5, 10, 14, 19]
        assert [frame.getpixel((0, 0)) for frame in clip.frames] == [
            (index,) * 3 for index in clip.frame_ids
        ]


def test_frames_in_memory_that_are_no_clip() -> None:
    frames = np.zeros((3, 8, 8, 3), np.uint8)
    mixed = [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))]
    bad: list[tuple[Any, float | None, str]] = [
        (frames, None, "needs fps, got None"),
        (frames, -1.0, "fps must be"),
        (frames[:0], 2.0, "has no frames"),
        ([], 2.0, "has no frames"),
        (frames[0], 2.0, r"expected an array \[N, H, W, 3\], got \[8, 8, 3\]"),
        (frames.astype(np.float32), 2.0, "frame 0: .*expected a uint8 array"),
        ([frames[0], None], 2.0, "frame 1: .*expected a path"),
        (mixed, 2.0, "frame 1 has 8x9 pixels, expected 8x8"),
        (torch.zeros(3, 8, 8, 3), 2.0, "expected a path, bytes, or a sequence"),
    ]
    for source, fps, message in bad:
        with pytest.raises(MediaError, match=message):
            load_video(source, CONFIG, fps=fps)


def test_clips_beyond_the_context_are_refused_before_they_are_read() -> None:
    # 1,200 samples of 1920x1080 are 300 chunks of 1,032 tokens, more than 262,144
    pixel = np.zeros((1, 1, 1, 3), np.uint8)
    long_clip = np.broadcast_to(pixel, (1200, 1080, 1920, 3))
    with pytest.raises(MediaError, match="1200 sampled frames need 309600 tokens"):
        load_video(long_clip, CONFIG, fps=2.0)
    with pytest.raises(MediaError, match="at most 262144"):
        load_video(np.broadcast_to(pixel, (10**8, 1, 1, 3)), CONFIG, fps=2.0)


def test_chunks_hold_four_frames_and_the_last_one_the_rest() -> None:
    rng = np.random.default_rng(3)
    frames = rng.integers(0, 256, (10, 30, 50, 3), dtype=np.uint8)
    clip = load_video(frames, CONFIG, fps=1.5)
    chunks = preprocess_video(clip, CONFIG)
    # 50x30 is padded to 56x56; chunks start at frames 0, 4 and 8: 0 s, 2.666 s, 5.333 s
    assert [chunk.grid for chunk in chunks] == [(4, 4, 4), (4, 4, 4), (2, 4, 4)]
    stamps = ["00:00:00.000", "00:00:02.666", "00:00:05.333"]
    assert [chunk.timestamp for chunk in chunks] == stamps
    assert [chunk.tokens for chunk in chunks] == [4, 4, 4]
    expected = torch.cat([preprocess_image(frame, CONFIG)[0] for frame in frames])
    assert torch.equal(torch.cat([chunk.pixel_values for chunk in chunks]), expected)


def test_a_chunk_starts_at_the_time_of_its_first_sampled_frame() -> None:
    clip = load_video(np.zeros((20, 8, 8, 3), np.uint8), CONFIG, fps=8.0)
    # frames 0, 5, 10, 14 and 19 of 20 at 8 a second: the second chunk starts at 19 / 8 s
    chunks = preprocess_video(clip, CONFIG)
    assert [chunk.timestamp for chunk in chunks] == ["00:00:00.000", "00:00:02.375"]


def test_frames_are_reduced_to_the_limit_of_a_frame() -> None:
    config = MediaConfig(in_patch_limit_each_frame=16)
    frames = np.random.default_rng(4).integers(0, 256, (1, 61, 97, 3), dtype=np.uint8)
    clip = load_video(frames, config, fps=2.0)
    expected = preprocess_image(frames[0], MediaConfig(in_patch_limit=16))
    (chunk,) = preprocess_video(clip, config)
    assert clip.frames[0].size == (79, 49)  # s = sqrt(16 / 24)
    assert chunk.grid == expected[1]
    assert torch.equal(chunk.pixel_values, expected[0])


def test_a_clip_of_another_configuration_is_refused() -> None:
    clip = load_video(np.zeros((2, 30, 50, 3), np.uint8), CONFIG, fps=2.0)
    with pytest.raises(MediaError, match="loaded with another media config"):
        preprocess_video(clip, MediaConfig(patch_size=16))
    resized = dataclasses.replace(clip, frames=(Image.new("RGB", (50, 31)),) * 2)
    with pytest.raises(MediaError, match=r"expected frames of 50x30 pixels.*\(50, 31\)"):
        preprocess_video(resized, CONFIG)
