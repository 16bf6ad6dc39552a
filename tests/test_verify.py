"""`kimi-ops verify`: what it prints, and that it tells a wrong kernel from a right one."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest

from kimi_ops import _backends
from kimi_ops._backends import as_backend
from kimi_ops._dispatch import get_op
from kimi_ops.cli import main
from kimi_ops.testing import verify
from kimi_ops.testing.inputs import CASES

pytest.importorskip("triton", reason="needs triton: pip install 'triton>=3.4'")

OP = "silu_mul"
NAMES = ("bf16-3x127", "bf16-hostile", "bf16-many-rows")


@pytest.fixture
def few(monkeypatch):
    """Three cases, of which the last is too large for the ways."""
    monkeypatch.setitem(CASES, OP, {name: CASES[OP][name] for name in NAMES})


def _cells(capsys) -> list[list[str]]:
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_each_way_has_a_row(few, capsys):
    assert main(["verify", "--op", OP, "--way", "interpreted", "sm_80"]) == 0
    header, interpreted, executed = _cells(capsys)
    assert header[:3] == ["op", "way", "kernels"]
    assert interpreted[:7] == [OP, "triton[interpreted]", "1", "", "2", "1", ""]
    assert executed[:3] == [OP, "triton[sm_80]", "1"]
    assert int(executed[3]) >= 2  # specialisations: dense rows, strided ones
    assert executed[4:7] == ["2", "1", ""]
    for row in (interpreted, executed):
        assert 0 < float(row[7]) <= 1
        assert row[8].partition(":")[0] in NAMES


@pytest.mark.skipif(
    get_op(OP).why_not("cpu", None) is not None, reason=str(get_op(OP).why_not("cpu", None))
)
def test_quick_runs_what_is_native_to_the_device_alone(few, capsys):
    assert main(["verify", "--op", OP, "--quick"]) == 0
    (_, row) = _cells(capsys)
    assert row[:2] == [OP, "cpu on cpu"]
    assert row[4:7] == ["3", "", ""]


@pytest.mark.parametrize("more", [["--way", "sm_80"], ["--full"], ["--compare"]])
def test_quick_takes_ops_and_a_device_alone(more, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["verify", "--quick", *more])
    assert caught.value.code == 2
    assert "--quick goes with --op and --device alone" in capsys.readouterr().err


def test_quick_without_the_cpu_library_says_so(monkeypatch, capsys):
    monkeypatch.setattr(get_op(OP), "why_not", lambda backend, args: "no library")
    assert main(["verify", "--op", OP, "--quick"]) == 2
    assert "nothing runs here: no library" in capsys.readouterr().err


def test_a_wrong_kernel_is_named_and_the_exit_code_is_1(few, monkeypatch, capsys):
    module = get_op(OP).load("triton")

    def launch(y, gate_up):
        module.launch(y, gate_up)
        y[0] *= 1.1

    wrong = as_backend(SimpleNamespace(launch=launch, unsupported=module.unsupported))
    monkeypatch.setitem(get_op(OP)._simulated, "triton", wrong)
    assert main(["verify", "--op", OP, "--way", "interpreted"]) == 1
    out = capsys.readouterr().out
    assert "| 0, 2 FAILED |" in out
    assert "- silu_mul, triton[interpreted], bf16-hostile: " in out
    assert "0 cases passed, 2 failed" in out


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"), None])
def test_an_error_of_the_launch_is_a_failed_case(few, monkeypatch, capsys, error):
    """The driver's, and Triton's compiler's, which is no RuntimeError; the next case is tried."""
    error = error or importlib.import_module("triton.errors").TritonError("out of resources")

    def launch(y, gate_up):
        raise error

    broken = SimpleNamespace(launch=launch, unsupported=lambda x: None)
    monkeypatch.setitem(get_op(OP)._simulated, "triton", as_backend(broken))
    assert main(["verify", "--op", OP, "--way", "interpreted"]) == 1
    out = capsys.readouterr().out
    assert "| 0, 2 FAILED |" in out
    assert f"bf16-hostile: {type(error).__name__}: {error}" in out


@pytest.mark.parametrize(
    ("needs", "old", "reason"),
    [
        ("no_such_module", None, "no_such_module is not installed: pip install it"),
        ("triton", "this GPU is too old", "this GPU is too old"),
    ],
)
def test_a_backend_that_cannot_run_on_the_gpu_is_said_and_the_exit_code_is_1(
    few, monkeypatch, capsys, needs, old, reason
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a GPU")
    monkeypatch.setitem(_backends._NEEDS, "triton", (needs, "pip install it"))
    monkeypatch.setattr(get_op(OP), "_loaded", {})
    monkeypatch.setattr(verify, "too_old", lambda device: old)
    assert main(["verify", "--op", OP, "--device", "cuda"]) == 1
    out = capsys.readouterr().out
    said = f"cannot run: {reason}"
    assert f"| silu_mul | triton on a GPU |  |  | {said} |" in out
    assert f"- silu_mul, triton on a GPU: {said}" in out


def test_what_a_kernel_declines_is_no_failure(few, monkeypatch, capsys):
    module = get_op(OP).load("triton")
    shy = SimpleNamespace(launch=module.launch, unsupported=lambda x: f"{x.shape[0]} rows are few")
    monkeypatch.setitem(get_op(OP)._simulated, "triton", as_backend(shy))
    assert main(["verify", "--op", OP, "--way", "interpreted"]) == 0
    out = capsys.readouterr().out
    assert "Declined:\n- silu_mul, triton[interpreted], bf16-3x127: 3 rows are few" in out
    assert "0 cases passed, 0 failed, 2 declined." in out


def test_kernels_on_a_device_go_through_the_same_body(few):
    outcome = verify.verify_backend(OP, "reference", "cpu")
    assert outcome.passed == list(NAMES)
    assert outcome.row()[1] == "reference on cpu"
    assert not outcome.kernels


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--op", "nothing"], "unknown op 'nothing'; there are add_rms_norm, "),
        (["--way", "sm_75"], "unknown way 'sm_75'; there are triton[interpreted], "),
        (["--device", "tpu"], "the device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "cuda:x"], "the device must be cpu, cuda or cuda:N, got 'cuda:x'"),
        (
            ["--op", "silu_mul", "--way", "cuda[sm_90]"],
            "silu_mul cannot run that way; there are triton[interpreted], triton[sm_80], ",
        ),
        (["--device", "cuda", "--way", "sm_80"], "ways are for kernels that run without a GPU"),
    ],
)
def test_requests_that_cannot_be_carried_out(argv, message, capsys):
    assert main(["verify", *argv]) == 2
    assert message in capsys.readouterr().err


def test_no_gpu_is_said(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["verify", "--device", "cuda"]) == 2
    assert "there is no CUDA device here" in capsys.readouterr().err
