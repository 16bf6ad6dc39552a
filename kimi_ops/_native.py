"""Loads the CPU library (`csrc/`, a plain C ABI) through ctypes.

The library belongs to no torch version: it is built by CMake at installation (`setup.py`) and
placed in `kimi_ops/_lib/`. An installation without a compiler has none, and says so here.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

LIBRARY = Path(__file__).parent / "_lib" / "libkimi_ops_cpu.so"
ABI_VERSION = 1  # of csrc/kimi.h; raised with every incompatible change there


@functools.cache
def missing() -> str | None:
    """Why there is no CPU library, and how to get it; None if it is there."""
    if not LIBRARY.is_file():
        return (
            "the CPU library was not built: install a C++20 compiler "
            "and reinstall kimi-ops (`kimi-ops doctor` shows what was found)"
        )
    try:
        found = _open().kimi_abi_version()
    except (OSError, AttributeError) as error:  # of another platform, truncated, or not ours
        return f"the CPU library cannot be loaded ({error}): reinstall kimi-ops"
    if found != ABI_VERSION:
        return f"the CPU library has ABI {found}, this package needs {ABI_VERSION}: reinstall it"
    return None


@functools.cache
def _open() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    library.kimi_abi_version.restype = ctypes.c_int
    library.kimi_cpu_isa.restype = ctypes.c_char_p
    return library


def cpu_isa() -> str:
    """Best instruction set that both this host and the library have: avx512, avx2 or scalar."""
    isa: bytes = _open().kimi_cpu_isa()
    return isa.decode()
