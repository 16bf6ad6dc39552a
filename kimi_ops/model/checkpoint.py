"""Opens and loads checkpoints in the released format: safetensors shards, an index, a config.

Everything that can be wrong with a checkpoint is found by `open_checkpoint`, from headers alone,
before a single weight is read. Nothing but safetensors and JSON is ever read, and no code is ever
executed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from kimi_ops.model.checkpoint_writer import INDEX_NAME, save_checkpoint
from kimi_ops.model.config import KimiK25Config
from kimi_ops.model.errors import CheckpointError, checked_path
from kimi_ops.model.json_file import printable, read_json_object
from kimi_ops.model.progress import Progress, byte_progress
from kimi_ops.model.safetensors_file import TensorInfo, copy_into, read_header
from kimi_ops.model.weight_map import (
    FusedParameter,
    Kind,
    StoredTensor,
    check_layers,
    iter_fused,
    iter_tensors,
    packed_shape,
    shape_name,
    stored_dtype,
)

__all__ = ["Checkpoint", "load_parameters", "open_checkpoint", "save_checkpoint"]

SINGLE_NAME = "model.safetensors"
# The released index is about 25 MB.
MAX_INDEX_BYTES = 256 * 2**20
MAX_OPEN_SHARDS = 16
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
UNSAFE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every header was checked against its config; no tensor data was read.

    `layers` are the decoder layers that are certain to be complete. `tensors` maps each released
    name to its place in a file. `dtype` is that of the float tensors, `scale_dtype` that of the
    int4 scales.
    """

    directory: Path
    config: KimiK25Config
    layers: range
    tensors: dict[str, TensorInfo]
    dtype: torch.dtype
    scale_dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data in the files that are present."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_checkpoint(directory: str | Path, *, layers: range | None = None) -> Checkpoint:
    """Opens the checkpoint in `directory` and checks all of it but the weights themselves.

    With `layers`, the tensors of other decoder layers may be absent together with their shards.
    Raises `ConfigError` for a bad config and `CheckpointError`, naming tensor and file, for
    anything else.
    """
    directory = checked_path(directory, CheckpointError)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: not a directory with a checkpoint")
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory}: config.json is missing")
    config = KimiK25Config.from_file(directory)
    chosen = check_layers(config, layers)
    known = {tensor.name: tensor for tensor in iter_tensors(config)}
    needed: Collection[str] = known
    if layers is not None:
        needed = {tensor.name for tensor in iter_tensors(config, chosen)}

    listing = _list_shards(directory)
    if listing is None:
        found = read_header(directory / SINGLE_NAME)
        _check_names(directory / SINGLE_NAME, found, known, needed)
    else:
        _check_names(directory / INDEX_NAME, listing, known, needed)
        found = _read_shards(directory, listing, needed)
    dtype, scale_dtype = _check_specs(found, known)
    return Checkpoint(directory, config, chosen, found, dtype, scale_dtype)


def _list_shards(directory: Path) -> dict[str, str] | None:
    """Shard file name of each tensor from the index; None for a checkpoint of one file."""
    index_path = directory / INDEX_NAME
    if not index_path.is_file():
        if (directory / SINGLE_NAME).is_file():
            return None
        unsafe = sorted(f.name for f in directory.iterdir() if f.suffix in UNSAFE_SUFFIXES)
        hint = f"; {unsafe[0]} is not read: only safetensors are" if unsafe else ""
        raise CheckpointError(f"{directory}: neither {INDEX_NAME} nor {SINGLE_NAME} is there{hint}")
    listing = read_json_object(index_path, MAX_INDEX_BYTES, CheckpointError).get("weight_map")
    if not isinstance(listing, dict) or not listing:
        raise CheckpointError(f"{index_path}: weight_map must be an object of tensor: file")
    for name, shard in listing.items():
        if not _is_shard_name(shard):
            raise CheckpointError(
                f"{index_path}: tensor {printable(name)}: the shard must be the plain name of a "
                f".safetensors file in the same directory, got {shard!a:.120}"
            )
    return listing


def _is_shard_name(name: Any) -> bool:
    if not isinstance(name, str) or not name.endswith(".safetensors") or len(name) > 255:
        return False
    return not name.startswith(".") and name.isprintable() and not set(name) & set("/\\:")


def _check_names(
    source: Path, names: dict[str, Any], known: Collection[str], needed: Collection[str]
) -> None:
    extra = [name for name in names if name not in known]
    if extra:
        raise CheckpointError(
            f"{source}: unexpected tensor {printable(extra[0])}{_and_more(extra)}; the config "
            "has none such"
        )
    missing = [name for name in needed if name not in names]
    if missing:
        raise CheckpointError(f"{source}: tensor {missing[0]} is missing{_and_more(missing)}")


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _read_shards(
    directory: Path, listing: dict[str, str], needed: Collection[str]
) -> dict[str, TensorInfo]:
    """The tensors in all shards that are present, which must be all shards with a needed tensor."""
    names_by_shard: dict[str, list[str]] = {}
    for name, shard in listing.items():
        names_by_shard.setdefault(shard, []).append(name)
    present = []
    for shard, names in sorted(names_by_shard.items()):
        wanted = [name for name in names if name in needed]
        if (directory / shard).is_file():
            present.append((directory / shard, names))
        elif wanted:
            raise CheckpointError(
                f"{directory / shard}: the shard is missing; it holds tensor "
                f"{wanted[0]}{_and_more(wanted)}"
            )
    found: dict[str, TensorInfo] = {}
    for path, names in present:
        for name, tensor in read_header(path).items():
            if name in found:
                raise CheckpointError(f"{path}: tensor {name} is also in {found[name].file.name}")
            if listing.get(name) != path.name:
                listed = f"in {listing[name]}" if name in listing else "nowhere"
                raise CheckpointError(
                    f"{path}: tensor {printable(name)} is in this shard, but {INDEX_NAME} lists "
                    f"it {listed}"
                )
            found[name] = tensor
        absent = [name for name in names if name not in found]
        if absent:
            raise CheckpointError(
                f"{path}: tensor {absent[0]} is missing{_and_more(absent)}; {INDEX_NAME} lists "
                "it in this shard"
            )
    return found


def _check_specs(
    found: dict[str, TensorInfo], known: dict[str, StoredTensor]
) -> tuple[torch.dtype, torch.dtype]:
    """Checks shapes and dtypes; returns the dtypes of the float tensors and of the scales."""
    # The first tensor of each kind sets the float dtype that all others of the kind must have.
    first: dict[Kind, TensorInfo] = {}
    for name, tensor in found.items():
        expected, spec = known[name], tensor.spec
        where = f"{tensor.file}: tensor {name}"
        if spec.shape != expected.shape:
            raise CheckpointError(
                f"{where}: shape must be {list(expected.shape)}, got {list(spec.shape)}"
            )
        if expected.kind in (Kind.FLOAT, Kind.SCALE):
            if spec.dtype not in FLOAT_DTYPES:
                raise CheckpointError(f"{where}: dtype must be a float one, got {spec.dtype}")
            reference = first.setdefault(expected.kind, tensor)
            if spec.dtype != reference.spec.dtype:
                raise CheckpointError(
                    f"{where}: dtype must be {reference.spec.dtype}, that of {reference.name}, "
                    f"got {spec.dtype}"
                )
            continue
        allowed = {stored_dtype(expected.kind, torch.bfloat16, torch.bfloat16)}
        if expected.kind is Kind.SHAPE:
            allowed.add(torch.int64)
        if spec.dtype not in allowed:
            names = " or ".join(sorted(str(dtype) for dtype in allowed))
            raise CheckpointError(f"{where}: dtype must be {names}, got {spec.dtype}")
    dtype = first[Kind.FLOAT].spec.dtype
    return dtype, first[Kind.SCALE].spec.dtype if Kind.SCALE in first else dtype


class _OpenShards:
    """Keeps the few most recently used shards open, since a checkpoint may have thousands."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, BinaryIO] = OrderedDict()

    def __enter__(self) -> _OpenShards:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()

    def get(self, path: Path) -> BinaryIO:
        if path in self._files:
            self._files.move_to_end(path)
            return self._files[path]
        if len(self._files) >= MAX_OPEN_SHARDS:
            self._files.popitem(last=False)[1].close()
        try:
            self._files[path] = path.open("rb")
        except OSError as fault:
            raise CheckpointError(f"{path}: cannot be read: {fault.strerror or fault}") from None
        return self._files[path]


def load_parameters(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    layers: range | None = None,
    progress: Progress = True,
) -> dict[str, torch.Tensor]:
    """Reads the weights straight into the fused parameters of `weight_map`, by dotted name.

    Float parameters become `dtype`; int4 scales keep the dtype of the file, the router's selection
    bias is float32, packed words are int32. `layers` defaults to those the checkpoint was opened
    with. Peak memory is what the result holds plus one window of 16 MiB. Raises `CheckpointError`.
    """
    if dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"dtype must be one of {FLOAT_DTYPES}, got {dtype}")
    config = checkpoint.config
    chosen = checkpoint.layers if layers is None else check_layers(config, layers)
    wanted = [tensor.name for tensor in iter_tensors(config, chosen)]
    for name in wanted:
        if name not in checkpoint.tensors:
            raise CheckpointError(
                f"{checkpoint.directory}: tensor {name} is not in the shards that are present"
            )
    total = sum(checkpoint.tensors[name].nbytes for name in wanted)
    parameters: dict[str, torch.Tensor] = {}
    with _OpenShards() as shards, byte_progress("loading", total, progress) as advance:
        for fused in iter_fused(config, chosen):
            kept = stored_dtype(fused.kind, dtype, checkpoint.scale_dtype)
            parameter = torch.empty(fused.shape, dtype=kept, device=device)
            for part in fused.parts:
                stored = checkpoint.tensors[part.name]
                copy_into(parameter[part.index], stored, shards.get(stored.file))
                advance(stored.nbytes)
            if fused.kind is Kind.PACKED:
                advance(_check_weight_shapes(checkpoint, fused, shards))
            parameters[fused.name] = parameter
    return parameters


def _check_weight_shapes(checkpoint: Checkpoint, fused: FusedParameter, shards: _OpenShards) -> int:
    """Compares `weight_shape` tensors with the weights' shapes; returns the bytes read."""
    read = 0
    for part in fused.parts:
        stored = checkpoint.tensors[shape_name(part.name)]
        value = torch.empty(2, dtype=torch.int64)
        copy_into(value, stored, shards.get(stored.file))
        if tuple(value.tolist()) != packed_shape(part.shape):
            raise CheckpointError(
                f"{stored.file}: tensor {stored.name} must hold {packed_shape(part.shape)}, "
                f"got {tuple(value.tolist())}"
            )
        read += stored.nbytes
    return read
