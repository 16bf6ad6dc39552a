"""Reads and writes one safetensors file without ever holding more of it than a small window.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON
header {name: {dtype, shape, data_offsets}, "__metadata__": {...}}, then the data, without gaps.

Why not the `safetensors` library: it maps a whole file and keeps every page it touched resident
until the file is closed, so loading a 10 GB shard needs twice its size; and its errors name neither
tensor nor file.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from kimi_ops.model.errors import CheckpointError
from kimi_ops.model.json_file import parse_json_object, printable
from kimi_ops.model.weight_map import TensorSpec

# The reference implementation's own limit; a released shard's header is about 0.5 MB.
MAX_HEADER_BYTES = 100_000_000
WINDOW_BYTES = 16 * 2**20

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: `nbytes` of data from byte `start` of the file on."""

    name: str
    file: Path
    spec: TensorSpec
    start: int

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.spec.nbytes


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of the file `path`, in the order of their data. Reads no tensor data.

    Checks that the header is well-formed and that the tensors fill the rest of the file exactly.
    Raises `CheckpointError` naming the file and, where one is at fault, the tensor.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(
                    f"{path}: truncated: {size} bytes, but the header alone needs "
                    f"{8 + length if size >= 8 else 8}"
                )
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed"
                )
            text = file.read(length)
    except OSError as fault:
        raise CheckpointError(f"{path}: cannot be read: {fault.strerror or fault}") from None

    header = parse_json_object(text, f"{path}: header", CheckpointError)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(type(v) is str for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    parsed = [_parse_entry(path, name, entry, 8 + length) for name, entry in header.items()]
    parsed.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    end = 8 + length
    for tensor in parsed:
        if tensor.start != end:
            problem = "overlaps" if tensor.start < end else "leaves a gap after"
            raise CheckpointError(
                f"{path}: tensor {printable(tensor.name)} {problem} the one before: its data "
                f"starts at byte {tensor.start}, expected {end}"
            )
        end += tensor.nbytes
    if end != size:
        last = f" of tensor {printable(parsed[-1].name)}" if parsed else ""
        state = "truncated" if size < end else "longer than announced"
        raise CheckpointError(
            f"{path}: {state}: the data{last} ends at byte {end}, the file at byte {size}"
        )
    return {tensor.name: tensor for tensor in parsed}


def _parse_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    where = f"{path}: tensor {printable(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: its header entry must have dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{where}: dtype must be one of {', '.join(DTYPES)}, got {entry['dtype']!r:.80}"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape):
        raise CheckpointError(f"{where}: shape must be a list of sizes, got {shape!r:.80}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: data_offsets must be [start, end], got {offsets!r:.80}")
    spec = TensorSpec(tuple(shape), DTYPES[entry["dtype"]])
    if offsets[1] - offsets[0] != spec.nbytes:
        raise CheckpointError(
            f"{where}: {list(shape)} {entry['dtype']} takes {spec.nbytes} bytes, "
            f"but data_offsets {offsets} span {offsets[1] - offsets[0]}"
        )
    return TensorInfo(name, path, spec, data_start + offsets[0])


def _are_sizes(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > 8:
        return False
    return all(type(size) is int and 0 <= size < 2**63 for size in value)


def copy_into(destination: torch.Tensor, tensor: TensorInfo, file: BinaryIO) -> None:
    """Copies a stored tensor into `destination`: same shape, contiguous, any dtype and device.

    `file` is the opened `tensor.file`. The data is mapped window by window and every window is
    unmapped before the next, so at most `WINDOW_BYTES` of the file are resident. Raises
    `CheckpointError` if the file has become shorter since its header was read.
    """
    flat = destination.view(-1)
    itemsize = tensor.spec.dtype.itemsize
    if os.fstat(file.fileno()).st_size < tensor.start + tensor.nbytes:
        # Touching a mapped page past the end would kill the process.
        raise CheckpointError(f"{tensor.file}: tensor {tensor.name}: the file was truncated")
    per_window = WINDOW_BYTES // itemsize
    for first in range(0, flat.numel(), per_window):
        count = min(per_window, flat.numel() - first)
        begin = tensor.start + first * itemsize
        slack = begin % mmap.ALLOCATIONGRANULARITY
        # ACCESS_COPY because torch takes no read-only buffers; nothing is written, so nothing is
        # copied.
        try:
            window = mmap.mmap(
                file.fileno(),
                slack + count * itemsize,
                access=mmap.ACCESS_COPY,
                offset=begin - slack,
            )
        except OSError as error:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name}: cannot be mapped: {error.strerror}"
            ) from None
        values = torch.frombuffer(window, dtype=torch.uint8, offset=slack, count=count * itemsize)
        if slack % itemsize:
            # The format does not promise aligned data, torch's typed views need it.
            values = values.clone()
        flat[first : first + count].copy_(values.view(tensor.spec.dtype))
        # The last reference to the buffer; the mapping ends with it.
        del values, window


def write_file(
    path: Path, specs: Mapping[str, TensorSpec], contents: Iterator[Iterable[torch.Tensor]]
) -> Iterator[int]:
    """Writes a safetensors file, taking the content of each tensor only when its turn comes.

    `specs` gives names, shapes and dtypes in order; `contents` their data in the same order, each
    as pieces that are written one after the other. Yields the bytes of each piece, for progress.
    Raises `CheckpointError` if the file cannot be written or a tensor is not as announced.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        header[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    # Spaces keep the data aligned to 8 bytes, as the format asks of writers.
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for (name, spec), pieces in zip(specs.items(), contents, strict=True):
                written = 0
                for piece in pieces:
                    if piece.dtype != spec.dtype:
                        raise CheckpointError(
                            f"{path.name}: tensor {name} must be {spec.dtype}, got {piece.dtype}"
                        )
                    _write_data(file, piece)
                    written += piece.nbytes
                    yield piece.nbytes
                if written != spec.nbytes:
                    raise CheckpointError(
                        f"{path.name}: tensor {name} must have {spec.nbytes} bytes, got {written}"
                    )
    except OSError as fault:
        raise CheckpointError(f"{path}: cannot be written: {fault.strerror or fault}") from None


def _write_data(file: BinaryIO, tensor: torch.Tensor) -> None:
    flat = tensor.detach().reshape(-1)
    step = max(1, WINDOW_BYTES // tensor.dtype.itemsize)
    for first in range(0, flat.numel(), step):
        piece = flat[first : first + step].cpu().contiguous()
        file.write(piece.view(torch.uint8).numpy().data)
