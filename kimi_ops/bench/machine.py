"""What results were measured on and with: device, clocks, versions, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from kimi_ops import _native
from kimi_ops._version import __version__
from kimi_ops.bench.ceilings import Ceilings
from kimi_ops.bench.memory import cache_bytes
from kimi_ops.doctor import processor
from kimi_ops.testing.checkout import commit_of

_FOLDERS = ("kimi_ops", "kernels", "csrc", "bench", ":(exclude)bench/results")
_PACKAGES = ("torch", "triton", "transformers", "kt-kernel", "llama-cpp-python", "flash-mla",
             "flashinfer-python", "vllm", "sgl-kernel")  # fmt: skip


def facts(device: torch.device) -> dict[str, Any]:
    """All of them, JSON's types alone; without what the run itself finds out."""
    versions = {"kimi-ops": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {
        "device": str(device),
        "name": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "clock": _clock(),
        "commit": commit_of(*_FOLDERS),
        "versions": versions,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.machine()}",
        "cache_bytes": cache_bytes(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "clock": f"at most {properties.clock_rate / 1e3:.0f} MHz"
            if hasattr(properties, "clock_rate")
            else "unknown",
            "cuda": torch.version.cuda,
        }
    elif _native.missing() is None:
        found["instruction set"] = _native.cpu_isa()
    return found


def with_ceilings(found: dict[str, Any], ceilings: Ceilings, threads: int) -> dict[str, Any]:
    """The facts with the rates that a run has first measured, bytes or operations per second."""
    rates = dict(found.get("ceilings", {}))
    rates[str(threads)] = dict(ceilings.rates)
    return {**found, "ceilings": rates}


def _clock() -> str:
    """Of a CPU: what the system says at this moment."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    mhz = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    return f"{min(mhz):.0f} to {max(mhz):.0f} MHz now" if mhz else "unknown"
