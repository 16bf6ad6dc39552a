"""Media of a prompt: configuration file, processor and placeholders of Kimi K2.5.

Expected values are the released configuration, and grids, token counts and prompt texts worked out
by hand from the published rules.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kimi_ops.model.errors import MediaError
from kimi_ops.model.media import (
    MediaConfig,
    MediaItem,
    MediaProcessor,
    expand_placeholders,
    preprocess_image,
)

CONFIG = MediaConfig()
PAD = "<|media_pad|>"
CLIP = "<|kimi_k25_video_placeholder|>"
EXAMPLES = Path(__file__).parents[1] / "examples" / "media"

RELEASED_BLOCK = {
    "in_patch_limit": 16384,
    "in_patch_limit_each_frame": 4096,
    "in_patch_limit_video": None,
    "patch_limit_on_one_side": 512,
    "patch_size": 14,
    "merge_kernel_size": 2,
    "temporal_merge_kernel_size": 4,
    "fixed_output_tokens": None,
    "sample_fps": 2.0,
    "max_num_frames_each_video": None,
    "timestamp_mode": "hh:mm:ss.fff",
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_config_defaults_are_the_released_block(tmp_path: Path) -> None:
    assert MediaConfig().to_dict() == RELEASED_BLOCK
    released = {
        "auto_map": {"AutoImageProcessor": "module.Class"},
        "media_proc_cfg": {**RELEASED_BLOCK, "config_type": "module.Class"},
    }
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(released))
    assert MediaConfig.from_file(tmp_path) == MediaConfig.from_file(file) == MediaConfig()
    changed = MediaConfig(patch_size=16, sample_fps=1, image_mean=(0.1, 0.2, 0.3))
    file.write_text(json.dumps({"media_proc_cfg": changed.to_dict()}))
    assert MediaConfig.from_file(str(file)) == changed


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("in_patch_limit", 0),
        ("in_patch_limit", True),
        ("in_patch_limit_each_frame", None),
        ("in_patch_limit_video", 100),
        ("patch_limit_on_one_side", 511),
        ("patch_size", 14.0),
        ("patch_size", 10**12),
        ("merge_kernel_size", [2, 2]),
        ("temporal_merge_kernel_size", "4"),
        ("fixed_output_tokens", 256),
        ("sample_fps", 0),
        ("sample_fps", math.nan),
        ("sample_fps", math.inf),
        ("sample_fps", 10**400),
        ("max_num_frames_each_video", 0),
        ("timestamp_mode", "seconds"),
        ("image_mean", [0.5, 0.5]),
        ("image_mean", 0.5),
        ("image_std", [0.5, 0.0, 0.5]),
        ("image_std", [0.5, math.nan, 0.5]),
        ("surprise", 1),
    ],
)
def test_config_names_the_key_of_a_bad_value(tmp_path: Path, key: str, value: Any) -> None:
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"media_proc_cfg": {**RELEASED_BLOCK, key: value}}))
    with pytest.raises(MediaError, match=f"preprocessor_config.json.*{key}"):
        MediaConfig.from_file(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "expected a JSON object"),
        (b"{}", "expected an object 'media_proc_cfg'"),
        (b'{"media_proc_cfg": null}', "expected an object 'media_proc_cfg'"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" + b" " * 2**20, "longer than"),
    ],
)
def test_config_file_that_is_none(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "preprocessor_config.json"
    file.write_bytes(content)
    with pytest.raises(MediaError, match=message):
        MediaConfig.from_file(file)
    with pytest.raises(MediaError, match="no such file"):
        MediaConfig.from_file(tmp_path / "missing")


def test_processor_keeps_the_order_and_joins_the_patches() -> None:
    stills = [picture(30, 20, seed=1), picture(60, 100, seed=2)]
    frames = np.stack([picture(40, 30, seed=seed) for seed in range(6)])
    items = [
        MediaItem("image", stills[0]),
        MediaItem("video", frames, fps=2.0),
        MediaItem("image", stills[1]),
    ]
    batch = MediaProcessor()(items)
    # 30x20 -> 4x2 patches; 40x30 -> 4x4, chunks of 4 and 2 frames; 60x100 -> 6 columns, 8 rows
    assert batch.grid_thws.dtype == torch.int64
    assert batch.grid_thws.tolist() == [[1, 2, 4], [4, 4, 4], [2, 4, 4], [1, 8, 6]]
    assert batch.pixel_values.shape == (8 + 64 + 32 + 48, 3, 14, 14)
    assert torch.equal(batch.pixel_values[:8], preprocess_image(stills[0], CONFIG)[0])
    assert torch.equal(batch.pixel_values[-48:], preprocess_image(stills[1], CONFIG)[0])
    for frame in range(6):
        start = 8 + 16 * frame
        expected = preprocess_image(frames[frame], CONFIG)[0]
        assert torch.equal(batch.pixel_values[start : start + 16], expected)
    assert [medium.tokens for medium in batch.media] == [2, 8, 12]
    assert [len(medium.grids) for medium in batch.media] == [1, 2, 1]
    assert batch.media[0].text == f"<|media_begin|>image<|media_content|>{PAD * 2}<|media_end|>"
    assert batch.media[1].text == (
        f"00:00:00.000<|media_begin|>video<|media_content|>{PAD * 4}<|media_end|>"
        f"00:00:02.000<|media_begin|>video<|media_content|>{PAD * 4}<|media_end|>"
    )
    for medium in batch.media:
        assert medium.text.count(PAD) == medium.tokens


def test_no_media_give_empty_tensors() -> None:
    batch = MediaProcessor()([])
    assert batch.pixel_values.shape == (0, 3, 14, 14)
    assert batch.media == ()
    assert batch.grid_thws.shape == (0, 3)
    assert batch.grid_thws.dtype == torch.int64
    assert expand_placeholders("plain text", batch.media) == "plain text"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (MediaItem("image", b"junk"), "medium 1: picture .4 bytes.: not a picture"),
        (MediaItem("video", b"junk"), "medium 1: clip .4 bytes.: not a clip"),
        (MediaItem("image", picture(3, 3), fps=2.0), "medium 1: a picture has no fps"),
        (MediaItem("audio", b""), "medium 1: kind must be 'image' or 'video', got 'audio'"),  # type: ignore[arg-type]
        (b"junk", "medium 1: expected a MediaItem, got bytes"),
    ],
)
def test_processor_says_which_medium_is_bad(item: Any, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        MediaProcessor()([MediaItem("image", picture(3, 3)), item])


def test_placeholders_are_expanded_in_order() -> None:
    frames = np.zeros((5, 28, 28, 3), np.uint8)
    items = [
        MediaItem("video", frames, fps=1.0),
        MediaItem("image", picture(29, 28)),
        MediaItem("image", picture(1, 1)),
    ]
    media = MediaProcessor()(items).media
    wrap = "<|media_begin|>image<|media_content|>{}<|media_end|>\n"
    prompt = f"See {CLIP}, {wrap.format(PAD)}and {wrap.format(PAD)}\\1 is text."
    chunk = "{}<|media_begin|>video<|media_content|>{}<|media_end|>"
    assert expand_placeholders(prompt, media) == (
        f"See {chunk.format('00:00:00.000', PAD)}{chunk.format('00:00:04.000', PAD)}, "
        f"{wrap.format(PAD * 2)}and {wrap.format(PAD)}\\1 is text."
    )


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", r"0 image\(s\) and 0 video\(s\), but 1 image\(s\) and 1 video\(s\) were given"),
        (PAD, r"1 image\(s\) and 0 video\(s\), but 1 image"),
        (PAD + PAD + CLIP, r"2 image\(s\) and 1 video\(s\), but 1 image"),
        (PAD + PAD, r"2 image\(s\) and 0 video\(s\), but 1 image\(s\) and 1 video"),
        (CLIP + PAD, "medium 0: the prompt has a placeholder for 'video' here, but 'image'"),
    ],
)
def test_placeholders_that_do_not_match_are_an_error(prompt: str, message: str) -> None:
    items = [MediaItem("image", picture(2, 2)), MediaItem("video", picture(2, 2)[None], fps=1)]
    with pytest.raises(MediaError, match=message):
        expand_placeholders(prompt, MediaProcessor()(items).media)


def test_example_media_are_what_their_script_says() -> None:
    items = [
        MediaItem("image", EXAMPLES / "picture.png"),
        MediaItem("video", EXAMPLES / "clip.mp4"),
    ]
    batch = MediaProcessor()(items)
    # 501x333 pads to 504x336; 32 frames at 8 fps give 8 samples of 320x180, padded to 336x196
    assert batch.grid_thws.tolist() == [[1, 24, 36], [4, 14, 24], [4, 14, 24]]
    assert batch.media[1].text.startswith("00:00:00.000<")
    for name in ("picture.png", "clip.mp4"):
        assert (EXAMPLES / name).stat().st_size < 100_000
