"""Runs CUDA C++ kernels as PTX on CPU tensors: NVRTC compiles, the emulator executes.

`run_cuda` is one launch. `EmulatedLauncher` is what `kimi_ops.testing.runner.emulated` puts in the
place of the package's launcher of CUDA C++.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from kimi_ops._nvrtc import Cached, cache_folder
from kimi_ops.cuda._launcher import SOURCES
from kimi_ops.testing.ptx import Checks, Kernel, Report
from kimi_ops.testing.ptx.written import Written
from kimi_ops.testing.static.cuda_source import compile_ptx, ptx_compiler

Argument = torch.Tensor | int | float | bytes | None
# Of a source, by the name of a kernel: the PTX that holds it, and its name there.
_COMPILED: dict[tuple[object, ...], dict[str, tuple[str, str]]] = {}


@lru_cache(maxsize=256)
def parsed(ptx: str, name: str) -> Kernel:
    """The kernel of a text; the same object for the same text, so that it is parsed once."""
    return Kernel(ptx, name)


def _headers(folders: Sequence[Path]) -> str:
    """A digest of all headers in folders: a source is compiled anew when one of them changes."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".h", ".cuh", ".hpp")):
            digest.update(f"{path}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def kept_ptx(
    source: str | Path,
    arch: str | int,
    *,
    names: Sequence[str],
    key: tuple[object, ...],
    **how: Any,
) -> tuple[str, dict[str, str]]:
    """As `compile_ptx`; of the package's own sources the PTX is kept between processes.

    ``key`` holds all that the PTX follows from but the compiler. Those sources have no templates
    among their kernels, so that names are the same in the PTX. A damaged file is made anew.
    """
    if not isinstance(source, Path) or source.parent != SOURCES:
        return compile_ptx(source, arch, names=names, **how)
    digest = hashlib.sha256(repr((ptx_compiler(), key)).encode()).hexdigest()[:32]
    kept = Cached(cache_folder() / f"{source.stem}-{arch}-{digest}.ptx")
    if kept.is_whole():
        return kept.path.read_text(), {name: name for name in names}
    ptx, lowered = compile_ptx(source, arch, names=names, **how)
    with contextlib.suppress(OSError):  # a folder that cannot be written costs time alone
        kept.write(ptx.encode())
    return ptx, lowered


def compile_kernel(
    source: str | Path,
    name: str,
    *,
    arch: str | int = 80,
    defines: Mapping[str, str | int] | None = None,
    options: Sequence[str] = (),
    include: Sequence[Path] = (),
) -> Kernel:
    """One kernel of a CUDA C++ source, ready for the emulator; compiled once per process.

    Args:
        source: a path, or the text itself.
        name: of the kernel, or the name expression of a template instance, ``kernel<128>``.
        arch, defines, options, include: as for `kimi_ops.testing.static.compile_cuda`.

    Raises:
        MissingToolError: NVRTC or CUDA's headers are not installed.
        CudaCompileError: the source does not compile, or has no such kernel.
        UnsupportedPtx: an instruction that the emulator does not have.
    """
    folders = [*include, source.resolve().parent] if isinstance(source, Path) else list(include)
    text = source.read_text() if isinstance(source, Path) else source
    key = (
        text,
        str(source) if isinstance(source, Path) else "",
        str(arch),
        tuple(sorted((defines or {}).items())),
        tuple(options),
        _headers(folders),
    )
    known = _COMPILED.setdefault(key, {})
    if name not in known:
        ptx, names = kept_ptx(
            source, arch, names=[name], key=key, defines=defines, options=options, include=include
        )
        # All extern "C" kernels of the source are in it, whichever was asked for.
        known.update({n: (ptx, n) for n in re.findall(r"\.entry (\w+)", ptx)})
        known[name] = ptx, names[name]
    return parsed(*known[name])


def run_cuda(
    source: str | Path,
    name: str,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[Argument],
    *,
    arch: str | int = 80,
    shared_bytes: int = 0,
    defines: Mapping[str, str | int] | None = None,
    options: Sequence[str] = (),
    include: Sequence[Path] = (),
    cooperative: bool = False,
    uninitialised: Sequence[torch.Tensor] = (),
    written: Written | None = None,
    checks: Checks | None = None,
    seed: int | None = None,
) -> Report:
    """Compiles ``name`` and runs ``name<<<grid, block, shared_bytes>>>(*args)``, in place.

    Args:
        source, name, arch, defines, options, include: as for `compile_kernel`.
        grid, block: one to three sizes.
        args: in the order of the parameters: CPU tensors for pointers, None for a null pointer,
            ints and floats for scalars, bytes for structs.
        shared_bytes: of dynamic shared memory.
        cooperative, uninitialised, written, checks, seed: as `Kernel.launch` takes them.

    Raises:
        LaunchError: arguments that do not fit the kernel.
        PtxError: what a check found; and as `compile_kernel`.
    """
    kernel = compile_kernel(
        source, name, arch=arch, defines=defines, options=options, include=include
    )
    return kernel.launch(
        grid,
        block,
        [0 if value is None else value for value in args],
        dynamic_shared_bytes=shared_bytes,
        cooperative=cooperative,
        uninitialised=uninitialised,
        written=written,
        checks=checks,
        seed=seed,
    )


class EmulatedLauncher:
    """Launches CUDA C++ in the emulator (see `kimi_ops.cuda._launcher.Launcher`).

    Args:
        arch, checks, seed, written: as for `run_cuda`.
        done: called with the name of each kernel and its report.
    """

    def __init__(
        self,
        arch: str | int,
        checks: Checks | None,
        seed: int | None,
        written: Written,
        done: Callable[[str, Report], None],
    ) -> None:
        self._arch, self._checks, self._seed = arch, checks, seed
        self._written, self._done = written, done

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
        """One launch; errors as those of `run_cuda`."""
        report = run_cuda(
            source,
            name,
            grid,
            block,
            args,
            arch=self._arch,
            shared_bytes=shared_bytes,
            written=self._written,
            checks=self._checks,
            seed=self._seed,
        )
        self._done(name, report)
