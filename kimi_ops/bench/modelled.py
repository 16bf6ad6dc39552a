"""Modelled times of every kernel at Kimi K2.5's sizes: for machines without a GPU; no measurement.

A sample of each launch is executed as PTX (`kimi_ops.bench.sampled`), the kernel is compiled for
the GPU's architecture, and `kimi_ops.testing.cost` turns counters and the compilers' report into
two figures: low, as if everything overlapped, and up, as if nothing of the two largest parts did
(docs/evidence.md says how to read them and how far off they may be). GPUs of one architecture with
as many SMs share an execution. What cannot be executed or modelled is a row that says why.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kimi_ops._backends import GPU_BACKENDS, has_kernel
from kimi_ops._dispatch import get_op, op_names
from kimi_ops.bench.sampled import Case, Launched, arguments_of, cases_of, executed
from kimi_ops.bench.step_calls import floor_notes, floor_us, work_of
from kimi_ops.testing.cost import RATES, CostError, Rates, cost, rates_of
from kimi_ops.testing.cost.report import LABEL
from kimi_ops.testing.ptx import PtxError
from kimi_ops.testing.static.cuda_source import CudaCompileError
from kimi_ops.testing.static.toolchain import MissingToolError, ToolError
from kimi_ops.testing.static.triton_kernel import TritonCompileError, triton_module

# Whose architectures an ordinary run executes; the others are left to a full one.
ORDINARY = ("A100", "H100", "H200")
_LEFT_OUT = "left to a full run (--full)"
_FAILURES = (PtxError, CostError, CudaCompileError, MissingToolError, ToolError, TritonCompileError)
_UNITS = {"sms": "", "clock": "Hz", "dram": "B/s", "l2": "B/s", "l2_port": "B/clock and SM",
          "shared": "wavefronts/clock and SM", "l1_tags": "lines/clock and SM",
          "issue": "warp instructions/clock and SM"}  # fmt: skip


def modelled_rows(
    ops: Sequence[str] | None = None,
    devices: Sequence[str] | None = None,
    *,
    full: bool = False,
    backends: Sequence[str] = GPU_BACKENDS,
) -> Iterator[dict[str, Any]]:
    """A row for each op, case, backend that has a kernel, and GPU.

    A row's ``low_us`` and ``up_us`` are sums over its kernels, without launches, which add about a
    microsecond each; ``floor_us`` is of the call, whoever computes it. With a ``reason`` there are
    no kernels, and both sums are None.

    Args:
        ops: names; all by default.
        devices: names of `RATES`; all by default.
        full: all cases and the architectures of all GPUs; otherwise one case of each op, and rows
            of GPUs beyond `ORDINARY` say that they are left out.
        backends: of "triton" and "cuda".

    Raises:
        ValueError: an unknown op, GPU or backend; at once, and lists those that there are.
        MissingToolError: Triton is not installed.
    """
    triton_module()
    chosen = [rates_of(name) for name in (RATES if devices is None else devices)]
    names = op_names() if ops is None else [get_op(op).name for op in ops]
    if unknown := [name for name in backends if name not in GPU_BACKENDS]:
        raise ValueError(f"no GPU backend {unknown[0]!r}; there are {', '.join(GPU_BACKENDS)}")
    rows_of = partial(_rows, devices=chosen, full=full, backends=tuple(backends))
    if len(names) == 1:
        return iter(rows_of(names[0]))
    return _in_processes(rows_of, names)


def _in_processes(
    rows_of: Callable[[str], list[dict[str, Any]]], ops: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The rows of each op in its turn. An execution has no use for a second core, so each core has
    a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(ops)), context) as pool:
        for rows in pool.map(rows_of, ops):
            yield from rows


def _rows(
    op: str, devices: Sequence[Rates], full: bool, backends: Sequence[str]
) -> list[dict[str, Any]]:
    here = [rates for rates in devices if full or rates.name in ORDINARY]
    rows = []
    for case in cases_of(op, full=full):
        args = arguments_of(case) if here else ()
        for backend in (name for name in backends if has_kernel(op, name)):
            done: dict[tuple[str, int], list[Launched] | str] = {}
            for rates in devices:
                key = rates.arch, int(rates.sms.value)
                if rates not in here:
                    done[key] = _LEFT_OUT
                elif key not in done:
                    try:
                        done[key] = executed(case, args, backend, rates)
                    except (*_FAILURES, _triton_error()) as error:
                        done[key] = _said(error)
                rows.append(_row(case, backend, rates, done[key]))
    return rows


def _triton_error() -> type[Exception]:
    found: type[Exception] = importlib.import_module("triton.errors").TritonError
    return found


def _said(error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text.partition("; give ")[0]  # what a caller of `cost` could do


def _row(
    case: Case, backend: str, rates: Rates, launched: Sequence[Launched] | str
) -> dict[str, Any]:
    kernels: list[dict[str, Any]] = []
    reason = launched if isinstance(launched, str) else ""
    if not isinstance(launched, str):
        try:
            kernels = [_kernel(one, rates) for one in launched]
        except _FAILURES as error:
            reason = _said(error)
    work = work_of(case.op, case.args)
    return {
        "op": case.op,
        "case": case.name,
        "backend": backend,
        "device": rates.name,
        "shapes": case.shapes,
        "bytes": work.bytes,
        "flops": work.flops,
        "floor_us": floor_us(work, rates),
        "kernels": kernels,
        "launches": None if reason else len(kernels),
        "low_us": None if reason else sum(k["low_us"] for k in kernels),
        "up_us": None if reason else sum(k["up_us"] for k in kernels),
        "reason": reason,
    }


def _kernel(launched: Launched, rates: Rates) -> dict[str, Any]:
    """The figures of a launch. Where it has CTAs of several kinds, their work adds up, and none
    waits for another."""
    compiled = launched.compiled(rates.arch)
    costs = [
        cost(report, compiled, rates, ctas=count, dram_bytes=launched.dram_bytes * (number == 0))
        for number, (report, count) in enumerate(launched.parts)
    ]
    first = costs[0]
    resources: dict[str, float] = {}
    groups: dict[str, float] = {}
    for name, resource in first.resources.items():
        every = [one.resources[name].us for one in costs]
        resources[name] = max(every) if name in ("latency", "launch") else sum(every)
        groups[resource.group] = max(groups.get(resource.group, 0.0), resources[name])
    del groups[""]  # of the launch itself
    bound = max((name for name in resources if name != "launch"), key=lambda n: resources[n])
    return {
        "name": first.kernel,
        "low_us": resources[bound],
        "up_us": sum(sorted(groups.values())[-2:]),
        "bound": bound,
        "resources": resources,
        "ctas": sum(one.ctas for one in costs),
        "sampled_ctas": sum(one.sampled_ctas for one in costs),
        "launches": 1,
        "dram_bytes": launched.dram_bytes,
        "blocks_per_sm": first.blocks_per_sm,
        "waves": max(one.waves for one in costs),
        "tensor_check": first.tensor_check,
        "notes": list(first.notes),
    }


def print_modelled(rows: Iterable[dict[str, Any]], console: Console | None = None) -> None:
    """Prints the rows as tables: those with figures, the reasons of the others, the notes."""
    rows = list(rows)
    console = console or Console(width=160, highlight=False)
    table = Table(title=f"Kernel times: {LABEL}; launches not included", title_justify="left")
    for name in ("op", "case", "kernel of", "GPU"):
        table.add_column(name)
    for name in ("floor us", "low us", "up us", "launches"):
        table.add_column(name, justify="right")
    table.add_column("bound by")
    table.add_column("CTAs run", justify="right")
    before = ""
    for row in rows:
        if row["reason"]:
            continue
        if before not in ("", row["op"]):
            table.add_section()
        before = row["op"]
        kernels = row["kernels"]
        run, there = (sum(k[name] for k in kernels) for name in ("sampled_ctas", "ctas"))
        figures = (f"{row[name]:,.3g}" if row[name] < 1000 else f"{row[name]:,.0f}"
                   for name in ("floor_us", "low_us", "up_us"))  # fmt: skip
        table.add_row(
            *(row[name] for name in ("op", "case", "backend", "device")), *figures,
            str(row["launches"]), ", ".join(dict.fromkeys(k["bound"] for k in kernels)),
            f"{run:,} of {there:,}",
        )  # fmt: skip
    console.print(table)
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["reason"] == _LEFT_OUT:
            reasons.setdefault(_LEFT_OUT, {})[row["device"]] = None
        elif row["reason"]:
            what = f"{row['op']} {row['backend']} {row['device']}"
            reasons.setdefault(row["reason"], {})[what] = None
    if reasons:
        table = Table("why", "what", title=f"Not modelled ({LABEL})", title_justify="left")
        for reason, found in reasons.items():
            table.add_row(escape(reason), ", ".join(found))
        console.print(table)
    notes = dict.fromkeys(f"{row['device']}: {note}" for row in rows for kernel in row["kernels"]
                          for note in kernel["notes"])  # fmt: skip
    for note in (*notes, *floor_notes(row["device"] for row in rows)):
        console.print(f"note: {note}", markup=False)


def sources_table(devices: Sequence[str] | None = None) -> Table:
    """Every rate behind the figures with its kind and its source (`kimi_ops.testing.cost.devices`
    has the sources in full).

    Raises:
        ValueError: an unknown GPU.
    """
    table = Table(
        "GPU", "rate", "value", "unit", "kind", "source",
        title=f"Rates behind times that are {LABEL}", title_justify="left",
    )  # fmt: skip
    for name in RATES if devices is None else devices:
        rates = rates_of(name)
        for rate, figure in rates.figures().items():
            unit = _UNITS.get(rate, "clocks" if rate.endswith("latency") else "lanes/clock and SM")
            value = f"{figure.value:,.4g}"
            table.add_row(rates.name, rate, value, unit, figure.kind, escape(figure.source))
        for kind, figure in rates.tensor.items():
            unit = "multiply-adds/clock and SM"
            value = f"{figure.value:,.4g}"
            table.add_row(rates.name, kind, value, unit, figure.kind, escape(figure.source))
        if not rates.tensor:
            table.add_row(rates.name, "tensor cores", "-", "", "none published", "")
        table.add_section()
    return table
