"""`kimi-ops compile`: the static report of every kernel of every op."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from kimi_ops._dispatch import op_names
from kimi_ops.testing.devices import ARCHES, device
from kimi_ops.testing.static.cases import compile_case, static_cases_of
from kimi_ops.testing.static.cuda_source import CudaCompileError
from kimi_ops.testing.static.page import made_with, problems, section, updated
from kimi_ops.testing.static.report import KernelReport
from kimi_ops.testing.static.toolchain import MissingToolError, ToolError
from kimi_ops.testing.static.triton_kernel import TritonCompileError, triton_module

_COMPILE_ERRORS = (MissingToolError, CudaCompileError, TritonCompileError)


def _write_page(path: Path, rows: Sequence[tuple[str, KernelReport]], versions: str) -> None:
    """Replaces the sections of the ops that were compiled, or writes a new page."""
    text = path.read_text() if path.exists() else "# Compiled kernels\n"
    ops = dict.fromkeys(op for op, _ in rows)
    fresh = {op: section(op, [r for o, r in rows if o == op], versions) for op in ops}
    path.write_text(updated(text, fresh))


def run(
    archs: Sequence[str], ops: Sequence[str], as_json: bool, markdown: str | None = None
) -> int:
    """Compiles and prints; 0 if all kernels compile and pass the gates that hold for all.

    Args:
        archs: names as `kimi_ops.testing.devices.device` takes them; all of them if empty.
        ops: names of ops; all of them if empty.
        as_json: print JSON instead of a table.
        markdown: write the page of `kimi_ops.testing.static.page` into this file instead; where it
            exists, only the sections of these ops change.

    Returns:
        0 done, 1 a kernel spills, does not fit or cannot be launched, 2 the request could not be
        carried out: an unknown name, a missing compiler, a source that does not compile, or a file
        that cannot be written.
    """
    rows: list[tuple[str, KernelReport]] = []
    try:
        triton_module()
        versions = made_with() if markdown else ""
        wanted = [device(arch).arch for arch in archs] or list(ARCHES)
        for op in ops or op_names():
            for case in static_cases_of(op):
                rows += [(op, compile_case(case, a)) for a in wanted if a in case.arches]
        if markdown:
            _write_page(Path(markdown), rows, versions)
    except (ValueError, OSError, ToolError, *_COMPILE_ERRORS) as error:
        print(f"kimi-ops compile: {error}", file=sys.stderr)
        return 2
    if markdown:
        print(f"{len(rows)} reports written to {markdown}")
    elif as_json:
        plain = [
            {"op": op, **report.to_json(), "problems": problems(report)} for op, report in rows
        ]
        print(json.dumps(plain, indent=2))
    else:
        _print(rows)
    return 1 if any(problems(report) for _, report in rows) else 0


def _print(rows: Sequence[tuple[str, KernelReport]]) -> None:
    from rich.console import Console
    from rich.table import Table

    # Into a file or a pipe the table keeps its lines whole.
    console = Console(width=None if sys.stdout.isatty() else 200)
    if not rows:
        console.print("no kernels: neither kernels/ nor csrc/cuda/ has one", highlight=False)
        return
    left = ("op", "case", "arch", "regs", "spills B", "local B", "shared B", "blocks/SM")
    right = ("warps/SM", "limited by", "code B", "instr", "tensor", "hottest loop", "problems")
    table = Table(*left, *right, title="Static report", title_justify="left")
    for op, report in rows:
        o, hot = report.occupancy, report.hottest_loop
        table.add_row(
            op,
            report.case,
            report.arch,
            str(report.registers),
            f"{report.spill_store_bytes}+{report.spill_load_bytes}",
            str(report.stack_bytes),
            f"{report.shared_bytes}/{report.shared_limit_bytes}",
            str(o.blocks) if o else "?",
            f"{o.warps}/{o.warps_limit}" if o else "?",
            o.limited_by if o else "threads per block not known",
            str(report.code_bytes),
            str(report.mix.instructions),
            str(report.mix.classes.get("tensor", 0)),
            f"{hot.mix.instructions}, {hot.mix.classes.get('tensor', 0)} tensor" if hot else "none",
            ", ".join(problems(report)),
        )
    console.print(table)
    for _, report in rows:
        unknown = [f"unknown instructions: {', '.join(report.mix.other)}"] * bool(report.mix.other)
        for note in (*report.notes, *unknown):
            console.print(f"{report.case} for {report.arch}: {note}", highlight=False, markup=False)
