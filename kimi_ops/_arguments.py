"""Parts of the command line that several commands share."""

from __future__ import annotations

import argparse
import sys
from typing import Any


class Parser(argparse.ArgumentParser):
    """Takes options by their full names only, and says so where a help text cannot be written."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse's own drops the error of a full disk or a closed pipe.
        (file or sys.stderr).write(message)


class Medium(argparse.Action):
    """Collects --image and --video in one list, so that their order is kept."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        kind = "image" if option_string == "--image" else "video"
        namespace.media = [*namespace.media, *((kind, path) for path in values)]


def add_json(parser: argparse.ArgumentParser, what: str = "the same as JSON") -> None:
    """``--json``."""
    parser.add_argument("--json", action="store_true", help=what)


def add_dtype(parser: argparse.ArgumentParser, what: str) -> None:
    """``--dtype`` of the model."""
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help=f"{what} (bf16)"
    )


def add_cache_format(parser: argparse.ArgumentParser) -> None:
    """``--cache-format`` of the model."""
    what = "of the latent cache; fp8 takes 57 %% of bfloat16's memory (plain)"
    parser.add_argument("--cache-format", choices=("plain", "fp8"), default="plain", help=what)


def add_layers(parser: argparse.ArgumentParser, what: str) -> None:
    """``--layers``."""
    parser.add_argument("--layers", metavar="A-B", help=what)


def add_number(
    parser: argparse.ArgumentParser, name: str, what: str, default: int | None = None
) -> None:
    """An integer option."""
    parser.add_argument(name, type=int, default=default, metavar="N", help=what)
