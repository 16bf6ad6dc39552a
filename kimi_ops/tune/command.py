"""`kimi-ops tune`: writes a table of tiles for one GPU. Imports what it needs when it runs."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kimi_ops._dispatch import op_names
from kimi_ops.model.errors import KimiError

if TYPE_CHECKING:
    from kimi_ops.tune.clocks import Clock


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "Tries every candidate tile at Kimi K2.5's shapes and writes a table for KIMI_OPS_TILES. "
        "Only with KIMI_OPS_TUNE=1: it takes minutes to hours."
    )
    parser.add_argument("--op", nargs="+", default=[], metavar="OP", help="names of ops (all)")
    parser.add_argument(
        "--case", metavar="TEXT", help="only calls whose sizes contain this: tokens=64,"
    )
    parser.add_argument(
        "--clock",
        choices=("measured", "modelled"),
        default="measured",
        help="on the GPU here, or by the cost model, which needs none (measured)",
    )
    parser.add_argument(
        "--gpu", metavar="G", help="whose rates are modelled: A100, H100, H200 (H100)"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="where the table goes")


def _allowed() -> None:
    value = os.environ.get("KIMI_OPS_TUNE", "")
    if value not in ("", "0", "1"):
        raise KimiError(f"KIMI_OPS_TUNE must be 0 or 1, got {value!r}")
    if value != "1":
        raise KimiError(
            "tuning keeps a GPU (or, modelled, the processor) busy for minutes to hours; "
            "set KIMI_OPS_TUNE=1 to let it"
        )


def run(args: argparse.Namespace) -> int:
    """Searches and writes.

    Returns:
        0; what cannot be carried out is a `KimiError`.
    """
    _allowed()
    if importlib.util.find_spec("triton") is None:
        raise KimiError("triton is not installed: pip install 'kimi-ops[compile]'")
    out = Path(args.out)
    if out.is_dir() or not out.parent.is_dir():
        raise KimiError(f"--out: {out} is no file that can be written")

    from kimi_ops.kernels._tiles import choices_of
    from kimi_ops.testing.static import MissingToolError
    from kimi_ops.tune.cases import CASES
    from kimi_ops.tune.search import search

    for op in args.op:
        if op not in op_names():
            raise KimiError(f"--op: unknown op {op!r}; there are {', '.join(op_names())}")
        if not choices_of(op):
            tuned = ", ".join(name for name in op_names() if choices_of(name))
            raise KimiError(f"--op: {op} has no tiles to choose yet; those that have: {tuned}")
    cases = [c for c in CASES if not args.op or c.op in args.op]
    cases = [c for c in cases if not args.case or args.case in f"{c.name},"]
    clock = _clock(args.clock, args.gpu)
    if clock.name == "modelled":
        for case in cases:
            if case.sample is None:
                print(f"{case.op} {case.name}: too large for the emulator, left out", flush=True)
        cases = [case for case in cases if case.sample is not None]
    if not cases:
        raise KimiError("no call is left to tune for: see --op and --case")
    print(f"{clock.product}, {clock.name}", flush=True)

    def save(content: dict[str, Any]) -> None:
        try:
            out.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        except OSError as error:
            raise KimiError(f"--out: {out}: {error.strerror or error}") from None

    try:
        content = search(cases, clock, lambda line: print(line, flush=True), save)
    except MissingToolError as error:
        raise KimiError(str(error)) from None
    print(f"{len(content['tiles'])} tiles differ from the kernels' own: {out}", flush=True)
    return 0


def _clock(name: str, product: str | None) -> Clock:
    from kimi_ops.tune.clocks import Measured, Modelled

    if name == "modelled":
        try:
            return Modelled(product or "H100")
        except ValueError as error:
            raise KimiError(f"--gpu: {error}") from None
    if product is not None:
        raise KimiError("--gpu is for --clock modelled; what is measured is the GPU here")
    if not torch.cuda.is_available():
        raise KimiError(
            "torch sees no GPU to measure on; --clock modelled ranks tiles by the cost model"
        )
    try:
        return Measured(torch.device("cuda", torch.cuda.current_device()))
    except ValueError as error:
        raise KimiError(f"the GPU here cannot be tuned for: {error}") from None
