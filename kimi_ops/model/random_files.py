"""The small files beside the weights of a random checkpoint, so that it is a complete one."""

from __future__ import annotations

import json
from pathlib import Path

from kimi_ops.model.checkpoint_writer import RANDOM_MARK
from kimi_ops.model.config import KimiK25Config
from kimi_ops.model.errors import ConfigError, checked_path
from kimi_ops.model.media_config import CONFIG_FILE as MEDIA_CONFIG_FILE
from kimi_ops.model.media_config import MediaConfig
from kimi_ops.model.tokenizer import tiny_tokenizer_files
from kimi_ops.model.tokenizer_files import NUM_RESERVED, reserved_names
from kimi_ops.model.weight_map import check_config

_RANDOM_TEXT = (
    "The weights in this folder are random numbers: what the model writes is noise.\n"
    "Delete this file when the weights are replaced by trained ones.\n"
)
# Ids that the config names and the tokenizer must give the same meaning.
_NAMED_IDS = {
    "bos_token_id": "[BOS]",
    "eos_token_id": "[EOS]",
    "pad_token_id": "[PAD]",
    "media_placeholder_token_id": "<|media_pad|>",
}


def random_checkpoint_files(config: KimiK25Config) -> dict[str, bytes]:
    """`small_files`, and the mark of random weights.

    For `make_checkpoint(..., tokenizer_files=...)`. Raises as `small_files`.
    """
    return {**small_files(config), RANDOM_MARK: _RANDOM_TEXT.encode()}


def small_files(config: KimiK25Config, text: str | None = None) -> dict[str, bytes]:
    """File name -> content: tokenizer, template, preprocessor and generation config.

    The tokenizer has the config's vocabulary size and the released control tokens, and is learned
    from ``text``, by default a small built-in one; sampling values are those recommended for Kimi
    K2.5's thinking mode.

    Raises:
        KimiError: a vocabulary below 512 ids.
        ConfigError: the config gives a control token another id than the released order does.
    """
    check_config(config)
    vocab_size = config.text_config.vocab_size
    files = tiny_tokenizer_files(vocab_size, text)
    first = vocab_size - NUM_RESERVED
    id_of = {name: first + i for i, name in enumerate(reserved_names(first))}
    for key, name in _NAMED_IDS.items():
        if getattr(config, key) != id_of[name]:
            raise ConfigError(
                f"{key} must be {id_of[name]}, the id of {name} in a tokenizer of {vocab_size} "
                f"ids, got {getattr(config, key)}"
            )
    generation = {
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 0.95,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": [config.eos_token_id, id_of["<|im_end|>"]],
        "pad_token_id": config.pad_token_id,
    }
    objects = {
        MEDIA_CONFIG_FILE: {"media_proc_cfg": MediaConfig().to_dict()},
        "generation_config.json": generation,
    }
    contents = {name: json.dumps(value, indent=2) + "\n" for name, value in objects.items()}
    return {**files, **{name: content.encode() for name, content in contents.items()}}


def has_random_weights(directory: str | Path) -> bool:
    """Whether the checkpoint in `directory` is marked as a random one."""
    return (checked_path(directory) / RANDOM_MARK).is_file()
