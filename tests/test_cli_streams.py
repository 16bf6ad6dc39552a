"""Streams that cannot be written and Ctrl-C at any time: what the program says and returns."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULE = ["-m", "kimi_ops.cli"]
NO_SPACE = "kimi-ops: error: the output cannot be written: No space left on device\n"
CLOSED = "kimi-ops: error: stdout is closed: there is nowhere to write to\n"
NAMES = ("doctor", "compile", "generate", "inspect", "make-checkpoint", "plan")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[int, str]]:
    """(command line, kind of stream) -> (exit code, stderr), of every subcommand."""
    tiny = tmp_path_factory.mktemp("streams")
    make = ["make-checkpoint", f"{tiny}/c", "--overwrite"]
    answer = ["generate", "--model", f"{tiny}/c", "--prompt", "Hi", "--max-new-tokens", "2"]
    lines = [["--help"], ["--version"], *([name, "--help"] for name in NAMES)]
    lines += [["doctor"], ["doctor", "--json"], ["plan", "--devices", "8x141GB"]]
    lines += [["inspect", f"{tiny}/c"], make, [*answer, "--json"], answer]
    cases = [(make, "good")]
    cases += [(line, kind) for line in lines for kind in ("full", "closed", "pipe")]
    cases += [(line, "silent") for line in (["--help"], ["doctor"], answer)]
    result = subprocess.run(
        [sys.executable, "tests/cli_streams.py"],
        cwd=ROOT,
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found) == len(cases)
    pairs = zip(cases, found, strict=True)
    return {(" ".join(line), kind): (code, said) for (line, kind), (code, said) in pairs}


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [("full", 2, NO_SPACE), ("closed", 2, CLOSED), ("pipe", 141, ""), ("silent", 2, "")],
)
def test_every_command_says_that_its_output_went_nowhere(outcomes, kind, code, said):
    found = {line: value for (line, k), value in outcomes.items() if k == kind}
    assert len(found) == (3 if kind == "silent" else 15)
    for line, (exit_code, stderr) in found.items():
        # What generate notes beside its answer is not of the error.
        lines = [t for t in stderr.splitlines(True) if "random" not in t and "format" not in t]
        assert (exit_code, "".join(lines)) == (code, said), line


def test_shell_s_own_redirections():
    """The same with streams as a shell and Python's start make them."""
    command = f"{sys.executable} -m kimi_ops.cli --version"
    for tail, code, said in (("> /dev/full", 2, NO_SPACE), (">&-", 2, CLOSED)):
        result = subprocess.run(
            ["bash", "-c", f"{command} {tail}"], cwd=ROOT, capture_output=True, text=True
        )
        assert (result.returncode, result.stderr) == (code, said), tail


def _interrupted(command: list[str], mark: str, **options: object) -> tuple[int, str]:
    """Exit code and stderr of a program that gets Ctrl-C once its stderr says ``mark``."""
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    ) as process:
        assert process.stderr is not None
        said = ""
        while mark not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        process.send_signal(signal.SIGINT)
        said += process.stderr.read()
        return process.wait(), said


@pytest.fixture
def script(tmp_path: Path) -> str:
    """The installed program `kimi-ops`, as pip writes it."""
    path = tmp_path / "kimi-ops"
    path.write_text("import sys\nfrom kimi_ops.cli import main\nsys.exit(main())\n")
    return str(path)


# A line of -X importtime ends with a module's name, once it is imported.
@pytest.mark.parametrize(
    ("program", "mark"),
    [("module", " torch._utils_internal\n"), ("script", " kimi_ops._check\n")],
)
def test_ctrl_c_while_torch_is_imported(program, mark, script):
    command = MODULE if program == "module" else [script]
    code, said = _interrupted(["-X", "importtime", *command, "doctor"], mark)
    assert code == 130
    assert said.endswith("kimi-ops: interrupted\n")
    assert "Traceback" not in said


def test_ctrl_c_in_a_program_of_the_user_s_own_is_python_s():
    """Also the proof that the test above would notice a traceback."""
    command = ["-X", "importtime", "-c", "import kimi_ops.cli"]
    code, said = _interrupted(command, " torch._utils_internal\n")
    assert code == -signal.SIGINT
    assert "Traceback" in said
    code = (
        "import signal, kimi_ops.cli\n"
        "kimi_ops.cli.main(['plan', '--devices', '8x141GB'])\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_ctrl_c_that_the_shell_ignores_stays_ignored():
    code, said = _interrupted(
        ["-X", "importtime", *MODULE, "plan", "--devices", "8x141GB"],
        " torch._utils_internal\n",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert code == 0
    assert "interrupted" not in said


def test_ctrl_c_at_the_prompt_of_a_chat(tmp_path):
    from kimi_ops.cli import main

    assert main(["make-checkpoint", str(tmp_path / "c")]) == 0
    command = [*MODULE, "generate", "--model", str(tmp_path / "c"), "--interactive"]
    code, said = _interrupted(command, "// begins a message with /\n")
    assert code == 130
    assert said.endswith("kimi-ops: interrupted\n")
    assert "Traceback" not in said
