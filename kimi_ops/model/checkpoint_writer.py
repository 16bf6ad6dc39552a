"""Writes checkpoints in the released format, tensor by tensor, all or nothing.

Files are first written into a hidden folder inside the target directory and moved into place only
when all of them are complete, the index last. A failure or Ctrl-C before that leaves nothing
behind.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from kimi_ops.model.config import KimiK25Config
from kimi_ops.model.errors import CheckpointError, check_count, checked_path
from kimi_ops.model.progress import Progress, byte_progress
from kimi_ops.model.safetensors_file import write_file
from kimi_ops.model.weight_map import (
    StoredTensor,
    TensorSpec,
    check_layers,
    fused_parameters,
    iter_tensors,
    stored_dtype,
)

INDEX_NAME = "model.safetensors.index.json"
# Its presence marks the weights beside it as random (`random_files`), so it goes when they go.
RANDOM_MARK = "random_weights.txt"
ExtraFiles = Mapping[str, bytes | str]
Produce = Callable[[StoredTensor], Iterable[torch.Tensor]]


def save_checkpoint(
    directory: str | Path,
    config: KimiK25Config,
    parameters: Mapping[str, torch.Tensor],
    *,
    layers: range | None = None,
    max_shard_bytes: int | None = None,
    extra_files: ExtraFiles | None = None,
    overwrite: bool = False,
    progress: Progress = True,
) -> None:
    """Writes fused `parameters` (as `load_parameters` gives them) as a released-format checkpoint.

    The float dtype is that of `language.embed_tokens`. One shard per decoder layer, then embedding
    with head and norm, projector, vision (64 shards for the released model); `max_shard_bytes` of
    tensor data splits further. `layers` tells which decoder layers `parameters` holds (None: all).
    `extra_files` are written beside (tokenizer, template). Raises `CheckpointError`: parameters
    that are not those of the config, a directory that is not empty (unless `overwrite`, which
    replaces an earlier checkpoint and leaves other files alone), or a write that fails.
    """
    chosen = check_layers(config, layers)
    if "language.embed_tokens" not in parameters:
        raise CheckpointError("parameter language.embed_tokens is missing")
    dtype = parameters["language.embed_tokens"].dtype
    scale_dtype = next(
        (p.dtype for name, p in parameters.items() if name.endswith("_scale")), dtype
    )
    _check_parameters(config, chosen, parameters, dtype, scale_dtype)

    def produce(tensor: StoredTensor) -> list[torch.Tensor]:
        if tensor.placement is None:
            return [torch.tensor(tensor.value, dtype=torch.int32)]
        return [parameters[tensor.placement.parameter][tensor.placement.index]]

    write_checkpoint(
        checked_path(directory, CheckpointError),
        config,
        produce,
        layers=chosen,
        dtype=dtype,
        scale_dtype=scale_dtype,
        max_shard_bytes=max_shard_bytes,
        extra_files=extra_files,
        overwrite=overwrite,
        progress=progress,
    )


def _check_parameters(
    config: KimiK25Config,
    layers: range,
    parameters: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
) -> None:
    for name, kind in (("float", dtype), ("scale", scale_dtype)):
        if kind not in (torch.bfloat16, torch.float16, torch.float32):
            raise CheckpointError(f"{name} parameters must be bf16, fp16 or fp32, got {kind}")
    expected = fused_parameters(config, layers, dtype=dtype, scale_dtype=scale_dtype)
    for name in parameters:
        if name not in expected:
            raise CheckpointError(f"parameter {name} is not one of this config and these layers")
    for name, spec in expected.items():
        if name not in parameters:
            raise CheckpointError(f"parameter {name} is missing")
        got = TensorSpec(tuple(parameters[name].shape), parameters[name].dtype)
        if got != spec:
            raise CheckpointError(
                f"parameter {name} must be {list(spec.shape)} {spec.dtype}, "
                f"got {list(got.shape)} {got.dtype}"
            )


def write_checkpoint(
    directory: Path,
    config: KimiK25Config,
    produce: Produce,
    *,
    layers: range,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    max_shard_bytes: int | None,
    extra_files: ExtraFiles | None,
    overwrite: bool,
    progress: Progress,
) -> None:
    """Writes config, shards, index and `extra_files`; `produce` makes a tensor when it is due."""
    extra_files = extra_files or {}
    _check_extra_files(extra_files)
    if max_shard_bytes is not None:
        check_count("max_shard_bytes", max_shard_bytes)
    # What the config says about the file must be true of this file.
    text = dataclasses.replace(config.text_config, dtype=str(dtype).removeprefix("torch."))
    config = dataclasses.replace(config, text_config=text)
    shards = _split_into_shards(config, layers, dtype, scale_dtype, max_shard_bytes)
    total = sum(spec.nbytes for shard in shards for _, spec in shard)
    with (
        _staging(directory, overwrite) as staged,
        byte_progress("writing", total, progress) as advance,
    ):
        listing: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            listing |= {tensor.name: name for tensor, _ in shard}
            specs = {tensor.name: spec for tensor, spec in shard}
            contents = (produce(tensor) for tensor, _ in shard)
            for written in write_file(staged / name, specs, contents):
                advance(written)
        index = {"metadata": {"total_size": total}, "weight_map": listing}
        texts = {
            **extra_files,
            "config.json": json.dumps(config.to_dict(), indent=2) + "\n",
            INDEX_NAME: json.dumps(index, indent=2, sort_keys=True) + "\n",
        }
        for name, content in texts.items():
            data = content.encode() if isinstance(content, str) else content
            (staged / name).write_bytes(data)


def _check_extra_files(extra_files: ExtraFiles) -> None:
    for name, content in extra_files.items():
        plain = name and Path(name).name == name and "\\" not in name and name[0] != "."
        if not plain or name in ("config.json", INDEX_NAME) or name.endswith(".safetensors"):
            raise CheckpointError(
                f"extra_files: a name must be plain and none of the checkpoint's own, got {name!r}"
            )
        if not isinstance(content, bytes | str):
            raise CheckpointError(
                f"extra_files: {name} must be bytes or str, got {type(content).__name__}"
            )


def _split_into_shards(
    config: KimiK25Config,
    layers: range,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    max_shard_bytes: int | None,
) -> list[list[tuple[StoredTensor, TensorSpec]]]:
    groups: dict[tuple[int, int], list[tuple[StoredTensor, TensorSpec]]] = {}
    for tensor in iter_tensors(config, layers):
        spec = TensorSpec(tensor.shape, stored_dtype(tensor.kind, dtype, scale_dtype))
        groups.setdefault(_shard_key(tensor.name), []).append((tensor, spec))
    shards: list[list[tuple[StoredTensor, TensorSpec]]] = []
    for _, group in sorted(groups.items()):
        # The widest dtype first keeps every tensor aligned to its element size.
        group.sort(key=lambda item: -item[1].dtype.itemsize)
        filled = 0
        shards.append([])
        for tensor, spec in group:
            if (
                shards[-1]
                and max_shard_bytes is not None
                and filled + spec.nbytes > max_shard_bytes
            ):
                shards.append([])
                filled = 0
            shards[-1].append((tensor, spec))
            filled += spec.nbytes
    return shards


def _shard_key(name: str) -> tuple[int, int]:
    """Order of the released files: decoder layers, then text ends, projector, vision tower."""
    if name.startswith("language_model.model.layers."):
        return 0, int(name.split(".")[3])
    if name.startswith("language_model."):
        return 1, 0
    return (2, 0) if name.startswith("mm_projector.") else (3, 0)


@contextmanager
def _staging(directory: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, whose files are moved to `directory` if the block succeeds."""
    existed = directory.exists()
    try:
        if existed and not directory.is_dir():
            raise CheckpointError(f"{directory}: is a file, expected a directory to write to")
        if existed and not overwrite and any(directory.iterdir()):
            raise CheckpointError(f"{directory}: not empty; ask for overwriting to replace it")
        directory.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=".incomplete-", dir=directory))
    except OSError as fault:
        raise CheckpointError(f"{directory}: cannot be written: {fault.strerror}") from None
    complete = False
    try:
        yield staged
        _move_into_place(staged, directory)
        complete = True
    except OSError as fault:
        raise CheckpointError(f"{directory}: cannot be written: {fault.strerror}") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        if not complete and not existed and not any(directory.iterdir()):
            directory.rmdir()


def _move_into_place(staged: Path, directory: Path) -> None:
    names = {file.name for file in staged.iterdir()}
    # Without its index the earlier checkpoint cannot be opened, so no mixture of the two ever can.
    (directory / INDEX_NAME).unlink(missing_ok=True)
    earlier = [
        directory / "model.safetensors",
        directory / RANDOM_MARK,
        *directory.glob("model-[0-9]*-of-[0-9]*.safetensors"),
    ]
    for old in earlier:
        if old.name not in names:
            old.unlink(missing_ok=True)
    for name in sorted(names, key=lambda name: name == INDEX_NAME):
        (staged / name).replace(directory / name)
