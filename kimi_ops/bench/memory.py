"""How much memory a device has free, and how much of it a cache holds."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_DEFAULT_CACHE = 32 << 20


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache of a device."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number = path.read_text().strip()
        sizes.append(int(number.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(number[-1], 0))
    return max(sizes, default=_DEFAULT_CACHE)


def available_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable"))
    return int(kib) << 10
