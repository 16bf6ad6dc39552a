"""Maps `kernels/`, `csrc/` and `bench/` into the package and builds the CPU library with CMake.

Without a C++ compiler the package installs all the same, as pure Python (``kimi-ops doctor`` says
that the CPU backend is missing). The environment variable ``KIMI_OPS_NATIVE`` decides otherwise:
``0`` never builds, ``1`` fails where nothing can be built. ``KIMI_OPS_FATBINS=1`` adds binaries of
the CUDA C++ kernels, for which it needs nvcc; without them a first use compiles.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from setuptools import Distribution, Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
LIBRARY = "kimi_ops/_lib/libkimi_ops_cpu.so"
# Folders of the top level that are packages when installed.
MAPPED = {"kimi_ops.kernels": "kernels", "kimi_ops.csrc": "csrc", "kimi_ops.bench.cases": "bench"}


def builds_native() -> bool:
    wish = os.environ.get("KIMI_OPS_NATIVE", "auto")
    if wish not in ("0", "1", "auto"):
        raise ValueError(f"KIMI_OPS_NATIVE must be 0, 1 or auto, got {wish!r}")
    compiler = os.environ.get("CXX", "").split() or ["c++", "g++", "clang++"]
    tools = {"a C++ compiler": any(map(shutil.which, compiler)), "cmake": shutil.which("cmake")}
    missing = [name for name, found in tools.items() if not found]
    if wish == "1" and missing:
        raise RuntimeError(f"KIMI_OPS_NATIVE=1, but there is no {' and no '.join(missing)}")
    return wish != "0" and not missing


def cuda_sources() -> Any:
    """`kimi_ops/_cuda_sources.py`, without importing the package and torch with it."""
    spec = importlib.util.spec_from_file_location("sources", ROOT / "kimi_ops/_cuda_sources.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nvcc() -> str:
    """The compiler of the fatbins: that of CUDA_HOME, else the one in the path."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if found is None:
        where = f"CUDA_HOME ({home})" if home else "the path"
        raise RuntimeError(f"KIMI_OPS_FATBINS=1 needs nvcc, and there is none in {where}")
    return found


def architectures() -> list[str]:
    """Those of `_cuda_sources.ARCHITECTURES` that this nvcc knows; it does not list sm_90a."""
    command = [nvcc(), "--list-gpu-code"]
    known = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    wanted = cuda_sources().ARCHITECTURES
    found = [name for name in wanted if name.rstrip("a") in known]
    if not found:
        raise RuntimeError(f"{nvcc()} compiles for none of {', '.join(wanted)}")
    if missing := [name for name in wanted if name not in found]:
        print(f"fatbins: {nvcc()} does not know {', '.join(missing)}; first use compiles there")
    return found


class CMakeBuild(build_ext):
    """Runs CMake in the build folder and puts its results where the package looks for them."""

    def run(self) -> None:
        # Of a checkout, and not of one kind of build: what is installed in place and what goes into
        # a wheel are compiled once.
        build = ROOT / "build" / "native"
        # What an earlier build remembers (the ninja of its own temporary environment, for one) may
        # be gone; what it has compiled stays, unlike with cmake --fresh.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = ["cmake", "-S", str(ROOT), "-B", str(build)]
        configure.append("-DCMAKE_BUILD_TYPE=Release")
        found = architectures() if FATBINS else []
        if FATBINS:
            configure += ["-DKIMI_FATBINS=ON", f"-DKIMI_ARCHITECTURES={';'.join(found)}"]
            configure.append(f"-DNVCC={nvcc()}")
            configure.append(f"-DKIMI_CUDA_OPTIONS={';'.join(cuda_sources().OPTIONS)}")
        if ninja := shutil.which("ninja"):
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel"], check=True)
        target = (ROOT if self.inplace else Path(self.build_lib)) / LIBRARY
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target.parent / "cuda", ignore_errors=True)
        if FATBINS:
            self._copy_fatbins(build, target.parent / "cuda", found)
        # Renamed into place: a process that has the old library open keeps the old file.
        shutil.copy2(build / target.name, target.with_suffix(".new"))
        os.replace(target.with_suffix(".new"), target)

    def _copy_fatbins(self, build: Path, folder: Path, architectures: list[str]) -> None:
        """The fatbins, and which source each is of: one of another source is not used."""
        folder.mkdir(parents=True)
        manifest = {}
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            shutil.copy2(build / f"{source.stem}.fatbin", folder)
            entry = {"digest": cuda_sources().digest(source), "architectures": architectures}
            manifest[source.stem] = entry
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / LIBRARY)]

    def get_output_mapping(self) -> dict[str, str]:
        return {str(Path(self.build_lib) / LIBRARY): LIBRARY} if self.editable_mode else {}


class CleanBuild(build_py):
    """Starts from nothing, so that a file deleted from the sources is not in the next wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "kimi_ops", ignore_errors=True)
        super().run()


class PlatformWheel(bdist_wheel):
    """A C ABI library ties the wheel to the platform, but to no version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform if NATIVE else "any"


class NativeDistribution(Distribution):
    """A distribution whose wheel is for one platform if it holds the library."""

    def has_ext_modules(self) -> bool:
        return NATIVE


NATIVE = builds_native()
FATBINS = os.environ.get("KIMI_OPS_FATBINS", "0") == "1"
if FATBINS and not NATIVE:
    raise RuntimeError("KIMI_OPS_FATBINS=1 needs a C++ compiler and cmake too")

setup(
    distclass=NativeDistribution,
    ext_modules=[Extension("kimi_ops._lib.libkimi_ops_cpu", sources=[])] if NATIVE else [],
    cmdclass={"build_ext": CMakeBuild, "build_py": CleanBuild, "bdist_wheel": PlatformWheel},
    packages=[
        *find_packages(include=["kimi_ops", "kimi_ops.*"]),
        *MAPPED,
    ],
    package_dir={"kimi_ops": "kimi_ops", **MAPPED},
    package_data={
        "kimi_ops": ["py.typed"],
        "kimi_ops.model": ["configs/*.json", "*.jinja"],
        "kimi_ops.checkpoints": ["tiny/*"],
        "kimi_ops.csrc": ["*.h", "cpu/**/*", "cuda/**/*"],
    },
    include_package_data=False,
)
