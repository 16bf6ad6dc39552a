"""Which CUDA C++ sources there are, and the digest by which a binary is known to be of them.

Imports nothing of this package and no torch: `setup.py` loads it by its path.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

# For NVRTC and nvcc alike.
OPTIONS = ("--std=c++17",)
# What the fatbins hold (nvcc's names); a device is served by its own entry, or by one of its major
# version and an older minor one if that has no architecture-specific features ("a").
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")


def digest(source: Path) -> str:
    """SHA-256 of a source, of all headers beside it, and of the options, in hexadecimal."""
    found = hashlib.sha256("\0".join(OPTIONS).encode())
    for path in [source, *sorted(source.parent.glob("*.cuh"))]:
        found.update(b"\0" + path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def architecture(capability: tuple[int, int]) -> str:
    """The architecture to compile for on a device: with "a" where the fatbins have it so.

    Kernels for sm_90 use its features; those for sm_100 could, and do not yet.
    """
    name = f"sm_{capability[0]}{capability[1]}"
    return f"{name}a" if capability in ((9, 0), (10, 0)) else name


def serves(entry: str, capability: tuple[int, int]) -> bool:
    """Whether a binary for ``entry`` runs on a device of that compute capability."""
    number = int(entry.removeprefix("sm_").rstrip("a"))
    major, minor = divmod(number, 10)
    if entry.endswith("a"):
        return (major, minor) == capability
    return major == capability[0] and minor <= capability[1]
