"""Fixtures of all tests: backends, cases, the full grid, and a seed."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kimi_ops
from kimi_ops._backends import BACKENDS, GPU_BACKENDS, has_kernel
from kimi_ops._dispatch import get_op
from kimi_ops._target import too_old
from kimi_ops.testing import cases, check
from kimi_ops.testing.isas import cpu_backends, use_own_threads, with_cpu_backend
from kimi_ops.testing.ways import WAYS, Way, ways_of, with_way

# What was left out for size: way, or backend on a device -> number of cases.
_LEFT_OUT = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the full grid, large cases included")
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where the common test body runs; on cuda the kernels of a GPU run on it",
    )
    parser.addoption(
        "--work-limit",
        type=int,
        metavar="N",
        help="leave out the cases of more work than N (see kimi_ops.testing.inputs) everywhere",
    )
    parser.addoption(
        "--own-threads",
        type=int,
        metavar="N",
        help="run the CPU library on N threads of its own, and not on torch's",
    )
    parser.addoption(
        "--backend-module",
        metavar="OP=MODULE",
        action="append",
        default=[],
        help="test another kernel too: a module with unsupported() and launch(), as backend 'mine'",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LEFT_OUT] = Counter()
    check.DEVICE = config.getoption("--device")
    if check.DEVICE == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device here")
    if own_threads := config.getoption("--own-threads"):
        use_own_threads(own_threads)
    for item in config.getoption("--backend-module"):
        op, _, module = item.partition("=")
        kimi_ops.register_backend(op, "mine", importlib.import_module(module))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the argument ``backend`` or ``case`` runs for each of the module's ``OP``.

    On the CPU its library runs with each instruction set, and the backends of a GPU in each way
    that there is without one.
    """
    op = getattr(metafunc.module, "OP", None)
    if "backend" in metafunc.fixturenames:
        on_gpu = metafunc.config.getoption("--device") == "cuda"
        names = ["reference"]
        if on_gpu:
            names += [name for name in GPU_BACKENDS if has_kernel(op, name)]
        else:
            names += cpu_backends(op) + [way.name for way in ways_of(op)]
        names += [name for name in get_op(op).known_backends() if name not in BACKENDS]
        metafunc.parametrize("backend", names, indirect=True)
    if "case" in metafunc.fixturenames:
        full = metafunc.config.getoption("--full")
        metafunc.parametrize("case", cases(op, full=full), ids=str)


@functools.cache
def _way_of(op: str, backend: str) -> Way | None:
    """The way that an op's backend is; None for a backend that runs on the device itself."""
    return next((way for way in ways_of(op) if way.name == backend), None)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked ``full``, and the cases that are too large for a slow way or for
    ``--work-limit``, which it counts for the summary.

    Last, so that what ``-k`` has taken away does not count.
    """
    full, work_limit = config.getoption("--full"), config.getoption("--work-limit")
    work: dict[int, int] = {}
    kept, left_out = [], []
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        name, case = params.get("backend"), params.get("case")
        way = _way_of(item.module.OP, name) if name else None
        if item.get_closest_marker("full") and not full:
            left_out.append(item)
            continue
        if way is not None:
            item.user_properties.append(("way", way.name))
        limits = [way.work_limit] if way is not None and not full else []
        limits += [work_limit] if work_limit is not None else []
        if case is not None and limits:
            if id(case) not in work:
                work[id(case)] = case.work
            if work[id(case)] > min(limits):
                config.stash[_LEFT_OUT][name or "tests without a backend"] += 1
                left_out.append(item)
                continue
        kept.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Under xdist the processes that run tests tell the one that prints what they left out."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(session.config.stash[_LEFT_OUT])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every process collects all tests, so each of them has the whole count."""
    node.config.stash[_LEFT_OUT] = Counter(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """How many tests each way of running without a GPU had, and what was left out for size."""
    left_out = config.stash[_LEFT_OUT]
    ran: dict[str, Counter[str]] = {}
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            way = dict(getattr(report, "user_properties", ())).get("way")
            if way is not None:
                ran.setdefault(way, Counter())[outcome] += 1
    ways = [way.name for way in WAYS]
    names = [name for name in ways if name in ran or left_out[name]]
    if names:
        terminalreporter.section("kernels without a GPU")
    for name in names:
        counts = ", ".join(f"{n} {outcome}" for outcome, n in ran.get(name, Counter()).items())
        note = f"; {left_out[name]} left out for size (--full runs them)" * bool(left_out[name])
        terminalreporter.write_line(f"{name}: {counts or 'none ran'}{note}")
    for name in sorted(set(left_out) - set(ways)):
        terminalreporter.write_line(f"{name}: {left_out[name]} left out by --work-limit")


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of a backend that has a kernel for the module's ``OP``.

    Skips where it cannot run; on a GPU that fails, since there nothing else would run it. Tensors
    that a test makes without naming a device are on ``--device``.
    """
    name: str = request.param
    op = request.module.OP
    way = _way_of(op, name)
    on_cpu = name.startswith("cpu")
    reason = get_op(op).why_not(way.backend if way else "cpu" if on_cpu else name, None)
    if check.DEVICE == "cuda" and name in GPU_BACKENDS:
        reason = reason or too_old(torch.device("cuda"))
    if reason is not None and not (way and way.backend == "cuda"):
        message = f"{op}: backend {name} cannot run here: {reason}"
        if check.DEVICE == "cuda":
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    with (
        with_way(op, way)
        if way
        else with_cpu_backend(op, name)
        if on_cpu
        else contextlib.nullcontext(name) as registered,
        # Not on the CPU, where it would only cost: torch asks such a block at every call.
        torch.device("cuda") if check.DEVICE == "cuda" else contextlib.nullcontext(),
    ):
        if case := getattr(request.node, "callspec", SimpleNamespace(params={})).params.get("case"):
            args = [a.to(check.DEVICE) if torch.is_tensor(a) else a for a in case.args()]
            reason = get_op(op).why_not(registered, args)
            if reason is not None:
                pytest.skip(f"declared by the kernel: {reason}")
        yield registered


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
