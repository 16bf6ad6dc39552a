"""A wheel built here holds what it must and imports from where it is installed."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from kimi_ops._cuda_sources import digest

ROOT = Path(__file__).parents[1]
PROBE = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch, kimi_ops
from kimi_ops import _native, kernels, csrc
root = Path(sys.argv[1])
for module in (kimi_ops, kernels, csrc):
    assert Path(module.__file__).is_relative_to(root), module.__file__
assert (Path(csrc.__file__).parent / "kimi.h").is_file()
assert kimi_ops.rms_norm(torch.ones(1, 4), torch.ones(4), 1e-5).isfinite().all()
print(_native.missing() or _native.cpu_isa())
"""


def _build(kind: str, target: Path, *, timeout: int = 600, **environment: str) -> Path:
    # CMake and ninja of the running environment come first, as an installer's build would have it.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # One build folder, and tests that several processes share: one build at a time.
    with (ROOT / "setup.py").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(
            [
                sys.executable,
                "-m",
                "build",
                "--no-isolation",
                f"--{kind}",
                "--outdir",
                target,
                ROOT,
            ],
            env=os.environ | {"PATH": path} | environment,
            check=True,
            capture_output=True,
            timeout=timeout,
        )
    (built,) = target.iterdir()
    return built


def _imported(wheel: Path, folder: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    # -I and another folder: what is imported is the wheel, not this checkout.
    result = subprocess.run(
        [sys.executable, "-I", "-c", PROBE, folder],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return _build("wheel", tmp_path_factory.mktemp("native"))


def test_wheel_holds_sources_library_and_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "-py3-none-" in wheel.name
    assert {
        "kimi_ops/py.typed",
        "kimi_ops/kernels/__init__.py",
        "kimi_ops/csrc/kimi.h",
        "kimi_ops/_lib/libkimi_ops_cpu.so",
    } <= names
    sources = {
        f"kimi_ops/csrc/{p.relative_to(ROOT / 'csrc')}"
        for p in (ROOT / "csrc").rglob("*.*")
        if p.suffix in (".h", ".cpp", ".cu", ".cuh")
    }
    assert sources <= names
    kernels = {f"kimi_ops/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    assert kernels <= names
    tops = {name.split("/")[0] for name in names}
    assert all(top == "kimi_ops" or top.endswith(".dist-info") for top in tops), tops


def test_wheel_imports_where_it_is_installed(wheel, tmp_path):
    assert _imported(wheel, tmp_path) in ("amx", "avx512", "avx512f", "avx2", "scalar")


def test_second_wheel_forgets_the_first(wheel, tmp_path):
    """A file gone from the sources is not in the next wheel; the build tool may have moved."""
    left = next((ROOT / "build").glob("lib*/kimi_ops")) / "removed_since.py"
    left.write_text("")
    cache = ROOT / "build/native/CMakeCache.txt"
    cache.write_text(re.sub(r"(CMAKE_MAKE_PROGRAM:\w+=).*", r"\1/nowhere/ninja", cache.read_text()))
    names = zipfile.ZipFile(_build("wheel", tmp_path)).namelist()
    assert "kimi_ops/removed_since.py" not in names
    assert "kimi_ops/_lib/libkimi_ops_cpu.so" in names


def test_wheel_without_a_compiler_is_pure_python_and_says_so(tmp_path):
    wheel = _build("wheel", tmp_path / "dist", KIMI_OPS_NATIVE="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "the CPU library was not built: install a C++20 compiler" in _imported(
        wheel, tmp_path / "site"
    )


def test_sdist_holds_everything_a_build_needs(tmp_path):
    sdist = _build("sdist", tmp_path)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = ["CMakeLists.txt", "setup.py", "kernels/__init__.py", "csrc/kimi.h", "LICENSE"]
    needed += ["csrc/cpu/common/isa.cpp", "tests/conftest.py", "kimi_ops/ops/rms_norm.py"]
    assert set(needed) <= names
    assert not any(name.endswith(".so") for name in names)


def test_misspelt_wish_is_refused():
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=os.environ | {"KIMI_OPS_NATIVE": "yes"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "KIMI_OPS_NATIVE must be 0, 1 or auto, got 'yes'" in result.stderr


@pytest.mark.full
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_wheel_with_fatbins_of_every_cuda_source(tmp_path):
    # nvcc compiles every source six times.
    built = _build("wheel", tmp_path / "dist", timeout=3000, KIMI_OPS_FATBINS="1")
    wheel = zipfile.ZipFile(built)
    manifest = json.loads(wheel.read("kimi_ops/_lib/cuda/manifest.json"))
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    assert list(manifest) == [source.stem for source in sources]
    for source in sources:
        assert manifest[source.stem]["digest"] == digest(source)
        assert {"sm_80", "sm_90a"} <= set(manifest[source.stem]["architectures"])
        fatbin = wheel.read(f"kimi_ops/_lib/cuda/{source.stem}.fatbin")
        assert fatbin[:4] == b"\x50\xed\x55\xba"  # a fat binary's magic number
