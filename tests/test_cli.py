"""The command line as a program: help, usage, what ends it early, and `plan`.

Each request that cannot be carried out is one line on stderr and exit code 2.
"""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_calls import error_of, usage_error_of

import kimi_ops
from kimi_ops.cli import main
from kimi_ops.model import commands

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, not to be changed."""
    directory = tmp_path_factory.mktemp("cli") / "tiny"
    assert main(["make-checkpoint", str(directory)]) == 0
    return directory


def test_plan_exit_code_tells_whether_it_fits(capsys):
    # 595 GB of weights: 4 x 141 GB are too few, 8 x 141 GB enough.
    argv = ["plan", "--context", "32768", "--devices"]
    assert main([*argv, "8x141GB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    assert found["components"]["latent_cache"] == 32768 * 70_272
    assert (found["parallel"], found["batch"], found["weights"]) == ("tp8", 1, "int4")
    assert main([*argv, "4x141GB", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False
    assert main([*argv, "8x141GB"]) == 0
    assert "it fits" in capsys.readouterr().out
    assert main([*argv, "8x141GB", "--parallel", "ep8", "--batch", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["parallel"], found["batch"]) == ("ep8", 2)
    assert main([*argv, "8x141GB", "--weights", "bf16"]) == 1


def test_plan_of_another_config_and_its_whole_context(tiny, capsys):
    argv = ["plan", "--devices", "cpu:2GB", "--config", str(tiny), "--json"]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["context"] == 8192


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--devices", "eight"], "devices must look like '8x141GB'"),
        (["--devices", "8x141GB", "--context", "0"], "context must be from 1 to 262144"),
        (["--devices", "8x141GB", "--context", "262145"], "context must be from 1 to 262144"),
        (["--devices", "8x141GB", "--batch", "-1"], "batch must be from 1"),
        (["--devices", "8x141GB", "--parallel", "pp8"], "parallel must be"),
        (["--devices", "8x141GB", "--parallel", "tp3"], "must use all 8"),
        (["--devices", "1x1GB", "--config", "nowhere"], "nowhere"),
    ],
)
def test_plan_errors(capsys, argv, expected):
    assert expected in error_of(capsys, "plan", *argv)


# The program as a whole


def run(*argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kimi_ops.cli", *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def test_as_a_program():
    result = run("inspect", "nowhere")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "kimi-ops: error: nowhere: not a directory with a checkpoint\n"


def test_help_names_every_command_and_loads_no_model(capsys):
    code = (
        "import sys; from kimi_ops.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'av', 'PIL', 'tiktoken', 'jinja2', 'transformers', 'safetensors'}\n"
        "sys.exit(f'loaded {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in ("doctor", "generate", "inspect", "make-checkpoint", "plan"):
        assert name in result.stdout


def test_version_and_usage_errors(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"kimi-ops {kimi_ops.__version__}\n"
    assert "COMMAND" in usage_error_of(capsys)
    assert "invalid choice" in usage_error_of(capsys, "frobnicate")
    assert "DIR" in usage_error_of(capsys, "inspect")
    assert "--devices" in usage_error_of(capsys, "plan")
    assert "invalid int value" in usage_error_of(capsys, "plan", "--devices", "x", "--batch", "y")


def test_missing_package_is_one_line():
    # None in sys.modules makes the import fail as if the package were not installed.
    code = (
        "import sys; sys.modules['av'] = None\n"
        "from kimi_ops.cli import main\n"
        "sys.exit(main(['generate', '--model', '.', '--prompt', 'x']))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == (
        "kimi-ops: error: av is not installed: pip install 'kimi-ops[model]'\n"
    )


def test_a_fault_of_this_package_is_not_taken_for_a_missing_one(monkeypatch):
    real = builtins.__import__

    def broken(name: str, *rest: Any) -> Any:
        if name == "kimi_ops.model" and rest[2] and "commands" in rest[2]:
            raise ModuleNotFoundError("No module named 'kimi_ops.nothing'", name="kimi_ops.nothing")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(ModuleNotFoundError, match="nothing"):
        main(["inspect", "x"])


def test_reader_that_goes_away_is_no_error(tiny):
    command = [sys.executable, "-m", "kimi_ops.cli", "inspect", str(tiny)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_ctrl_c_anywhere_is_130(monkeypatch, capsys):
    def interrupt(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run_plan", interrupt)
    assert main(["plan", "--devices", "x"]) == 130
    assert capsys.readouterr().err == "kimi-ops: interrupted\n"


def test_memory_that_is_not_there_is_one_line(monkeypatch, capsys):
    def allocate(args: object) -> int:
        torch.empty(10**15)
        return 0

    monkeypatch.setattr(commands, "run_plan", allocate)
    assert "not enough memory" in error_of(capsys, "plan", "--devices", "x")

    def other(args: object) -> int:
        raise RuntimeError("a fault")

    monkeypatch.setattr(commands, "run_plan", other)
    with pytest.raises(RuntimeError, match="a fault"):
        main(["plan", "--devices", "x"])


def test_bad_backend_choice_of_the_environment_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("KIMI_OPS_BACKEND", "warp")
    assert "KIMI_OPS_BACKEND: unknown backend 'warp'" in error_of(capsys, "doctor")


def test_doctor_still_answers(capsys):
    assert main(["doctor", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["ops"]["cpu"]) == set(kimi_ops.op_names())


def test_model_package_gives_its_class_lazily():
    code = (
        "import sys, kimi_ops.model.config\n"
        "assert 'kimi_ops.model.kimi' not in sys.modules\n"
        "assert 'KimiK25' in dir(kimi_ops.model)\n"
        "from kimi_ops.model import KimiK25\n"
        "from kimi_ops.model.kimi import KimiK25 as same\n"
        "assert KimiK25 is same\n"
        "try: kimi_ops.model.nothing\n"
        "except AttributeError as error: assert 'nothing' in str(error)\n"
        "else: raise SystemExit('no AttributeError')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
