"""A program that runs many command lines, each in a process of its own with streams that fail.

Torch is imported once; each case is a fork of that, with the exit code of a real process. Reads
JSON ``[[argv, kind], ...]`` on stdin and writes ``[[exit code, stderr], ...]`` on stdout. Kinds:
"full" (no space left), "closed" (no stdout at all), "pipe" (its reader has gone), "silent" (full,
and stderr too), "good".
"""

from __future__ import annotations

import json
import os
import sys
import tempfile

import kimi_ops.doctor
import kimi_ops.model.generate_command
import kimi_ops.model.kimi  # noqa: F401  loaded once, not in every fork
from kimi_ops.cli import main


def _replace_streams(kind: str, stderr: int) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full if kind == "silent" else stderr, 2)
    if kind == "closed":
        os.close(1)
        sys.stdout = None
        return
    reader, writer = os.pipe()
    os.close(reader)
    good = os.open(os.devnull, os.O_WRONLY)
    os.dup2({"pipe": writer, "good": good}.get(kind, full), 1)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, closefd=False)  # line by line, as Python's own


def _exit_code(argv: list[str]) -> int:
    """As Python would end the process, without the second that taking torch apart costs."""
    try:
        code = main(argv)
    except SystemExit as end:
        code = int(end.code or 0)
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    except OSError:
        return 120  # that of a Python whose streams fail at its very end
    return code


def _run(argv: list[str], kind: str) -> tuple[int, str]:
    with tempfile.TemporaryFile() as stderr:
        if (child := os.fork()) == 0:
            _replace_streams(kind, stderr.fileno())
            os._exit(_exit_code(argv))
        _, status = os.waitpid(child, 0)
        stderr.seek(0)
        return os.waitstatus_to_exitcode(status), stderr.read().decode()


if __name__ == "__main__":
    found = [_run(argv, kind) for argv, kind in json.load(sys.stdin)]
    json.dump(found, sys.stdout)
