"""Builds, caches and launches the CUDA C++ kernels on a GPU, with CuPy.

A source of `csrc/cuda/` becomes one binary for one architecture. Where it comes from, first match:

1. the fatbin in the wheel (`kimi_ops/_lib/cuda/`), if it is of this very source and serves the GPU;
2. the cache on disk: ``KIMI_OPS_CACHE``, or ``kimi_ops`` in ``XDG_CACHE_HOME`` or ``~/.cache``;
3. NVRTC, in about a second, and then into the cache.

Processes may share a cache: files are renamed into place whole, and one whose digest does not
agree is compiled anew. Kernels run on torch's current stream, so that a CUDA graph captures them
(after a first call outside it, which loads the binary).
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from kimi_ops._cuda_sources import OPTIONS, architecture, digest, serves
from kimi_ops._target import target

FATBINS = Path(__file__).parent / "_lib" / "cuda"
REMEDY = "pip install 'kimi-ops[cuda13]' (or [cuda12]): CuPy and NVRTC"

Argument = Tensor | int | float | None


class CompileError(RuntimeError):
    """A CUDA C++ source does not compile, or nothing here can compile it."""


def cache_folder() -> Path:
    """Where compiled kernels are kept between processes."""
    if chosen := os.environ.get("KIMI_OPS_CACHE"):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "kimi_ops"


@functools.cache
def _nvrtc() -> Any:
    """CuPy's nvrtc module, with NVRTC's library loaded."""
    try:
        module = importlib.import_module("cupy.cuda").nvrtc
        module.getVersion()
    except (ImportError, RuntimeError) as error:  # no CuPy, or no libnvrtc that it could load
        said = str(error).splitlines()[0]
        raise CompileError(f"CUDA C++ cannot be compiled here ({said}): {REMEDY}") from error
    return module


def nvrtc_version() -> str:
    """Version of NVRTC, ``"13.0"``; raises `CompileError` where there is none."""
    return ".".join(map(str, _nvrtc().getVersion()))


def compile_source(source: Path, arch: str) -> bytes:
    """A cubin of all kernels of a source.

    Args:
        source: in `csrc/cuda/`; headers are searched beside it and nowhere else.
        arch: ``"sm_80"``, ``"sm_90a"``.

    Raises:
        CompileError: no NVRTC, one that does not know the architecture, or an error in the source;
            names the file, the line and the text of the line.
    """
    nvrtc = _nvrtc()
    number = int(re.sub(r"\D", "", arch))
    known = nvrtc.getSupportedArchs()
    if number not in known:
        raise CompileError(
            f"NVRTC {nvrtc_version()} cannot compile for {arch}, only for {sorted(known)}: {REMEDY}"
        )
    # -lineinfo names lines in profilers and costs nothing but space, which fatbins save.
    options = (f"--gpu-architecture={arch}", f"-I{source.resolve().parent}", "-lineinfo", *OPTIONS)
    program = nvrtc.createProgram(source.read_text(), str(source), (), ())
    try:
        nvrtc.compileProgram(program, options)
        cubin: bytes = nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program).strip()
        raise CompileError(f"{source.name} does not compile for {arch}\n{log or error}") from error
    finally:
        nvrtc.destroyProgram(program)
    return cubin


@dataclass(frozen=True)
class Cached:
    """One binary in the cache folder, beside the digest of its bytes."""

    path: Path

    @property
    def _digest(self) -> Path:
        return self.path.with_suffix(".sha256")

    def is_whole(self) -> bool:
        """Whether both files are there and agree."""
        try:
            written = self._digest.read_text().strip()
            return hashlib.sha256(self.path.read_bytes()).hexdigest() == written
        except (OSError, UnicodeDecodeError):
            return False

    def write(self, cubin: bytes) -> None:
        """Renames both files into place; raises OSError where the folder cannot be written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        digest_of = hashlib.sha256(cubin).hexdigest().encode()
        for place, content in ((self.path, cubin), (self._digest, digest_of)):
            handle, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                os.replace(name, place)
            except OSError:
                os.unlink(name)
                raise


@dataclass(frozen=True)
class Binary:
    """A file that holds a source's kernels for a device, and where it came from.

    Attributes:
        path: of a fatbin or cubin.
        origin: "fatbin", "cache", "compiled" or "compiled, not kept".
    """

    path: Path
    origin: str


def fatbin_of(source: Path, capability: tuple[int, int]) -> Path | None:
    """The wheel's fatbin of a source if it is of this text and serves the device, else None."""
    path = FATBINS / f"{source.stem}.fatbin"
    try:
        built = json.loads((FATBINS / "manifest.json").read_text())[source.stem]
    except (OSError, ValueError, KeyError):  # none was built, or not of this source
        return None
    fits = built["digest"] == digest(source) and path.is_file()
    return path if fits and any(serves(a, capability) for a in built["architectures"]) else None


def cached_of(source: Path, capability: tuple[int, int]) -> Cached:
    """Where the cache keeps a source's binary for a device, whether it is there or not."""
    arch = architecture(capability)
    return Cached(cache_folder() / f"{source.stem}-{arch}-{digest(source)[:32]}.cubin")


def binary_of(source: Path, capability: tuple[int, int]) -> Binary:
    """Finds or makes the binary of a source for a device.

    Args:
        source: in `csrc/cuda/`.
        capability: compute capability of the device, (major, minor).

    Raises:
        CompileError: it had to be compiled and could not be.
    """
    if path := fatbin_of(source, capability):
        return Binary(path, "fatbin")
    cached = cached_of(source, capability)
    if cached.is_whole():
        return Binary(cached.path, "cache")
    cubin = compile_source(source, architecture(capability))
    try:
        cached.write(cubin)
    except OSError as error:
        _warn_once(f"compiled kernels are not kept: {error}; set KIMI_OPS_CACHE to a folder")
        handle, name = tempfile.mkstemp(suffix=".cubin")
        with os.fdopen(handle, "wb") as file:
            file.write(cubin)
        return Binary(Path(name), "compiled, not kept")
    return Binary(cached.path, "compiled")


def origin_of(source: Path, capability: tuple[int, int]) -> str:
    """Where the next launch on such a device gets a source's binary from, without compiling it."""
    if fatbin_of(source, capability):
        return "fatbin"
    if cached_of(source, capability).is_whole():
        return "cache"
    try:
        return f"compiled at first use, NVRTC {nvrtc_version()}"
    except CompileError as error:
        return f"nowhere: {error}"


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning)


@functools.cache
def _module(source: Path, device: int) -> Any:
    cupy = importlib.import_module("cupy")
    binary = binary_of(source, torch.cuda.get_device_capability(device))
    module = cupy.RawModule(path=str(binary.path))
    module.compile()  # loads it now, so that a file of one use can go
    if binary.origin == "compiled, not kept":
        binary.path.unlink()
    return module


@functools.cache
def _kernel(source: Path, name: str, device: int) -> Any:
    """A kernel, on the current device, which may use all the shared memory that a block can have.

    Without that a launch may have 48 KiB, static and dynamic together.
    """
    kernel = _module(source, device).get_function(name)
    most = target(torch.device("cuda", device)).shared_bytes
    kernel.max_dynamic_shared_size_bytes = most - kernel.shared_size_bytes
    return kernel


def packed_arguments(args: Sequence[Argument]) -> tuple[Any, ...]:
    """Arguments as CuPy's launch takes them: numpy scalars whose bytes are the parameters'.

    Integers are 64 bits wide; a kernel's 32-bit parameter reads the lower half, which on a
    little-endian host is the first. Floats are float32: no kernel here has a double.
    """
    packed: list[Any] = []
    for value in args:
        if value is None or isinstance(value, Tensor):
            packed.append(numpy.uint64(0 if value is None else value.data_ptr()))
        elif isinstance(value, int):
            packed.append(numpy.int64(value))
        else:
            packed.append(numpy.float32(value))
    return tuple(packed)


class CupyLauncher:
    """Launches CUDA C++ on the GPU of the tensors (see `kimi_ops.cuda._launcher.Launcher`)."""

    def launch(
        self,
        source: Path,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Argument],
        *,
        shared_bytes: int = 0,
    ) -> None:
        """One launch on torch's current stream; raises `CompileError` as `binary_of` does."""
        device = next(a.device for a in args if isinstance(a, Tensor))
        if device.type != "cuda":
            raise RuntimeError(
                f"{name} runs on a GPU, and its tensors are on {device}: without one, run it "
                "within kimi_ops.testing.runner.emulated()"
            )
        cupy = importlib.import_module("cupy")
        stream = torch.cuda.current_stream(device).cuda_stream
        with cupy.cuda.Device(device.index), cupy.cuda.ExternalStream(stream, device.index):
            kernel = _kernel(source, name, device.index)
            kernel(tuple(grid), tuple(block), packed_arguments(args), shared_mem=shared_bytes)
