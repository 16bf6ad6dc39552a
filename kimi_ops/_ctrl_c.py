"""Ctrl-C in the program `kimi-ops` while nothing can catch it yet, or any more.

Importing torch takes seconds, and an extension that is interrupted amid its import may make any
error of a KeyboardInterrupt. So until the work begins, and only if this process is the command
line, Ctrl-C ends it at once with exit code 130; there is nothing to clean up by then. Once the work
is done it is ignored: what is left is the interpreter's own end, whose tracebacks help nobody.

The package imports this module first. Before that, for the 20 ms in which Python itself starts, its
own traceback is out of reach.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType


def _is_program() -> bool:
    """Whether this process is `kimi-ops` or `python -m kimi_ops.cli`, and not a user's own."""
    name = getattr(sys, "argv", [""])[0]
    # While `python -m` looks for the module that it shall run, its name stands nowhere else.
    return Path(name).stem == "kimi-ops" or (name == "-m" and "kimi_ops.cli" in sys.orig_argv)


def _exit_at_once(signum: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):  # no stderr to say it on
        os.write(2, b"kimi-ops: interrupted\n")
    os._exit(130)


def work_begins() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt, if it ended the program at once before."""
    if signal.getsignal(signal.SIGINT) is _exit_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def work_ends() -> None:
    """From here on Ctrl-C is ignored, if this process is the command line."""
    if _PROGRAM:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


# A shell starts background jobs with Ctrl-C ignored, and that must stay.
_PROGRAM = _is_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
if _PROGRAM:
    signal.signal(signal.SIGINT, _exit_at_once)
