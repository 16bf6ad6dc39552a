"""The command line: `kimi-ops COMMAND`.

Exit codes: 0 done, 1 something was found wrong, 2 the request could not be carried out (one line
on stderr says why).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from kimi_ops._version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code.

    Args:
        argv: arguments without the program's name; those of the process if None.
    """
    parser = argparse.ArgumentParser(
        prog="kimi-ops", description="Fused kernels for Kimi K2.5, and the model made of them."
    )
    parser.add_argument("--version", action="version", version=f"kimi-ops {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="versions, devices, and who runs each op here")
    doctor.add_argument("--json", action="store_true", help="the same as JSON")
    args = parser.parse_args(argv)
    from kimi_ops import doctor as command

    return command.run(as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
