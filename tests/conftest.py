"""Fixtures of all tests: backends, cases, the full grid, and a seed."""

from __future__ import annotations

import importlib

import pytest
import torch

import kimi_ops
from kimi_ops._dispatch import BACKENDS, get_op, has_kernel
from kimi_ops.testing import cases


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the full grid, large cases included")
    parser.addoption(
        "--backend-module",
        metavar="OP=MODULE",
        action="append",
        default=[],
        help="test another kernel too: a module with unsupported() and launch(), as backend 'mine'",
    )


def pytest_configure(config: pytest.Config) -> None:
    for item in config.getoption("--backend-module"):
        op, _, module = item.partition("=")
        kimi_ops.register_backend(op, "mine", importlib.import_module(module))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the argument ``backend`` or ``case`` runs for each of the module's ``OP``."""
    op = getattr(metafunc.module, "OP", None)
    if "backend" in metafunc.fixturenames:
        names = [name for name in BACKENDS if has_kernel(op, name)]
        names += [name for name in get_op(op).known_backends() if name not in BACKENDS]
        metafunc.parametrize("backend", names, indirect=True)
    if "case" in metafunc.fixturenames:
        full = metafunc.config.getoption("--full")
        metafunc.parametrize("case", cases(op, full=full), ids=str)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """Name of a backend that has a kernel for the module's ``OP``; skips where it cannot run."""
    name: str = request.param
    reason = get_op(request.module.OP).why_not(name, None)
    if reason is not None:
        pytest.skip(f"{request.module.OP}: backend {name} cannot run here: {reason}")
    return name


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
