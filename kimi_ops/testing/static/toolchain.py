"""NVIDIA's binary tools as Triton ships them, and what ptxas says about a kernel.

No CUDA toolkit is needed: ``ptxas``, ``cuobjdump`` and ``nvdisasm`` come inside Triton's wheel.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class MissingToolError(RuntimeError):
    """A compiler or a binary tool is not installed; the message says how to get it."""


class ToolError(RuntimeError):
    """A tool ended with an error, or said something that is not understood."""


def triton_tool(name: str) -> Path:
    """Path of one of the tools inside the installed Triton.

    Args:
        name: ``ptxas`` (up to sm_90a), ``ptxas-blackwell``, ``cuobjdump`` or ``nvdisasm``.

    Raises:
        MissingToolError: no Triton, or one without this tool.
    """
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise MissingToolError(
            f"{name} comes with triton, which is not installed: pip install triton"
        )
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
    if not path.is_file():
        raise MissingToolError(
            f"this triton has no {name} ({path}): install an official wheel, pip install triton"
        )
    return path


def run_tool(name: str, *arguments: str) -> tuple[str, str]:
    """Standard output and standard error of one run.

    Raises:
        MissingToolError, ToolError: with what the tool said.
    """
    command = [str(triton_tool(name)), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        said = (result.stderr + result.stdout).strip()
        raise ToolError(f"{name} ended with {result.returncode}: {said}")
    return result.stdout, result.stderr


def disassemble(cubin: bytes) -> str:
    """What ``nvdisasm -c`` prints for a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return run_tool("nvdisasm", "-c", file.name)[0]


def assemble(ptx: str, arch: str, options: Sequence[str] = ()) -> tuple[bytes, str]:
    """Assembles PTX for one architecture.

    Args:
        ptx: source.
        arch: ``sm_80`` ... as ptxas names it.
        options: more of ptxas's options.

    Returns:
        The cubin, and ptxas's log with ``-v``.
    """
    blackwell = int(re.sub(r"\D", "", arch)) >= 100
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        tool = "ptxas-blackwell" if blackwell else "ptxas"
        files = (f"--gpu-name={arch}", str(source), "-o", str(target))
        log = run_tool(tool, "-v", *options, *files)[1]
        return target.read_bytes(), log


@dataclass(frozen=True)
class Resources:
    """What ptxas says about one kernel.

    Attributes:
        registers: per thread.
        stack_bytes: of local memory per thread: spills, arrays and the frames of calls.
        spill_store_bytes, spill_load_bytes: per thread, each instruction counted once.
        static_shared_bytes: per block.
        warnings: lines with a warning or about lost performance, as printed; where a line does
            not say which kernel it is about, every kernel has it.
    """

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    static_shared_bytes: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class PtxasLog:
    """A log of ``ptxas -v``.

    Attributes:
        kernels: resources by kernel.
        functions: (stack, spill store, spill load) bytes of functions that were not inlined.
    """

    kernels: dict[str, Resources]
    functions: dict[str, tuple[int, int, int]]


_ENTRY = re.compile(r"Compiling entry function '([^']+)' for")
_PROPERTIES = re.compile(r"Function properties for '?([^\s']+)'?")
_FRAME = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s*$"
)
_USED = re.compile(r"Used (\d+) registers")


def read_ptxas_log(text: str) -> PtxasLog:
    """Resources from a log of ``ptxas -v``, of ptxas itself or within NVRTC's.

    Raises:
        ToolError: a kernel without figures, or a line about spills in a form not known.
    """
    frames: dict[str, tuple[int, int, int]] = {}
    used: dict[str, tuple[int, int, int]] = {}
    entries: list[str] = []
    warnings: list[str] = []
    function = ""
    for line in text.replace("\0", "").splitlines():
        if entry := _ENTRY.search(line):
            entries.append(entry[1])
        elif properties := _PROPERTIES.search(line):
            function = properties[1]
        elif frame := _FRAME.search(line):
            frames[function] = (int(frame[1]), int(frame[2]), int(frame[3]))
        elif registers := _USED.search(line):
            shared = re.search(r"(\d+) bytes smem", line)
            stack = re.search(r"(\d+) bytes cumulative stack size", line)
            used[entries[-1]] = (
                int(registers[1]),
                int(shared[1]) if shared else 0,
                int(stack[1]) if stack else 0,
            )
        elif re.match(r"ptxas.*(warning|Performance)", line):
            warnings.append(line.strip())
        elif "spill" in line:
            raise ToolError(f"a line about spills that is not understood: {line.strip()}")
    kernels = {}
    for name in entries:
        if name not in frames or name not in used:
            raise ToolError(f"ptxas printed no figures for {name}:\n{text}")
        frame_bytes, stores, loads = frames[name]
        registers_used, shared_bytes, stack_bytes = used[name]
        mine = [w for w in warnings if not _names_another(w, name, entries)]
        kernels[name] = Resources(
            registers=registers_used,
            stack_bytes=max(frame_bytes, stack_bytes),
            spill_store_bytes=stores,
            spill_load_bytes=loads,
            static_shared_bytes=shared_bytes,
            warnings=tuple(mine),
        )
    others = {name: figures for name, figures in frames.items() if name not in kernels}
    return PtxasLog(kernels, others)


def _names_another(warning: str, name: str, entries: Sequence[str]) -> bool:
    words = re.findall(r"[\w$.]+", warning)
    return name not in words and any(other in words for other in entries)
