"""Which sources a page or a report was made with."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def commit_of(*folders: str) -> str:
    """The commit of the checkout that this package is in, and what differs from it in folders.

    In words, "unknown commit" where there is no checkout or git does not read it.
    """

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()) != ROOT.resolve():
            return "unknown commit"
        commit = git("rev-parse", "--short=10", "HEAD").strip()
        changed = git("status", "--porcelain", "--", *folders)
    except (OSError, subprocess.CalledProcessError):
        return "unknown commit"
    files = ", ".join(f"`{line[3:].split(' -> ')[-1]}`" for line in changed.splitlines())
    return f"commit {commit}" + (f" with changes in {files}" if files else "")
