"""Compiles one case of every Triton kernel with several versions of Triton.

    python tools/triton_versions.py [--versions 3.4.0 3.9.0] [--op rms_norm] [--tests]

Each version gets a throwaway environment in ``build/triton-versions``: its own Triton over the
packages of the Python that runs this. What was found stays there as JSON, one file for a version
and an op, and ``docs/triton-versions.md`` is written from all such files. An op is compiled in a
process of its own, so that a compiler that crashes costs one op. About ten minutes a
version on one core; ``--tests`` adds the interpreter's own tests and those of a few ops.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
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

Row = dict[str, Any]


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
    """Runs the tests of `TESTS` with this Triton and keeps pytest's last lines."""
    said = {}
    for name, arguments in TESTS.items():
        command = [str(python), "-m", "pytest", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        said[name] = done.stdout.strip().splitlines()[-1].strip("= ").partition(" in ")[0]
        print(f"{version} {name}: {said[name]}", flush=True)
    path = result_file(version, "tests")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(said, indent=1))


def _cell(rows: list[Row]) -> str:
    if not rows:
        return "not used"
    wrong: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: ARCHES.index(row["arch"])):
        for words in row["wrong"]:
            # The gates' own words are short; anything else is what a compiler said.
            kind = words if words in ("spills", "shared memory") else "refused"
            wrong.setdefault(kind, []).append(row["arch"])
    return "; ".join(f"{kind}: {', '.join(arches)}" for kind, arches in wrong.items()) or "yes"


def _remarks(found: dict[str, dict[str, list[Row]]]) -> list[str]:
    """What is wrong, said once for all architectures that say it."""
    said: dict[tuple[str, str, str], list[str]] = {}
    for version, ops in found.items():
        for rows in ops.values():
            for row in rows:
                for wrong in row["wrong"]:
                    where = said.setdefault((version, row["kernel"], wrong), [])
                    where.append(f"{row['arch']} ({row['case']})")
    return [f"- {v}, `{k}`, {', '.join(where)}: {wrong}" for (v, k, wrong), where in said.items()]


def write_page() -> None:
    """Replaces what follows the first table's heading in the page."""
    from kimi_ops._dispatch import op_names

    versions = [v for v in VERSIONS if result_file(v, "").parent.is_dir()]
    found: dict[str, dict[str, list[Row]]] = {v: {} for v in versions}
    for version in versions:
        for op in op_names():
            path = result_file(version, op)
            if path.is_file():
                found[version][op] = json.loads(path.read_text())
    lines = ["## Kernels", f"| op | kernel | {' | '.join(versions)} |"]
    lines.append("|---" * (len(versions) + 2) + "|")
    for op in op_names():
        rows = {v: found[v].get(op) for v in versions}
        kernels = dict.fromkeys(row["kernel"] for some in rows.values() for row in some or ())
        for kernel in kernels:
            cells = [
                "not compiled"
                if (mine := rows[v]) is None
                else _cell([row for row in mine if row["kernel"] == kernel])
                for v in versions
            ]
            lines.append(f"| `{op}` | `{kernel}` | {' | '.join(cells)} |")
    remarks = _remarks(found)
    lines += ["", "## What is wrong", *(remarks or ["Nothing."])]
    tested = {v: result_file(v, "tests") for v in versions if result_file(v, "tests").is_file()}
    if tested:
        lines += ["", "## Tests", f"| tests | {' | '.join(tested)} |"]
        lines.append("|---" * (len(tested) + 1) + "|")
        said = {v: json.loads(path.read_text()) for v, path in tested.items()}
        for name in TESTS:
            lines.append(f"| {name} | {' | '.join(said[v].get(name, '') for v in tested)} |")
    prose = PAGE.read_text().partition("## Kernels\n")[0] if PAGE.exists() else ""
    PAGE.write_text(prose + "\n".join(lines) + "\n")


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
