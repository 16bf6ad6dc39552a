"""Where the binaries of the CUDA C++ kernels come from: fatbin, cache, compiler. No GPU is used."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import sys
import warnings

import numpy
import pytest
import torch

from kimi_ops import _nvrtc
from kimi_ops._cuda_sources import architecture, digest, serves
from kimi_ops.cuda import _launcher

KERNEL = '#include "factor.cuh"\nextern "C" __global__ void twice(float* x) { x[0] *= FACTOR; }\n'


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("KIMI_OPS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cuda"
    folder.mkdir()
    (folder / "factor.cuh").write_text("#define FACTOR 2.0f\n")
    (folder / "twice.cu").write_text(KERNEL)
    _nvrtc._warn_once.cache_clear()
    return folder / "twice.cu"


def test_compiles_once_and_then_comes_from_the_cache(source):
    first = _nvrtc.binary_of(source, (8, 0))
    assert first.origin == "compiled"
    assert first.path.read_bytes()[:4] == b"\x7fELF"
    assert first.path.parent == _nvrtc.cache_folder()
    assert _nvrtc.binary_of(source, (8, 0)) == _nvrtc.Binary(first.path, "cache")
    assert _nvrtc.binary_of(source, (9, 0)).path.name.startswith("twice-sm_90a-")


def test_a_change_of_source_or_header_is_another_binary(source):
    first = _nvrtc.binary_of(source, (8, 0))
    (source.parent / "factor.cuh").write_text("#define FACTOR 3.0f\n")
    second = _nvrtc.binary_of(source, (8, 0))
    source.write_text(KERNEL + "// longer\n")
    third = _nvrtc.binary_of(source, (8, 0))
    assert [b.origin for b in (first, second, third)] == ["compiled"] * 3
    assert len({b.path for b in (first, second, third)}) == 3


@pytest.mark.parametrize("damage", ["truncated", "emptied", "digest", "digest gone", "not text"])
def test_a_damaged_cache_file_is_compiled_anew(source, damage):
    whole = _nvrtc.binary_of(source, (8, 0)).path
    content, digest_file = whole.read_bytes(), whole.with_suffix(".sha256")
    if damage == "truncated":
        whole.write_bytes(content[:-1])
    elif damage == "emptied":
        whole.write_bytes(b"")
    elif damage == "digest":
        digest_file.write_text("0" * 64)
    elif damage == "digest gone":
        digest_file.unlink()
    else:
        digest_file.write_bytes(b"\xff\xfe")
    assert _nvrtc.binary_of(source, (8, 0)).origin == "compiled"
    assert digest_file.read_text() == hashlib.sha256(whole.read_bytes()).hexdigest()
    assert _nvrtc.binary_of(source, (8, 0)).origin == "cache"


def _compile(arguments):
    source, folder = arguments
    _nvrtc.cache_folder = lambda: folder
    return _nvrtc.binary_of(source, (8, 0)).path.read_bytes()


def test_processes_share_a_cache(source, tmp_path):
    folder = tmp_path / "shared"
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = pool.map(_compile, [(source, folder)] * 6, chunksize=1)
    assert len(set(map(len, found))) == 1
    assert sorted(p.suffix for p in folder.iterdir()) == [".cubin", ".sha256"]  # no leftovers


def test_without_a_writable_cache_it_compiles_in_memory_and_says_so_once(source, monkeypatch):
    blocked = source.parent / "a file"
    blocked.write_text("")
    monkeypatch.setenv("KIMI_OPS_CACHE", str(blocked))
    with pytest.warns(RuntimeWarning, match="compiled kernels are not kept.*set KIMI_OPS_CACHE"):
        binary = _nvrtc.binary_of(source, (8, 0))
    assert binary.origin == "compiled, not kept"
    assert binary.path.read_bytes()[:4] == b"\x7fELF"
    binary.path.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _nvrtc.binary_of(source, (8, 0)).path.unlink()


def test_an_error_names_file_line_and_text(source):
    source.write_text('extern "C" __global__ void twice(float* x) {\n  x[0] *= factor;\n}\n')
    with pytest.raises(
        _nvrtc.CompileError, match=r"twice\.cu does not compile for sm_80"
    ) as raised:
        _nvrtc.binary_of(source, (8, 0))
    assert 'twice.cu(2): error: identifier "factor" is undefined' in str(raised.value)
    assert "x[0] *= factor;" in str(raised.value)
    assert not _nvrtc.cache_folder().exists()


def test_an_architecture_that_nvrtc_does_not_know(source):
    with pytest.raises(_nvrtc.CompileError, match=r"NVRTC 13\.\d+ cannot compile for sm_70, only"):
        _nvrtc.binary_of(source, (7, 0))


class _NoLibrary:
    class nvrtc:  # noqa: N801
        @staticmethod
        def getVersion():  # noqa: N802
            raise RuntimeError("no libnvrtc.so\nlooked in many places")


@pytest.mark.parametrize(
    ("module", "said"), [(None, "import of cupy.cuda halted"), (_NoLibrary, "no libnvrtc.so\\)")]
)
def test_without_cupy_or_nvrtc_it_says_what_to_install(source, monkeypatch, module, said):
    _nvrtc._nvrtc.cache_clear()
    monkeypatch.setitem(sys.modules, "cupy.cuda", module)
    with pytest.raises(_nvrtc.CompileError, match=rf"{said}.*: pip install 'kimi-ops\[cuda13\]'"):
        _nvrtc.binary_of(source, (8, 0))
    _nvrtc._nvrtc.cache_clear()


def test_a_fatbin_is_preferred_if_it_is_of_this_source_and_serves_the_device(
    source, tmp_path, monkeypatch
):
    folder = tmp_path / "fatbins"
    folder.mkdir()
    monkeypatch.setattr(_nvrtc, "FATBINS", folder)
    assert _nvrtc.fatbin_of(source, (8, 0)) is None
    shutil.copy(_nvrtc.binary_of(source, (8, 0)).path, folder / "twice.fatbin")
    entry = {"digest": digest(source), "architectures": ["sm_80", "sm_90a"]}
    (folder / "manifest.json").write_text(json.dumps({"twice": entry}))
    assert _nvrtc.binary_of(source, (8, 6)).origin == "fatbin"
    assert _nvrtc.binary_of(source, (9, 0)).origin == "fatbin"
    assert _nvrtc.binary_of(source, (12, 0)).origin == "compiled"
    source.write_text(KERNEL + "// changed\n")
    assert _nvrtc.binary_of(source, (9, 0)).origin == "compiled"
    (folder / "manifest.json").write_text("{")
    assert _nvrtc.fatbin_of(source, (9, 0)) is None


def test_architectures_of_devices():
    assert [architecture(c) for c in ((8, 6), (9, 0), (10, 0), (12, 0))] == [
        "sm_86",
        "sm_90a",
        "sm_100a",
        "sm_120",
    ]
    assert serves("sm_80", (8, 9))
    assert not serves("sm_89", (8, 6))
    assert not serves("sm_80", (9, 0))
    assert serves("sm_90a", (9, 0))
    assert not serves("sm_100a", (10, 3))


def test_arguments_have_the_bytes_of_the_parameters():
    x = torch.zeros(3)
    pointer, null, count, eps = _nvrtc.packed_arguments([x, None, -2, 1e-5])
    assert pointer.tobytes() == numpy.uint64(x.data_ptr()).tobytes()
    assert int(null) == 0
    assert count.tobytes()[:4] == numpy.int32(-2).tobytes()
    assert eps.tobytes() == numpy.float32(1e-5).tobytes()


def test_tensors_on_the_cpu_are_refused_with_the_way_out():
    with pytest.raises(RuntimeError, match=r"within kimi_ops\.testing\.runner\.emulated\(\)"):
        _launcher.launch_kernel(
            "rms_norm", "rms_norm_kernel_bf16_vec_1", (1,), (32,), [torch.ones(1)]
        )


_SMALLEST = "rms_norm"  # of the sources; the others take a minute together


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem == _SMALLEST else pytest.mark.full)
        for path in sorted(_launcher.SOURCES.glob("*.cu"))
    ],
)
def test_a_source_compiles_with_the_users_options(path):
    """As `_nvrtc` compiles it; `test_cuda_compiled.py` has every source in every run."""
    cubin = _nvrtc.compile_source(path, "sm_80")
    assert cubin[:4] == b"\x7fELF"
