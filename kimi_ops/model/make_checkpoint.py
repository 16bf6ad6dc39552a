"""Random checkpoints of any size in the released format, for tests and for measuring layers.

The weights mean nothing but are scaled so that a forward pass behaves like one of a real model:
every linear keeps its input's magnitude, the residual stream stays near 1 whatever the depth, and
logits are of order 1. They depend on the seed and the tensor's name alone: not on threads, shard
sizes, or which other layers are written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kimi_ops.model.checkpoint_writer import ExtraFiles, write_checkpoint
from kimi_ops.model.config import KimiK25Config, RopeScaling, TextConfig, VisionConfig
from kimi_ops.model.config_quantization import INT4_GROUP, QuantizationConfig
from kimi_ops.model.errors import CheckpointError, ConfigError, checked_path
from kimi_ops.model.progress import Progress
from kimi_ops.model.weight_map import Kind, StoredTensor, check_layers

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Ids reserved for special tokens at the end of every vocabulary of this family.
SPECIAL_IDS = 256
# Offsets of the ids that a config names, from the first special id.
BOS_OFFSET, EOS_OFFSET, MEDIA_PAD_OFFSET, PAD_OFFSET = 0, 1, 21, 255
# Standard deviation of a stored nibble drawn evenly from -8..7.
NIBBLE_STD = math.sqrt((16**2 - 1) / 12)
# Elements made at a time, which bounds the memory: the largest released tensor has 2.35 GB.
PIECE = 2**20


def make_checkpoint(
    directory: str | Path,
    config: KimiK25Config,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    tokenizer_files: ExtraFiles | None = None,
    layers: range | None = None,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
    progress: Progress = True,
) -> None:
    """Writes a random checkpoint of `config` to `directory`, with a few dozen MB of memory.

    `dtype` is that of the float tensors (bf16, fp16 or fp32). `tokenizer_files` maps file names to
    the content of files to put beside. With `layers`, only these decoder layers are written; such a
    checkpoint opens with `open_checkpoint(..., layers=...)` alone. Raises `CheckpointError` where
    `save_checkpoint` does, and for a `dtype` or `seed` that is not allowed.
    """
    if dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"dtype must be bf16, fp16 or fp32, got {dtype}")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise CheckpointError(f"seed must be an integer from 0 to 2^63 - 1, got {seed!r}")
    write_checkpoint(
        checked_path(directory, CheckpointError),
        config,
        lambda tensor: random_pieces(config, tensor, seed=seed, dtype=dtype),
        layers=check_layers(config, layers),
        dtype=dtype,
        scale_dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        extra_files=tokenizer_files,
        overwrite=overwrite,
        progress=progress,
    )


def random_pieces(
    config: KimiK25Config, tensor: StoredTensor, *, seed: int, dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """The content of one stored tensor as consecutive flat pieces on the CPU, in its dtype."""
    if tensor.kind is Kind.SHAPE:
        yield torch.tensor(tensor.value, dtype=torch.int32)
        return
    # A cryptographic hash because Python's own is salted anew in every process.
    digest = hashlib.sha256(f"{seed}:{tensor.name}".encode()).digest()
    source = np.random.SFC64(int.from_bytes(digest, "little"))
    count = math.prod(tensor.shape)
    if tensor.kind is Kind.PACKED:
        for size in _piece_sizes(count):
            yield _random_words(source, size, np.int32)
        return
    stored = torch.float32 if tensor.kind is Kind.SELECTION_BIAS else dtype
    centre, std = _moments(config, tensor)
    # Even values from 16 random bits each, instead of normal deviates: several times faster, and a
    # full-size layer has billions. The integers r of -32768..32767 become (r + 1/2) * step.
    step = std * math.sqrt(12 / (2**32 - 1))
    for size in _piece_sizes(count):
        words = _random_words(source, size, np.int16).to(torch.float32)
        yield words.add_(0.5).mul_(step).add_(centre).to(stored)


def _piece_sizes(count: int) -> Iterator[int]:
    for first in range(0, count, PIECE):
        yield min(PIECE, count - first)


def _random_words(source: np.random.SFC64, count: int, dtype: type) -> torch.Tensor:
    per_draw = 8 // np.dtype(dtype).itemsize
    raw = np.asarray(source.random_raw(-(-count // per_draw)))
    return torch.from_numpy(raw.view(dtype)[:count])


def _moments(config: KimiK25Config, tensor: StoredTensor) -> tuple[float, float]:
    """Mean and standard deviation of a float tensor's values."""
    name = tensor.name
    if tensor.kind is Kind.SELECTION_BIAS:
        return 0.0, 0.1
    if tensor.kind is Kind.SCALE:
        # Scales differ by a quarter, so that a scale taken from the wrong group shows.
        weight_std = _branch_gain(config, name) / math.sqrt(tensor.shape[1] * INT4_GROUP)
        centre = weight_std / NIBBLE_STD
        return centre, centre / 4
    if "norm" in name.rsplit(".", 2)[-2] and name.endswith("weight"):
        return 1.0, 0.1
    if name.endswith(".bias"):
        return 0.0, 0.1
    if "embed" in name and not name.endswith("patch_embed.proj.weight"):
        return 0.0, 1.0
    fan_in = math.prod(tensor.shape[1:])
    return 0.0, _branch_gain(config, name) / math.sqrt(fan_in)


def _branch_gain(config: KimiK25Config, name: str) -> float:
    """1, or less for a matrix that adds to the residual stream: depth must not inflate it."""
    if name.startswith("vision_tower.") and name.endswith((".wo.weight", ".fc1.weight")):
        return 1 / math.sqrt(2 * config.vision_config.vt_num_hidden_layers)
    if ".o_proj." in name or ".down_proj." in name:
        return 1 / math.sqrt(2 * config.text_config.num_hidden_layers)
    return 1.0


# K2.5 in miniature: every kind of tensor, ragged enough that a swapped dimension shows.
TINY_TEXT: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "routed_scaling_factor": 2.827,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "rope_scaling": RopeScaling(
        factor=8.0, original_max_position_embeddings=1024, mscale=1.0, mscale_all_dim=1.0
    ),
    "max_position_embeddings": 8192,
}
TINY_VISION: dict[str, Any] = {
    "patch_size": 14,
    "init_pos_emb_height": 8,
    "init_pos_emb_width": 8,
    "init_pos_emb_time": 4,
    "vt_num_hidden_layers": 2,
    "vt_hidden_size": 72,
    "vt_num_attention_heads": 2,
    "vt_intermediate_size": 160,
}


def tiny_config(
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    quantized: bool = True,
    **overrides: Any,
) -> KimiK25Config:
    """A model of K2.5's shape with about 1.4 M parameters, for tests.

    `text`, `vision` and `overrides` replace fields of `TextConfig`, `VisionConfig` and
    `KimiK25Config`. What must follow does so unless given: the number of key-value heads, the
    widths shared between the parts, and the special token ids, which are the last 256 of the
    vocabulary in the released order. Raises `ConfigError` for unknown fields and for values that do
    not fit together.
    """
    for cls, given in ((TextConfig, text), (VisionConfig, vision), (KimiK25Config, overrides)):
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(given or ()) - known)
        if unknown:
            raise ConfigError(f"{cls.__name__} has no field {unknown[0]}")
    text_values = TINY_TEXT | dict(text or {})
    if isinstance(text_values["rope_scaling"], Mapping):
        text_values["rope_scaling"] = RopeScaling(**text_values["rope_scaling"])
    text_values.setdefault("num_key_value_heads", text_values["num_attention_heads"])
    vision_values = TINY_VISION | dict(vision or {})
    vision_values.setdefault("mm_hidden_size", vision_values["vt_hidden_size"])
    vision_values.setdefault("text_hidden_size", text_values["hidden_size"])
    first_special = text_values["vocab_size"] - SPECIAL_IDS
    values: dict[str, Any] = {
        "quantization_config": QuantizationConfig() if quantized else None,
        "bos_token_id": first_special + BOS_OFFSET,
        "eos_token_id": first_special + EOS_OFFSET,
        "pad_token_id": first_special + PAD_OFFSET,
        "media_placeholder_token_id": first_special + MEDIA_PAD_OFFSET,
    }
    return KimiK25Config(
        text_config=TextConfig(**text_values),
        vision_config=VisionConfig(**vision_values),
        **(values | overrides),
    )
