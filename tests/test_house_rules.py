"""Rules of the house that can be tests are tests."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
from pathlib import Path

import pytest

import kimi_ops
from kimi_ops._dispatch import get_op
from kimi_ops.testing import cases

ROOT = Path(__file__).parents[1]
OPS = kimi_ops.op_names()
# Layers that have a file for every op, and layers that may have one.
COMPLETE = {"kimi_ops/ops": ".py", "kimi_ops/reference": ".py", "tests": ".py", "bench": ".py"}
PREFIX = {"tests": "test_", "bench": "bench_"}
PARTIAL = {
    "kernels": ".py",
    "kimi_ops/cpu": ".py",
    "kimi_ops/cuda": ".py",
    "kimi_ops/autograd": ".py",
}
LAUNCHERS = {"csrc/cpu": (".cpp", "kimi_ops/cpu"), "csrc/cuda": (".cu", "kimi_ops/cuda")}


def _files(*patterns: str) -> list[Path]:
    """Files of the project: those git tracks or would track, or all of an unpacked sdist."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode == 0:
        return [ROOT / name for name in result.stdout.splitlines() if (ROOT / name).is_file()]
    return [path for pattern in patterns for path in ROOT.rglob(pattern)]


def _stems(folder: str, suffix: str, prefix: str = "") -> set[str]:
    names = {p.stem for p in (ROOT / folder).glob(f"{prefix}*{suffix}")}
    return {n.removeprefix(prefix) for n in names if not n.startswith("_")}


@pytest.mark.parametrize("folder", COMPLETE)
def test_every_op_is_in_every_complete_layer(folder):
    prefix = PREFIX.get(folder, "")
    stems = _stems(folder, COMPLETE[folder], prefix)
    assert stems >= set(OPS)
    if not prefix:
        assert stems == set(OPS)


@pytest.mark.parametrize("folder", PARTIAL)
def test_no_file_of_a_backend_or_gradient_is_without_an_op(folder):
    assert _stems(folder, PARTIAL[folder]) <= set(OPS)


@pytest.mark.parametrize("folder", LAUNCHERS)
def test_every_native_source_has_its_launcher(folder):
    """And a launcher without a source launches those of other ops."""
    suffix, launchers = LAUNCHERS[folder]
    sources, found = _stems(folder, suffix), _stems(launchers, ".py")
    assert sources <= found
    for op in found - sources:
        text = (ROOT / launchers / f"{op}.py").read_text()
        assert f"\nfrom {launchers.replace('/', '.')} import " in text, op


@pytest.mark.parametrize("op", OPS)
def test_test_file_runs_the_common_body_on_hostile_cases(op):
    text = (ROOT / f"tests/test_{op}.py").read_text()
    assert f'OP = "{op}"' in text
    assert "def test_matches_oracle(backend, case):\n    check_op(OP, case.args(), backend)" in text
    assert len(cases(op)) >= 5


@pytest.mark.parametrize("op", OPS)
def test_reference_is_short_and_imports_torch_alone(op):
    path = ROOT / f"kimi_ops/reference/{op}.py"
    text = path.read_text()
    assert len(text.splitlines()) <= 90
    for module in _imports(path):
        assert module.split(".")[0] in (
            "__future__",
            "collections",
            "itertools",
            "typing",
            "torch",
        ) or (module.startswith("kimi_ops.reference")), module


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


LAYERS = ("reference", "cpu", "kernels", "cuda")


def test_imports_point_one_way():
    """model -> ops -> backends; backends never import each other, nor the ops or the model."""
    for path in _files("*.py"):
        relative = path.relative_to(ROOT)
        top = relative.parts[1] if relative.parts[0] == "kimi_ops" else relative.parts[0]
        foreign = {m for m in _imports(path) if m.startswith("kimi_ops.")}
        if top in LAYERS:
            forbidden = {"model", "ops", *LAYERS} - {top}
        elif top == "ops":
            forbidden = {"model", "autograd", *LAYERS}
        elif top == "autograd":  # plain torch, on the helpers of the reference
            forbidden = {"model", "ops", *LAYERS} - {"reference"}
        elif top == "quant":
            forbidden = {"model", "ops"}
        else:
            continue
        for module in foreign:
            assert module.split(".")[1] not in forbidden, f"{relative} imports {module}"


def test_nothing_imports_the_bare_kernels_package():
    for path in _files("*.py"):
        for module in _imports(path):
            assert module.split(".")[0] != "kernels", path


def test_bare_kernels_package_is_an_empty_shell():
    import importlib.util

    spec = importlib.util.spec_from_file_location("kernels", ROOT / "kernels/__init__.py")
    shell = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shell)
    assert shell.__path__ == []
    assert not hasattr(shell, "__version__")
    with pytest.raises(AttributeError, match=r"kimi_ops\.kernels"):
        shell.mla_decode  # noqa: B018


def test_native_code_knows_no_torch():
    for path in _files("csrc/*"):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            text = path.read_text()
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10|pybind11|Python)", text), path
            if path.is_relative_to(ROOT / "csrc/cuda"):
                wraps = path.name in ("ptx.cuh", "ptx_sm90.cuh")
                assert wraps or "asm" not in text, f"inline assembly in {path}"


# CMake's, which no process reads from its environment.
CMAKE_VARIABLES = {
    "KIMI_ARCHITECTURES",
    "KIMI_CPU_OPTIONS",
    "KIMI_CUDA_OPTIONS",
    "KIMI_FATBINS",
    "KIMI_ISA",
    "KIMI_ISAS",
    "KIMI_KNOWS_AMX",
    "KIMI_SANITIZE",
}


def test_every_environment_variable_is_documented():
    documented = set(re.findall(r"`(KIMI_[A-Z_]+)`", (ROOT / "ENVIRONMENT.md").read_text()))
    used = set()
    for path in _files("*.py", "Makefile", ".ci/*", "CMakeLists.txt"):
        if "tests" not in path.relative_to(ROOT).parts:
            used |= set(re.findall(r"[\"'$({](KIMI_[A-Z_]*[A-Z])[\"')}]", path.read_text()))
    assert used - CMAKE_VARIABLES == documented


@pytest.mark.parametrize("op", OPS)
def test_docstring_is_a_contract(op):
    """Shapes and dtypes of every tensor, every argument, what is returned, errors, source."""
    doc = inspect.getdoc(getattr(kimi_ops, op))
    contract = get_op(op)
    assert "Source: " in doc
    assert "Raises:" in doc
    returns = contract.overload._schema.returns
    assert ("Returns:" in doc) == bool(returns)
    for name in contract.params:
        assert re.search(rf"^    (\w+, )*{name}(, \w+)*: ", doc, re.M), (
            f"{op}: {name} not documented"
        )
    for name, spec in contract.checks.tensors.items():
        line = doc[doc.index(f"{name}: ") :].splitlines()[0]
        assert "``[" in line, f"{op}: {name} has no shape: {line}"
        shape = re.search(r"``\[(.*?)\]", line)[1]
        stated = len([d for d in shape.split(",") if d.strip()])
        assert stated == len(spec.dims) + spec.prefix, f"{op}: {name} documented as [{shape}]"
    for name in contract.mutates:
        entry = re.split(r"\n    (?=\w+: )|\n\n", doc[doc.index(f"{name}: ") :])[0]
        assert "**written**" in entry, f"{op}: {name} is not said to be written"


def _public_functions():
    for path in _files("kimi_ops/*.py"):
        relative = path.relative_to(ROOT).as_posix()
        if "/reference/" in relative or "/ops/" in relative:
            continue  # the contract documents these
        for node in ast.walk(ast.parse(path.read_text())):
            for item in (
                getattr(node, "body", []) if isinstance(node, ast.Module | ast.ClassDef) else []
            ):
                if isinstance(item, ast.FunctionDef | ast.ClassDef) and not item.name.startswith(
                    "_"
                ):
                    if isinstance(node, ast.ClassDef) and (
                        node.name.startswith("_") or node.name == "Backend"
                    ):
                        continue
                    if item.name in ("unsupported", "launch") and relative.split("/")[1] in LAYERS:
                        continue  # of every backend; `kimi_ops/_backends.py` documents them
                    if item.name in ("save", "backward") and "/autograd/" in relative:
                        continue  # of every gradient; `kimi_ops/_autograd.py` documents them
                    yield relative, item


def test_every_public_name_has_a_docstring():
    missing = [
        f"{path}: {item.name}" for path, item in _public_functions() if not ast.get_docstring(item)
    ]
    assert not missing


def test_no_catch_all():
    for path in _files("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"bare except in {path}:{node.lineno}"
                names = ast.unparse(node.type)
                assert not re.search(r"\b(Base)?Exception\b", names), f"{path}:{node.lineno}"


def test_files_can_be_finished_in_one_reading():
    for path in _files("kimi_ops/*.py", "kernels/*.py", "csrc/*", "bench/*.py"):
        if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h"):
            assert len(path.read_text().splitlines()) <= 400, path
