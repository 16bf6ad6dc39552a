"""Calls of the command line that must be refused."""

from __future__ import annotations

import pytest

from kimi_ops.cli import main


def error_of(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line of a refused request; asserts that it is one, and that stdout is empty."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kimi-ops: error: ")
    assert err.count("\n") == 1
    return err


def usage_error_of(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """What argparse writes about a request of the wrong form."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in argv])
    assert stopped.value.code == 2
    return capsys.readouterr().err
