"""`kimi-ops inspect`, `make-checkpoint` and `plan`: what they do once the arguments are parsed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from kimi_ops.model.chat import load_template, render_chat
from kimi_ops.model.checkpoint import open_checkpoint
from kimi_ops.model.config import KimiK25Config
from kimi_ops.model.conversation import PromptBuilder
from kimi_ops.model.errors import CheckpointError
from kimi_ops.model.generation_config import CONFIG_FILE as GENERATION_CONFIG_FILE
from kimi_ops.model.generation_config import GenerationConfig
from kimi_ops.model.make_checkpoint import make_checkpoint, tiny_config
from kimi_ops.model.media_config import CONFIG_FILE as MEDIA_CONFIG_FILE
from kimi_ops.model.media_config import MediaConfig
from kimi_ops.model.parameter_counts import parameter_counts
from kimi_ops.model.plan import cache_bytes_per_token, plan
from kimi_ops.model.random_files import has_random_weights, random_checkpoint_files
from kimi_ops.model.settings import usable_dtype
from kimi_ops.model.tokenizer_files import MODEL_FILE, TEMPLATE_FILE, own_template
from kimi_ops.model.weight_map import TensorSpec, iter_tensors, parse_layers, stored_dtype

FULL_SIZE = "kimi-k2.5"
# Tokenizer, template, index and the file system's own needs beside the tensors.
DISK_SLACK_BYTES = 128 * 2**20


def read_config(text: str | None) -> KimiK25Config:
    """The config in the file or directory `text`; the released one for None or "kimi-k2.5".

    A path of that name goes before the released config. Raises `ConfigError`.
    """
    if text is None or (text == FULL_SIZE and not Path(text).exists()):
        return KimiK25Config.full_size()
    return KimiK25Config.from_file(text)


def _tensor_sizes(config: KimiK25Config, layers: range | None, dtype: torch.dtype) -> list[int]:
    return [
        TensorSpec(tensor.shape, stored_dtype(tensor.kind, dtype, dtype)).nbytes
        for tensor in iter_tensors(config, layers)
    ]


def _describe_config(config: KimiK25Config) -> dict[str, Any]:
    text, vision = config.text_config, config.vision_config
    return {
        "model_type": config.model_type,
        "layers": text.num_hidden_layers,
        "dense_layers": text.first_k_dense_replace,
        "moe_layers": text.num_hidden_layers - text.first_k_dense_replace,
        "hidden_size": text.hidden_size,
        "attention_heads": text.num_attention_heads,
        "experts": text.n_routed_experts,
        "experts_per_token": text.num_experts_per_tok,
        "shared_experts": text.n_shared_experts,
        "vocab_size": text.vocab_size,
        "context": text.max_position_embeddings,
        "vision_layers": vision.vt_num_hidden_layers,
        "vision_hidden_size": vision.vt_hidden_size,
        "quantization": "none" if config.quantization_config is None else "int4 group 32",
        "cache_bytes_per_token": cache_bytes_per_token(config),
        "parameters": parameter_counts(config),
    }


def _describe_files(directory: Path, config: KimiK25Config) -> dict[str, bool]:
    """Which files are beside the weights; those that are have been read and found valid."""
    source = load_template(directory)
    found = {
        "tokenizer": (directory / MODEL_FILE).is_file(),
        # The released tokenizer_config.json may carry it instead of a file of its own.
        "chat_template": (directory / TEMPLATE_FILE).is_file() or source != own_template(),
        "preprocessor": (directory / MEDIA_CONFIG_FILE).is_file(),
        "generation_config": (directory / GENERATION_CONFIG_FILE).is_file(),
    }
    GenerationConfig.from_file(directory, config.text_config.vocab_size)
    render_chat([{"role": "user", "content": "Hello"}], template=source)
    if found["preprocessor"]:
        MediaConfig.from_file(directory)
    if found["tokenizer"]:
        PromptBuilder(directory)
    return found


def describe(path: str, *, config_only: bool = False, layers: str | None = None) -> dict[str, Any]:
    """What `kimi-ops inspect --json` prints, from headers alone; sizes in bytes.

    Args:
        path: directory with a checkpoint. Of a config alone: `config.json`, a directory with one,
            or "kimi-k2.5" for the released config.
        config_only: look at nothing but the config; tensors and bytes are those it demands.
        layers: "0-3": the decoder layers that must be present; all if None.

    Raises:
        KimiError: whatever is wrong with it.
    """
    if config_only or (path == FULL_SIZE and not Path(path).exists()):
        config = read_config(path)
        chosen = None if layers is None else parse_layers(layers, config)
        dtype = getattr(torch, config.text_config.dtype)
        sizes = _tensor_sizes(config, chosen, dtype)
        return _describe_config(config) | {
            "source": path,
            "config_only": True,
            "tensors": len(sizes),
            "tensor_bytes": sum(sizes),
            "dtype": config.text_config.dtype,
        }
    chosen = None
    if layers is not None:
        chosen = parse_layers(layers, KimiK25Config.from_file(path))
    checkpoint = open_checkpoint(path, layers=chosen)
    shards = {tensor.file for tensor in checkpoint.tensors.values()}
    return _describe_config(checkpoint.config) | {
        "source": path,
        "config_only": False,
        "tensors": len(checkpoint.tensors),
        "tensor_bytes": checkpoint.nbytes,
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "scale_dtype": str(checkpoint.scale_dtype).removeprefix("torch."),
        "shards": len(shards),
        "shard_bytes": sum(shard.stat().st_size for shard in shards),
        "checked_layers": [checkpoint.layers.start, checkpoint.layers.stop - 1],
        "files": _describe_files(checkpoint.directory, checkpoint.config),
        "random_weights": has_random_weights(path),
    }


def run_inspect(args: argparse.Namespace) -> int:
    """`kimi-ops inspect`; 0, or `KimiError`."""
    found = describe(args.directory, config_only=args.config_only, layers=args.layers)
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    source = found.pop("source")
    print(f"{source}: {'config' if found.pop('config_only') else 'checkpoint, headers valid'}")
    for name, value in found.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, item in value.items():
                print(f"  {key:<34}{_shown(item):>24}")
        else:
            print(f"{name:<36}{_shown(value):>24}")
    return 0


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "-".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def run_make_checkpoint(args: argparse.Namespace) -> int:
    """`kimi-ops make-checkpoint`; 0, or `KimiError` with nothing written."""
    if args.config is not None:
        config = read_config(args.config)
    else:
        config = KimiK25Config.full_size() if args.size == FULL_SIZE else tiny_config()
    if args.num_hidden_layers is not None:
        text = dataclasses.replace(config.text_config, num_hidden_layers=args.num_hidden_layers)
        config = dataclasses.replace(config, text_config=text)
    layers = None if args.layers is None else parse_layers(args.layers, config)
    dtype = usable_dtype(args.dtype)
    directory = Path(args.directory)
    _check_disk(directory, sum(_tensor_sizes(config, layers, dtype)))
    make_checkpoint(
        directory,
        config,
        seed=args.seed,
        dtype=dtype,
        tokenizer_files=random_checkpoint_files(config),
        layers=layers,
        overwrite=args.overwrite,
    )
    made = open_checkpoint(directory, layers=layers)
    print(
        f"{directory}: {len(made.tensors):,} tensors, {made.nbytes:,} bytes, decoder layers "
        f"{made.layers.start}-{made.layers.stop - 1} of {config.text_config.num_hidden_layers}, "
        f"random weights of seed {args.seed} ({args.dtype})"
    )
    return 0


def _check_disk(directory: Path, size: int) -> None:
    # An earlier checkpoint is replaced only when the new one is complete: its space does not count.
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if size + DISK_SLACK_BYTES > free:
        raise CheckpointError(
            f"{directory}: the checkpoint needs {size + DISK_SLACK_BYTES:,} bytes, the disk has "
            f"{free:,} free; ask for fewer layers"
        )


def run_plan(args: argparse.Namespace) -> int:
    """`kimi-ops plan`; 0 if it fits, 1 if not, or `KimiError`."""
    config = read_config(args.config)
    context = config.text_config.max_position_embeddings if args.context is None else args.context
    result = plan(
        config,
        devices=args.devices,
        context=context,
        batch=args.batch,
        parallel=args.parallel,
        weights=args.weights,
        cache_format=args.cache_format,
    )
    print(json.dumps(result.to_dict(), indent=2) if args.json else result.render().rstrip())
    return 0 if result.fits else 1
