"""The static report as a page of Markdown: per op a table of its kernels and architectures.

`kimi-ops compile --markdown FILE` writes it. What stands in the file before the first section of an
op is prose by hand and stays; so do the sections of ops that were not compiled this time, each of
which says what it was made with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from kimi_ops._dispatch import op_names
from kimi_ops._version import __version__
from kimi_ops.testing.checkout import commit_of
from kimi_ops.testing.devices import ARCHES
from kimi_ops.testing.static.gates import assert_no_spills, assert_shared_memory_fits
from kimi_ops.testing.static.report import KernelReport
from kimi_ops.testing.static.toolchain import run_tool
from kimi_ops.testing.static.triton_kernel import triton_module

_COLUMNS = (
    "kernel",
    "arch",
    "cases",
    "registers",
    "spills B",
    "shared B (limit)",
    "warps/SM",
    "tensor",
    "widest loads",
    "gates",
)
# A report in which nothing is wrong says so in this word.
_PASS = "pass"


def problems(report: KernelReport) -> list[str]:
    """The gates that hold for every kernel and that this one does not pass, in a few words each."""
    found = []
    for gate, words in ((assert_no_spills, "spills"), (assert_shared_memory_fits, "shared memory")):
        try:
            gate(report)
        except AssertionError:
            found.append(words)
    if report.occupancy is not None and report.occupancy.blocks == 0 and not found:
        found.append(f"cannot be launched: {report.occupancy.limited_by}")
    return found


def widest_load_bits(report: KernelReport) -> int:
    """Bits per thread of the widest load from global memory, 0 without any.

    A bulk copy, whose size is no part of the instruction, counts as 128: its pieces are no smaller.
    """
    widths = [0]
    for what in report.mix.memory:
        if found := re.fullmatch(r"(?:global|generic) (?:load|async load|bulk load) ?(\d*)", what):
            widths.append(int(found[1] or 128))
    return max(widths)


def tensor_instructions(report: KernelReport) -> list[str]:
    """Names of the instructions that multiply matrices, without modifiers: HGMMA, HMMA, v_mfma."""
    names = set()
    for opcode in report.mix.opcodes:
        if found := re.match(r"(U?[A-Z]*MMA|UTC[A-Z]*MMA|v_s?mfmac?)(?=[._]|$)", opcode):
            # HFMA2.MMA and the like end in a modifier of that name and are none.
            names.add(found[1])
    return sorted(names)


def _between(numbers: Iterable[int]) -> str:
    known = sorted(numbers)
    return str(known[0]) if known[0] == known[-1] else f"{known[0]} to {known[-1]}"


def _in_cases(names: Sequence[str], total: int) -> str:
    """``a; b in 2 of 3``: each word once, and in how many of the cases where not in all."""
    counts = {name: names.count(name) for name in sorted(set(names))}
    return "; ".join(
        name if number == total else f"{name} in {number} of {total}"
        for name, number in counts.items()
    )


def _row(kernel: str, arch: str, reports: Sequence[KernelReport]) -> str:
    total = len(reports)
    spilled = max(r.spill_store_bytes + r.spill_load_bytes for r in reports)
    warps = [r.occupancy.warps for r in reports if r.occupancy is not None]
    limits = {r.occupancy.warps_limit for r in reports if r.occupancy is not None}
    tensor = [" + ".join(tensor_instructions(r)) or "none" for r in reports]
    failed = [word for r in reports for word in problems(r)]
    cells = (
        f"`{kernel}`",
        arch,
        str(total),
        str(max(r.registers for r in reports)),
        str(spilled),
        f"{max(r.shared_bytes for r in reports):,} ({reports[0].shared_limit_bytes:,})",
        f"{min(warps)} of {max(limits)}" if warps else "?",
        _in_cases(tensor, total),
        _between(widest_load_bits(r) for r in reports),
        _in_cases(failed, total) or _PASS,
    )
    return f"| {' | '.join(cells)} |"


def section(op: str, reports: Sequence[KernelReport], made_with: str) -> str:
    """The section of one op: heading, what it was made with, table.

    Args:
        op: name.
        reports: of its kernels; kernels stay in their order, cases of one come together.
        made_with: versions, in a line.
    """
    rows: dict[tuple[str, str], list[KernelReport]] = {}
    for report in reports:
        rows.setdefault((report.kernel, report.arch), []).append(report)
    kernels = list(dict.fromkeys(kernel for kernel, _ in rows))
    ordered = sorted(rows, key=lambda key: (kernels.index(key[0]), ARCHES.index(key[1])))
    lines = [f"## {op}", made_with, "", f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    lines += [_row(kernel, arch, rows[kernel, arch]) for kernel, arch in ordered]
    return "\n".join(lines) + "\n"


def _sections(text: str) -> tuple[str, dict[str, str]]:
    """The prose of a page, and its sections by op."""
    head = re.compile(rf"^## (?:{'|'.join(map(re.escape, op_names()))})$", re.M)
    starts = [found.start() for found in head.finditer(text)]
    ends = [*starts, len(text)][1:]
    pieces = [text[a:b].strip() + "\n" for a, b in zip(starts, ends, strict=True)]
    prose = text[: starts[0]] if starts else text
    return prose.strip(), {piece.partition("\n")[0][3:]: piece for piece in pieces}


def updated(text: str, fresh: Mapping[str, str]) -> str:
    """A page with some sections replaced or added, in the order of the ops."""
    prose, found = _sections(text)
    found |= fresh
    return "\n".join([prose + "\n", *(found[op] for op in op_names() if op in found)])


def made_with() -> str:
    """Versions of everything that has a say in a binary, and the commit of the sources."""
    triton = triton_module().__version__
    tools = {}
    for tool in ("ptxas", "ptxas-blackwell"):
        found = re.search(r"V([\d.]+)", run_tool(tool, "--version")[0])
        tools[tool] = found[1] if found else "of unknown version"
    sources = commit_of("kernels", "csrc/cuda", "kimi_ops/cuda")
    assemblers = f"ptxas {tools['ptxas']} (sm_100a and sm_120: {tools['ptxas-blackwell']})"
    return f"kimi-ops {__version__}, {sources}; Triton {triton}, {assemblers}."
