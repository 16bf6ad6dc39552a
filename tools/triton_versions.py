"""Compiles one case of every Triton kernel with several versions of Triton.

    python tools/triton_versions.py [--versions 3.4.0 3.9.0] [--op rms_norm] [--tests]

Each version gets a throwaway environment in ``build/triton-versions``: its own Triton over the
packages of the Python that runs this. What was found stays there as JSON, one file for a version
and an op, and replaces what ``docs/triton-versions.md`` says of them; the rest of the page stays.
An op is compiled in a process of its own, so that a compiler that crashes costs one op. About ten
minutes a version on one core; ``--tests`` also prints how the interpreter's own tests and those of
a few ops end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "triton-versions"
PAGE = ROOT / "docs" / "triton-versions.md"
VERSIONS = ("3.4.0", "3.6.0", "3.7.1", "3.8.0", "3.9.0")
ARCHES = ("sm_80", "sm_90a", "sm_100a", "sm_120", "gfx942")
OP_TIMEOUT_SECONDS = 3600
TESTS = {
    "the interpreter's own": ["tests/test_triton_interpreter.py"],
    "three ops, interpreted": [
        "tests/test_rms_norm.py",
        "tests/test_moe_select.py",
        "tests/test_merge_attention.py",
        "-k",
        "interpreted",
    ],
}

KERNELS, WRONG = "## Kernels\n", "## What is wrong\n"  # headings of the page
NOT_USED, NOT_COMPILED = "not used", "not compiled"  # cells

Row = dict[str, Any]
Found = dict[str, dict[str, list[Row]]]  # by version and op


def environment(version: str) -> Path:
    """The Python of an environment with this Triton over the packages that are here."""
    folder = FOLDER / f"venv-{version}"
    python = folder / "bin" / "python"
    own = Path(folder, "lib", f"python3.{sys.version_info.minor}", "site-packages")
    if not (own / "triton").is_dir():
        make = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
        subprocess.run(make, check=True)
        subprocess.run([*pip, "--no-deps", f"triton=={version}"], check=True)
    packages = sysconfig.get_path("purelib")
    # Behind its own packages; and addsitedir because this package may be installed editable.
    (own / "packages.pth").write_text(f"import site; site.addsitedir({packages!r})\n")
    ask = [str(python), "-c", "import triton; print(triton.__version__)"]
    found = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    if found != version:
        raise RuntimeError(f"{folder} has Triton {found}, not {version}: remove it")
    return python


def compile_op(op: str) -> list[Row]:
    """The first case of each of an op's kernels, for each architecture, with the Triton here."""
    from kimi_ops.testing.static import compile_case
    from kimi_ops.testing.static.cases import StaticCase, triton_cases_of
    from kimi_ops.testing.static.page import problems
    from kimi_ops.testing.static.triton_kernel import TritonCompileError

    cases = [case for case in triton_cases_of(op) if isinstance(case, StaticCase)]
    rows = []
    for arch in ARCHES:
        mine = [case for case in cases if arch in case.arches]
        for case in {id(case.kernel): case for case in reversed(mine)}.values():
            row: Row = {"kernel": case.kernel.__name__, "case": case.name, "arch": arch}
            try:
                row["wrong"] = problems(compile_case(case, arch))
            except TritonCompileError as error:
                causes: list[BaseException] = [error]
                while causes[-1].__cause__ is not None:
                    causes.append(causes[-1].__cause__)
                row["wrong"] = [str(causes[-1]).strip().splitlines()[-1]]
            rows.append(row)
    return rows


def result_file(version: str, name: str) -> Path:
    return FOLDER / "results" / version / f"{name}.json"


def compile_with(version: str, python: Path, op: str) -> None:
    """Compiles an op in a process of its own and keeps what it found."""
    command = [str(python), __file__, "--worker", op]
    done = subprocess.run(command, capture_output=True, text=True, timeout=OP_TIMEOUT_SECONDS)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        rows = [{"kernel": op, "case": "", "arch": arch, "wrong": [last]} for arch in ARCHES]
    else:
        rows = json.loads(done.stdout)
    path = result_file(version, op)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1))
    wrong = sum(bool(row["wrong"]) for row in rows)
    print(f"{version} {op}: {len(rows)} compiled, {wrong} of them with something wrong", flush=True)


def run_tests(version: str, python: Path) -> None:
    """Runs the tests of `TESTS` with this Triton and prints pytest's last lines."""
    for name, arguments in TESTS.items():
        command = [str(python), "-m", "pytest", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        said = done.stdout.strip().splitlines()[-1].strip("= ").partition(" in ")[0]
        print(f"{version} {name}: {said}", flush=True)


def _cell(rows: list[Row]) -> str:
    if not rows:
        return NOT_USED
    wrong: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: ARCHES.index(row["arch"])):
        for words in row["wrong"]:
            # The gates' own words are short; anything else is what a compiler said.
            kind = words if words in ("spills", "shared memory") else "refused"
            wrong.setdefault(kind, []).append(row["arch"])
    return "; ".join(f"{kind}: {', '.join(arches)}" for kind, arches in wrong.items()) or "yes"


def _remarks(version: str, op: str, rows: list[Row]) -> list[str]:
    """What is wrong, said once for all architectures that say it."""
    said: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for wrong in row["wrong"]:
            where = said.setdefault((row["kernel"], wrong), [])
            where.append(f"{row['arch']} ({row['case']})")
    start = _start(version, op)
    return [
        f"{start}, `{kernel}`, {', '.join(at)}: {wrong}" for (kernel, wrong), at in said.items()
    ]


def _start(version: str, op: str) -> str:
    return f"- {version}, `{op}`"


def _table(lines: list[str]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of a table in Markdown."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line]
    return (rows[0], rows[2:]) if rows else ([], [])


def updated(page: str, found: Found, ops: Sequence[str]) -> str:
    """The page with what was found now in place of what it said of the same versions and ops.

    Args:
        page: its text; what is before the first table's heading stays.
        found: results by version and op.
        ops: all of them, in order.
    """
    prose, _, tables = page.partition(KERNELS)
    table, _, remarks = tables.partition(WRONG)
    head, rows = _table(table.splitlines())
    before = {(row[0], row[1]): dict(zip(head[2:], row[2:], strict=True)) for row in rows}
    versions = [v for v in VERSIONS if v in head[2:] or v in found]
    lines = [f"| op | kernel | {' | '.join(versions)} |", "|---" * (len(versions) + 2) + "|"]
    said = []
    for op in ops:
        now = {v: found[v][op] for v in versions if op in found.get(v, {})}
        kernels = [kernel.strip("`") for name, kernel in before if name == f"`{op}`"]
        kernels += [row["kernel"] for some in now.values() for row in some]
        compiled = {
            version
            for (name, _), cells in before.items()
            for version, cell in cells.items()
            if name == f"`{op}`" and cell != NOT_COMPILED
        }
        for kernel in dict.fromkeys(kernels):
            old = before.get((f"`{op}`", f"`{kernel}`"), dict.fromkeys(compiled, NOT_USED))
            cells = [
                _cell([row for row in now[v] if row["kernel"] == kernel])
                if v in now
                else old.get(v, NOT_COMPILED)
                for v in versions
            ]
            if set(cells) - {NOT_USED, NOT_COMPILED}:
                lines.append(f"| `{op}` | `{kernel}` | {' | '.join(cells)} |")
        for v in versions:
            kept = [r for r in remarks.splitlines() if r.startswith(_start(v, op) + ",")]
            said += _remarks(v, op, now[v]) if v in now else kept
    return "\n".join(
        [prose + KERNELS.rstrip(), *lines, "", WRONG.strip(), *(said or ["Nothing."]), ""]
    )


def write_page() -> None:
    """Brings what follows the first table's heading in the page up to date."""
    from kimi_ops._dispatch import op_names

    found: Found = {}
    for version in VERSIONS:
        for path in sorted(result_file(version, "").parent.glob("*.json")):
            if path.stem in op_names():
                found.setdefault(version, {})[path.stem] = json.loads(path.read_text())
    PAGE.write_text(updated(PAGE.read_text(), found, op_names()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--versions", nargs="+", default=VERSIONS, help="of Triton (all)")
    parser.add_argument("--op", nargs="*", help="names of ops (all); none: nothing is compiled")
    parser.add_argument("--tests", action="store_true", help="run some tests with each version too")
    parser.add_argument("--worker", metavar="OP", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(compile_op(args.worker)))
        return
    from kimi_ops._backends import has_kernel
    from kimi_ops._dispatch import op_names

    ops = op_names() if args.op is None else args.op
    for version in args.versions:
        python = environment(version)
        for op in ops:
            if has_kernel(op, "triton"):
                compile_with(version, python, op)
        if args.tests:
            run_tests(version, python)
    write_page()


if __name__ == "__main__":
    main()
