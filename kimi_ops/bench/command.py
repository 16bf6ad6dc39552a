"""`kimi-ops bench`: measures the ops of this package here, beside the peers that are installed."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kimi_ops._backends import GPU_BACKENDS, has_kernel
from kimi_ops._dispatch import op_names
from kimi_ops._target import too_old
from kimi_ops.bench import machine
from kimi_ops.bench.case import BenchCase, cases_of
from kimi_ops.bench.ceilings import Ceilings
from kimi_ops.bench.clock import clock_of
from kimi_ops.bench.measure import Bench, Effort, threads
from kimi_ops.bench.modelled import modelled_rows, print_modelled, sources_table
from kimi_ops.bench.page import page, readme_plot
from kimi_ops.bench.peers import peers
from kimi_ops.bench.record import WRONG, Row, Run, read_json
from kimi_ops.bench.step import print_steps, step_rows
from kimi_ops.bench.table import compared, report, terminal
from kimi_ops.model.errors import KimiError
from kimi_ops.testing.cost import RATES
from kimi_ops.testing.static.toolchain import MissingToolError

_SECTIONS = ("measured", "modelled", "step")
_BACKENDS = {"cpu": ("cpu", "reference"), "cuda": (*GPU_BACKENDS, "reference")}


def run(args: argparse.Namespace) -> int:
    """Carries out the command.

    Returns:
        0 all went through, 1 a result was wrong or, with ``--compare``, medians differ.

    Raises:
        KimiError: a request that cannot be carried out; lists what could be.
    """
    device = _device(args.device)
    ops = _chosen("op", args.op, op_names())
    sections = _chosen("section", args.sections, _SECTIONS)
    backends = _chosen("backend", args.backend, _BACKENDS[device.type])
    if not args.backend:
        backends = [name for name in backends if name != "reference"]
    chosen = _cases(ops, args.cases, args.full)
    if args.list:
        for case in chosen:
            print(f"{case.op}: {case.name}" + " (full)" * case.full)
        return 0
    if args.rounds < 3 or args.seconds <= 0 or any(n < 1 for n in args.threads):
        raise KimiError("--rounds must be 3 or more, --seconds and --threads above 0")
    modelled = _modelled(ops, args) if "modelled" in sections else iter(())
    old = _old(args.compare)
    out = _folder(args.out)
    found = Run(_command(), machine.facts(device))
    console = Console()
    if "measured" in sections:
        for row in _measured(args, device, chosen, backends, found):
            found.rows.append(row)
            if out is not None:  # so that nothing is lost if the run ends before its end
                found.write_json(out / "bench.json")
        console.print(terminal(found))
    if "modelled" in sections:
        for figures in modelled:
            found.modelled.append(figures)
            _tell(f"modelled: {figures['op']}, {figures['backend']}, {figures['device']}")
        print_modelled(found.modelled)
        console.print(sources_table(list(dict.fromkeys(r["device"] for r in found.modelled))))
    if "step" in sections:
        found.steps = list(step_rows(found))
        print_steps(found.steps)
    if out is not None:
        print(f"written: {', '.join(write_all(found, out))} in {out}")
    agree = True
    if old is not None:
        text, agree = compared(old, found)
        print(text)
    return 0 if agree and not any(row.status == WRONG for row in found.rows) else 1


def _modelled(ops: Sequence[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows to come; none, and a word about it, where nobody asked for what cannot be made here."""
    try:
        return modelled_rows(ops, list(RATES), full=args.full)
    except MissingToolError as error:
        if args.sections:
            raise KimiError(f"the modelled section: {error}") from None
        print(f"kimi-ops bench: no modelled section: {error}", file=sys.stderr)
        return iter(())


def write_all(found: Run, folder: Path) -> list[str]:
    """Writes everything that a run has to show, and gives the files' names."""
    files = {"bench.md": report(found), "bench.html": page(found)}
    if found.rows:
        files["ratios.svg"] = readme_plot(found)
        found.write_csv(folder / "bench.csv")
    found.write_json(folder / "bench.json")
    for name, text in files.items():
        (folder / name).write_text(text)
    return ["bench.json", *(["bench.csv"] if found.rows else []), *files]


def _measured(
    args: argparse.Namespace,
    device: torch.device,
    chosen: Sequence[BenchCase],
    backends: Sequence[str],
    found: Run,
) -> Iterator[Row]:
    """Rows of all cases at every number of threads."""
    clock = clock_of(device)
    every = peers()
    names = [] if args.peers == ["none"] else _chosen("peer", args.peers, list(every))
    here = [every[name] for name in names if device.type in every[name].DEVICES]
    if device.type == "cpu" and not args.threads:
        args.threads = [torch.get_num_threads()]
    for number in args.threads if device.type == "cpu" else [torch.get_num_threads()]:
        with threads(number):
            ceilings = Ceilings(device, clock)
            for count, case in enumerate(chosen):
                _tell(f"{count + 1} of {len(chosen)}: {case.op}, {case.name}")
                mine = [b for b in backends if b == "reference" or has_kernel(case.op, b)]
                effort = Effort(args.rounds, args.seconds)
                if mine:
                    yield from Bench(device, clock, ceilings, mine, here, effort).run(case)
            key = number if device.type == "cpu" else 0  # as rows have it
            found.machine = machine.with_ceilings(found.machine, ceilings, key)


def _chosen(what: str, wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    if unknown := [name for name in wanted if name not in known]:
        raise KimiError(f"unknown {what} {unknown[0]!r}; there are {', '.join(known)}")
    return [name for name in known if not wanted or name in wanted]


def _cases(ops: Sequence[str], texts: Sequence[str], full: bool) -> list[BenchCase]:
    there = [case for op in ops for case in cases_of(op, full=full)]
    if not texts:
        return there
    for text in texts:
        if not any(text in case.name for case in there):
            names = "; ".join(dict.fromkeys(case.name for case in there))
            more = "" if full else " (and more with --full)"
            raise KimiError(f"no case has {text!r} in its name; there are {names}{more}")
    return [case for case in there if any(text in case.name for text in texts)]


def _device(name: str) -> torch.device:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise KimiError(f"the device must be cpu, cuda or cuda:N, got {name!r}")
    if name == "cpu":
        return torch.device("cpu")
    number = int(name.partition(":")[2] or 0)
    if not torch.cuda.is_available() or number >= torch.cuda.device_count():
        there = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
        raise KimiError(f"there is no {name} here; there are {', '.join(['cpu', *there])}")
    device = torch.device("cuda", number)
    if reason := too_old(device):
        raise KimiError(reason)
    return device


def _old(path: str | None) -> Run | None:
    if path is None:
        return None
    try:
        return read_json(Path(path))
    except ValueError as error:
        raise KimiError(str(error)) from None


def _folder(path: str | None) -> Path | None:
    if path is None:
        return None
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _command() -> str:
    return shlex.join(["kimi-ops", *sys.argv[1:]])


def _tell(text: str) -> None:
    """Progress, for whoever watches a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
