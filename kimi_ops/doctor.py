"""`kimi-ops doctor`: versions, devices, which backend each op would use and why the others not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
from typing import Any

import torch

from kimi_ops import _native, _nvrtc
from kimi_ops._backends import AUTOMATIC_ORDER, BACKENDS
from kimi_ops._dispatch import explain, op_names
from kimi_ops._version import __version__
from kimi_ops.cuda._launcher import SOURCES

_PACKAGES = {  # distribution: what it is needed for
    "torch": "everything",
    "triton": "the triton backend",
    "cupy-cuda13x": "the cuda backend (or cupy-cuda12x)",
    "cupy-cuda12x": "the cuda backend (or cupy-cuda13x)",
    "safetensors": "the model",
    "tiktoken": "the model",
    "jinja2": "the model",
    "pillow": "pictures",
    "av": "clips",
}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The name of the CPU."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    except OSError:
        return platform.processor()


def _capabilities() -> list[tuple[int, int]]:
    """Compute capabilities of the GPUs here, each once; an H100's where there is none."""
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return sorted(found) or [(9, 0)]


def report() -> dict[str, Any]:
    """What `kimi-ops doctor --json` prints: versions, devices, native code, and ops by device."""
    missing = _native.missing()
    devices = [{"type": "cpu", "name": processor(), "threads": torch.get_num_threads()}]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append(
                {
                    "type": "cuda",
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "memory_bytes": properties.total_memory,
                }
            )
    return {
        "kimi_ops": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("KIMI_OPS_")},
        "devices": devices,
        "cpu_library": {
            "missing": missing,
            "instruction_set": None if missing else _native.cpu_isa(),
            "instruction_sets": [] if missing else list(_native.cpu_isas()),
            "threads_of_torch": None if missing else _native.shares_torch_threads(),
            "compiler": shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"),
            "cmake": shutil.which("cmake"),
        },
        "cuda_binaries": {
            "cache": str(_nvrtc.cache_folder()),
            "of": {
                source.stem: {
                    ".".join(map(str, capability)): _nvrtc.origin_of(source, capability)
                    for capability in _capabilities()
                }
                for source in sorted(SOURCES.glob("*.cu"))
            },
        },
        "ops": {
            device: {
                op: {"chosen": (e := explain(op, device=device)).chosen, "reasons": dict(e.reasons)}
                for op in op_names()
            }
            for device in AUTOMATIC_ORDER
        },
    }


def run(*, as_json: bool) -> int:
    """Prints the report; 0 if every op can run on the CPU, else 1."""
    found = report()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return 0 if all(op["chosen"] for op in found["ops"]["cpu"].values()) else 1


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"kimi-ops {found['kimi_ops']}, Python {found['python']}", highlight=False)
    packages = Table("package", "version", "needed for", title="Packages", title_justify="left")
    for name, version in found["packages"].items():
        packages.add_row(name, version or "not installed", _PACKAGES[name])
    console.print(packages)
    for device in found["devices"]:
        details = ", ".join(f"{k} {v}" for k, v in device.items() if k not in ("type", "name"))
        console.print(f"{device['type']}: {device['name']} ({details})", highlight=False)
    if not torch.cuda.is_available():
        console.print("cuda: torch sees no device", highlight=False)
    library = found["cpu_library"]
    threads = "threads of torch" if library["threads_of_torch"] else "threads of its own"
    sets = ", ".join(library["instruction_sets"])
    state = library["missing"] or (
        f"instruction set {library['instruction_set']} (of {sets}), on {threads}"
    )
    console.print(f"CPU library: {state}", highlight=False)
    console.print(f"  compiler {library['compiler']}, cmake {library['cmake']}", highlight=False)
    console.print(f"CUDA C++ kernels, cache {found['cuda_binaries']['cache']}:", highlight=False)
    sources: dict[str, list[str]] = {}
    for stem, by_capability in found["cuda_binaries"]["of"].items():
        for capability, origin in by_capability.items():
            sources.setdefault(f"for capability {capability}: {origin}", []).append(stem)
    for text, stems in sources.items():
        console.print(f"  {text} ({', '.join(stems)})", highlight=False)
    for name, value in found["environment"].items():
        console.print(f"{name}={value}", highlight=False)

    table = Table("op", "on cpu", "on cuda", title="Backends", title_justify="left")
    for op in found["ops"]["cpu"]:
        table.add_row(op, *(found["ops"][d][op]["chosen"] or "none" for d in ("cpu", "cuda")))
    console.print(table)
    console.print("Why not:", highlight=False)
    reasons: dict[str, dict[str, list[str]]] = {name: {} for name in BACKENDS}
    for op, entry in found["ops"]["cpu"].items():
        for name, reason in entry["reasons"].items():
            if reason:
                text = reason.replace(f" for {op}", "")
                reasons.setdefault(name, {}).setdefault(text, []).append(op)
    for name, by_text in reasons.items():
        for text, ops in by_text.items():
            which = "every op" if len(ops) == len(op_names()) else ", ".join(ops)
            console.print(f"  {name}: {text} ({which})", highlight=False)
