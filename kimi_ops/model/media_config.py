"""The media configuration: limits and constants of the preprocessing of pictures and clips.

Source of every number: the `media_proc_cfg` block of Kimi K2.5's `preprocessor_config.json`.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields
from typing import Any

from kimi_ops.model.errors import MediaError, checked_path
from kimi_ops.model.json_file import read_json_object

CONFIG_FILE = "preprocessor_config.json"
TIMESTAMP_MODE = "hh:mm:ss.fff"

_MAX_CONFIG_BYTES = 2**20  # the released file has less than a thousandth of that

# Largest value that is taken for each integer of the configuration: far above any use, and low
# enough that a hostile file cannot ask for a canvas of terabytes.
_INTEGER_LIMITS = {
    "in_patch_limit": 2**20,
    "in_patch_limit_each_frame": 2**20,
    "patch_limit_on_one_side": 2**16,
    "patch_size": 256,
    "merge_kernel_size": 16,
    "temporal_merge_kernel_size": 64,
}


@dataclass(frozen=True)
class MediaConfig:
    """The `media_proc_cfg` block; the defaults are the values released with Kimi K2.5.

    Patch limits count patches of `patch_size` x `patch_size` pixels before merging. Values are
    checked on construction; `MediaError` names the key.

    Attributes:
        in_patch_limit: patches of one picture (soft: padding may add some).
        in_patch_limit_each_frame: patches of one frame of a clip (soft as well).
        in_patch_limit_video: patches of a whole clip; only None is supported.
        patch_limit_on_one_side: patches along one side, a hard limit.
        patch_size: side of a patch in pixels.
        merge_kernel_size: patches merged per side; one token covers its square.
        temporal_merge_kernel_size: frames in one chunk of a clip.
        fixed_output_tokens: only None is supported.
        sample_fps: frames sampled from a clip per second, at most.
        max_num_frames_each_video: cap on the frames sampled from a clip, None for no cap.
        timestamp_mode: only "hh:mm:ss.fff" is supported.
        image_mean: mean of each channel (RGB), for values scaled to 0..1.
        image_std: divisor of each channel after the mean is taken off.
    """

    in_patch_limit: int = 16384
    in_patch_limit_each_frame: int = 4096
    in_patch_limit_video: None = None
    patch_limit_on_one_side: int = 512
    patch_size: int = 14
    merge_kernel_size: int = 2
    temporal_merge_kernel_size: int = 4
    fixed_output_tokens: None = None
    sample_fps: float = 2.0
    max_num_frames_each_video: int | None = None
    timestamp_mode: str = TIMESTAMP_MODE
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for key, upper in _INTEGER_LIMITS.items():
            value = getattr(self, key)
            if not is_integer(value) or not 1 <= value <= upper:
                raise _bad_value(key, f"an integer from 1 to {upper}", value)
        if self.patch_limit_on_one_side % self.merge_kernel_size:
            expected = f"a multiple of merge_kernel_size ({self.merge_kernel_size})"
            raise _bad_value("patch_limit_on_one_side", expected, self.patch_limit_on_one_side)
        for key in ("in_patch_limit_video", "fixed_output_tokens"):
            if getattr(self, key) is not None:
                raise _bad_value(key, "null (nothing else is supported)", getattr(self, key))
        cap = self.max_num_frames_each_video
        if cap is not None and (not is_integer(cap) or cap < 1):
            raise _bad_value("max_num_frames_each_video", "null or an integer from 1", cap)
        if not is_positive_number(self.sample_fps):
            raise _bad_value("sample_fps", "a number above 0", self.sample_fps)
        if self.timestamp_mode != TIMESTAMP_MODE:
            raise _bad_value("timestamp_mode", repr(TIMESTAMP_MODE), self.timestamp_mode)
        for key in ("image_mean", "image_std"):
            value = getattr(self, key)
            if not (
                isinstance(value, (list, tuple))
                and len(value) == 3
                and all(_is_number(channel) for channel in value)
                and (key == "image_mean" or all(channel != 0 for channel in value))
            ):
                nonzero = "" if key == "image_mean" else ", none of them 0"
                raise _bad_value(key, f"three finite numbers{nonzero}", value)
            object.__setattr__(self, key, tuple(float(channel) for channel in value))
        object.__setattr__(self, "sample_fps", float(self.sample_fps))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> MediaConfig:
        """Reads `preprocessor_config.json`, or that file inside the folder `path`.

        A key that is absent has its released value. Outside `media_proc_cfg` the file describes
        the classes of other software and is not looked at.

        Raises:
            MediaError: no such file, not JSON, no `media_proc_cfg` object, or a key of that block
                that is unknown or has an unsupported value.
        """
        file = checked_path(path, MediaError)
        if os.path.isdir(file):
            file = file / CONFIG_FILE
        if not os.path.isfile(file):
            raise MediaError(f"{str(file)!r}: no such file, expected the media configuration")
        content = read_json_object(file, _MAX_CONFIG_BYTES, MediaError)
        block = content.get("media_proc_cfg")
        if not isinstance(block, dict):
            raise MediaError(f"{str(file)!r}: expected an object 'media_proc_cfg'")
        try:
            return cls.from_dict(block)
        except MediaError as error:
            raise MediaError(f"{str(file)!r}: {error}") from error

    @classmethod
    def from_dict(cls, block: dict[str, Any]) -> MediaConfig:
        """Makes a configuration from the content of a `media_proc_cfg` block.

        Raises:
            MediaError: a key that is unknown or has an unsupported value.
        """
        # The released file names the class it was written from in `config_type`: no setting.
        values = {key: value for key, value in block.items() if key != "config_type"}
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise MediaError(
                f"media_proc_cfg: unknown key {unknown[0]!r}, expected among {', '.join(known)}"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The content of a `media_proc_cfg` block (JSON types) that gives this configuration."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }


def is_positive_number(value: object) -> bool:
    """True for a finite int or float above 0; booleans are no numbers."""
    return _is_number(value) and value > 0  # type: ignore[operator]


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= 2**63


def is_integer(value: object) -> bool:
    """True for an int that is no boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


def _bad_value(key: str, expected: str, value: object) -> MediaError:
    return MediaError(f"media_proc_cfg: {key} must be {expected}, got {value!r}")
