"""The command line: `kimi-ops COMMAND`.

Exit codes: 0 done, 1 something was found wrong, 2 the request could not be carried out (one line
on stderr says why; an output that cannot be written is such a request), 130 ended by Ctrl-C, 141
nobody reads the output any more (quietly, as a program that SIGPIPE ends).
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import TextIO

import torch

from kimi_ops import _ctrl_c
from kimi_ops._commands import Command, check_combinations, make_parser
from kimi_ops._dispatch import BackendError, parse_choice
from kimi_ops.model.errors import KimiError

# Top-level modules of the packages that an extra adds, `kimi-ops[model]`.
PACKAGES = {
    "model": ("av", "jinja2", "PIL", "regex", "safetensors", "tiktoken", "tqdm"),
    "train": ("matplotlib", "skimage", "sklearn"),
}


def _run(argv: Sequence[str] | None) -> int:
    """Parses and carries out one request; what it raises, `main` makes an exit code of."""
    args = make_parser().parse_args(argv)
    check_combinations(args)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that the terminal's encoding lacks must not end an answer.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        parse_choice(os.environ.get("KIMI_OPS_BACKEND", ""))
    except ValueError as error:
        raise KimiError(f"KIMI_OPS_BACKEND: {error}") from None
    command: Command = args.load()
    _ctrl_c.work_begins()
    return command(args)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # stderr may be as full as stdout; the code still tells
        print(f"kimi-ops: {text}", file=sys.stderr)


def _refuse(reason: object) -> int:
    _say(f"error: {' '.join(str(reason).splitlines())}")
    return 2


def _drop_what_cannot_be_written(*streams: TextIO) -> None:
    """What is still buffered would fail again at exit, where nobody can catch it."""
    for stream in streams:
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code.

    Args:
        argv: arguments without the program's name; those of the process if None.

    Raises:
        SystemExit: --help, --version, and usage errors (code 2).
    """
    # Python has no stream at all where the shell closed one: `print` would say nothing, or say on
    # stdout what belongs on stderr.
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  as long as the process
    if sys.stdout is None:
        return _refuse("stdout is closed: there is nowhere to write to")
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # errors must come here, not at the interpreter's exit
    except KimiError as error:
        return _refuse(error)
    except ModuleNotFoundError as error:
        top = (error.name or "").partition(".")[0]
        extra = next((extra for extra, names in PACKAGES.items() if top in names), None)
        if extra is None:
            raise
        return _refuse(f"{top} is not installed: pip install 'kimi-ops[{extra}]'")
    except BackendError as error:
        return _refuse(error)
    except (MemoryError, RuntimeError) as error:
        # torch has a class of its own for this on CUDA, but only a text on the CPU.
        memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not memory and "can't allocate memory" not in str(error):
            raise
        return _refuse(f"not enough memory ({error}); `kimi-ops plan` tells what a model needs")
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:
        return 141
    except SystemExit as end:
        # rich, which prints the tables, turns a closed pipe into an exit of its own.
        if isinstance(end.__context__, BrokenPipeError):
            return 141
        raise
    except OSError as error:
        if error.filename is not None:  # not of a stream that was open already
            raise
        return _refuse(f"the output cannot be written: {error.strerror or error}")
    finally:
        _drop_what_cannot_be_written(sys.stdout, sys.stderr)
        _ctrl_c.work_ends()


if __name__ == "__main__":
    sys.exit(main())
