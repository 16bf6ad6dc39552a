"""Clip files: every container, wrong headers, rotation, and files that are no clip.

Clips are encoded here with frames of one gray level each, the level telling the frame's number, so
that a test sees which frames were taken. Expected positions are worked out from the published
sampling rule, rates from the times that the clip was encoded with.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition

from kimi_ops.model import video
from kimi_ops.model.errors import MediaError
from kimi_ops.model.media import MediaConfig, VideoClip, load_video

CONFIG = MediaConfig()
LEVEL_STEP = 10  # far above what a codec changes in a flat frame


def level(frame: int) -> int:
    return 5 + LEVEL_STEP * frame


def numbers(clip: VideoClip) -> list[int]:
    """The number of each frame of a clip, read from its gray level."""
    means = [np.asarray(frame).mean() for frame in clip.frames]
    return [round((mean - level(0)) / LEVEL_STEP) for mean in means]


def write_clip(
    path: Path,
    times_ms: Sequence[int],
    kind: str = "mp4",
    codec: str = "libx264",
    size: tuple[int, int] = (32, 16),
    rate: int = 8,
    options: dict[str, str] | None = None,
) -> bytes:
    with av.open(str(path), "w", format=kind, options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        if codec != "gif":
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, moment in enumerate(times_ms):
            gray = np.full((size[1], size[0], 3), level(index), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(gray)
            if codec != "gif":
                frame.pts, frame.time_base = moment, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.read_bytes()


@pytest.fixture
def mp4(tmp_path: Path) -> bytes:
    """20 frames at 8 per second."""
    return write_clip(tmp_path / "fixture.mp4", range(0, 2500, 125))


@pytest.mark.parametrize(
    ("kind", "codec"),
    [
        ("mp4", "libx264"),
        ("mp4", "mpeg4"),
        ("matroska", "libx264"),
        ("webm", "libvpx"),
        ("avi", "mpeg4"),
        ("mpegts", "libx264"),
        ("gif", "gif"),
    ],
)
def test_every_container_gives_the_sampled_frames(tmp_path: Path, kind: str, codec: str) -> None:
    path = tmp_path / "clip"
    rate = 10 if kind == "gif" else 8  # GIF times are hundredths of a second
    data = write_clip(path, range(0, 2500, 125), kind, codec, rate=rate)
    expected = [0, 5, 10, 14, 19] if rate == 8 else [0, 6, 13, 19]  # 20 frames, 5 or 4 samples
    for source in (path, str(path), data, bytearray(data), memoryview(data)):
        clip = load_video(source, CONFIG)
        assert (clip.n_frames, clip.fps) == (20, rate)
        assert list(clip.frame_ids) == expected
        if kind != "gif":  # its palette does not hold the levels
            assert numbers(clip) == expected


def test_number_of_frames_is_counted_not_believed(tmp_path: Path) -> None:
    data = bytearray(write_clip(tmp_path / "a", range(0, 2500, 125), "avi", "mpeg4"))
    # AVI counts ticks of the time base, here milliseconds, so it announces far more from the start.
    main_header, stream_header = data.index(b"avih") + 8, data.index(b"strh") + 8
    for announced in (None, 3, 20, 100_000):
        if announced is not None:
            length = struct.pack("<I", announced)
            data[main_header + 16 : main_header + 20] = length
            data[stream_header + 32 : stream_header + 36] = length
        with av.open(io.BytesIO(data)) as container:
            assert announced is None or container.streams.video[0].frames == announced
        clip = load_video(data, CONFIG)
        assert clip.n_frames == 20
        assert numbers(clip) == [0, 5, 10, 14, 19]


@pytest.mark.parametrize("packets", [1, 19, 21, 400])
def test_frames_that_differ_from_packets_are_read_again(
    mp4: bytes, monkeypatch: pytest.MonkeyPatch, packets: int
) -> None:
    monkeypatch.setattr(video, "_scan", lambda source, label: (packets, 8.0))
    clip = load_video(mp4, CONFIG)
    assert clip.n_frames == 20
    assert numbers(clip) == [0, 5, 10, 14, 19]


@pytest.mark.parametrize(
    ("decoded", "message"),
    [([0], "none of its 20 video packets gives a frame"), ([7, 9, 8], "at each reading")],
)
def test_packets_without_a_stable_number_of_frames(
    mp4: bytes, monkeypatch: pytest.MonkeyPatch, decoded: list[int], message: str
) -> None:
    readings = iter(decoded)
    monkeypatch.setattr(video, "_decode", lambda source, collector, label: next(readings))
    with pytest.raises(MediaError, match=message):
        load_video(mp4, CONFIG)


@pytest.mark.parametrize(("kind", "codec"), [("webm", "libvpx"), ("mp4", "libx264")])
def test_variable_rate_is_averaged(tmp_path: Path, kind: str, codec: str) -> None:
    times = [0, 40, 80, 1000, 1040, 5000, 5040, 5080, 9000, 10000]
    clip = load_video(write_clip(tmp_path / "v", times, kind, codec, rate=25), CONFIG)
    # 9 intervals in 10 s; the container counts the last frame's own duration as well or announces
    # 25, so only what sampling needs is stated: about one frame a second, hence every frame.
    assert clip.fps == pytest.approx(0.9, rel=0.12)
    assert numbers(clip) == list(range(10))


def test_rotation_of_a_phone_clip_is_applied(tmp_path: Path) -> None:
    path = tmp_path / "r.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=2, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        picture = np.zeros((32, 64, 3), np.uint8)
        picture[:, :32] = 255  # left half white
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode(None))
    data = bytearray(path.read_bytes())
    assert load_video(data, CONFIG).frames[0].size == (64, 32)
    matrix = data.index(b"tkhd") + 4 + 40
    quarter_clockwise = (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    data[matrix : matrix + 36] = struct.pack(">9i", *quarter_clockwise)
    frame = load_video(data, CONFIG).frames[0]
    assert frame.size == (32, 64)
    upper, lower = np.asarray(frame)[:32].mean(), np.asarray(frame)[32:].mean()
    assert upper > 200
    assert lower < 55


def test_a_single_frame_needs_no_rate(tmp_path: Path) -> None:
    data = write_clip(tmp_path / "one", [0], "mpegts")
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].average_rate is None
    clip = load_video(data, CONFIG)
    assert (clip.n_frames, clip.frame_ids, clip.fps) == (1, (0,), 1.0)


def test_frames_that_change_their_size_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "sizes.avi"
    with av.open(str(path), "w") as container:  # each frame of Motion JPEG tells its own size
        stream = container.add_stream("mjpeg", rate=2)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuvj420p"
        for index, (width, height) in enumerate([(32, 16), (64, 32)]):
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuvj420p"
            encoder.time_base, encoder.framerate = Fraction(1, 2), 2
            frame = av.VideoFrame.from_ndarray(np.zeros((height, width, 3), np.uint8))
            for packet in [*encoder.encode(frame), *encoder.encode(None)]:
                packet.stream, packet.time_base = stream, Fraction(1, 2)
                packet.pts = packet.dts = index
                container.mux(packet)
    with pytest.raises(MediaError, match="frame 1 has 64x32 pixels, expected 32x16"):
        load_video(path, CONFIG)


NO_CLIP = r"\): (not a clip|has no)"
TRUNCATED = r"\): truncated or damaged, from video packet \d+ on"


@pytest.mark.parametrize(
    ("kind", "kept", "message"),
    [
        ("mp4", 0.0, NO_CLIP),
        ("mp4", 0.6, NO_CLIP),  # its index is at the end
        ("faststart", 0.01, NO_CLIP),
        ("faststart", 0.3, TRUNCATED),
        ("faststart", 0.9, TRUNCATED),
        ("avi", 0.01, NO_CLIP),
        ("avi", 0.6, TRUNCATED),
        ("mpegts", 0.0, NO_CLIP),
        ("mpegts", 0.6, r"\): frame \d+ is damaged"),
    ],
)
def test_truncated_clips_are_errors(tmp_path: Path, kind: str, kept: float, message: str) -> None:
    path = tmp_path / "noise"
    options = {"movflags": "faststart"} if kind == "faststart" else {}
    container = "mp4" if kind == "faststart" else kind
    rng = np.random.default_rng(0)
    # Noise gives frames of kilobytes, so that nearly all of the file is frames.
    with av.open(str(path), "w", format=container, options=options) as out:
        stream = out.add_stream("libx264" if kind == "mpegts" else "mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 96, "yuv420p"
        for _ in range(20):
            noise = rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(noise)))
        out.mux(stream.encode(None))
    data = path.read_bytes()
    assert load_video(data, CONFIG).n_frames == 20
    with pytest.raises(MediaError, match=message):
        load_video(data[: int(len(data) * kept)], CONFIG)


def audio(path: Path, cover: bool) -> bytes:
    """A song, with or without a cover picture, which MP4 stores as a video stream."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        if cover:
            art = container.add_stream("png", rate=1)
            art.width = art.height = 16
            art.pix_fmt, art.disposition = "rgb24", Disposition.attached_pic
            picture = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8))
            container.mux(art.encode(picture))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.read_bytes()


def test_frames_beyond_the_limit_are_refused(mp4: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", 32 * 16 - 1)
    with pytest.raises(MediaError, match="not a clip that can be decoded"):
        load_video(mp4, CONFIG)


def test_a_clip_cannot_name_other_files(
    tmp_path: Path, mp4: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = b"ffconcat version 1.0\nfile fixture.mp4\n"
    monkeypatch.chdir(tmp_path)
    with av.open(io.BytesIO(script)) as container:  # FFmpeg by itself follows the name
        assert sum(1 for _ in container.decode(video=0)) == 20
    with pytest.raises(MediaError, match=r"\): not a clip"):
        load_video(script, CONFIG)


def test_files_that_are_no_clip(tmp_path: Path, mp4: bytes) -> None:
    os.mkfifo(tmp_path / "pipe")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{tmp_path}/fixture.mp4\n"
    bad: list[tuple[str, Any]] = [
        ("has no video stream", audio(tmp_path / "a.mp4", cover=False)),
        ("has no video stream", audio(tmp_path / "b.mp4", cover=True)),
        ("not a clip that can be decoded", b""),
        (r"\(4 bytes\): not a clip", b"junk"),
        (r"\(\d+ bytes\): not a clip", playlist.encode()),
        ("missing.mp4': no such file", tmp_path / "missing.mp4"),
        ("pipe': not a regular file", tmp_path / "pipe"),
        ("http://host/a.mp4': no such file", "http://host/a.mp4"),
        ("NoneType.: expected a path, bytes, or a sequence of frames", None),
    ]
    for message, source in bad:
        with pytest.raises(MediaError, match=message) as caught:
            load_video(source, CONFIG)
        assert "\n" not in str(caught.value)
    with pytest.raises(MediaError, match="fps is read from the file"):
        load_video(mp4, CONFIG, fps=8.0)
