"""`kimi-ops verify --compare`: one row per op, and a wrong kernel is named in it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kimi_ops._backends import as_backend
from kimi_ops._dispatch import get_op
from kimi_ops.cli import main
from kimi_ops.testing.inputs import CASES

pytest.importorskip("triton", reason="needs triton: pip install 'triton>=3.4'")
pytest.importorskip("cuda.bindings", reason="needs NVRTC: pip install 'kimi-ops[compile]'")


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """A case or two of each op, one of them too large for the emulator."""
    for op, names in (
        ("moe_sort", ("one", "kimi-1025")),
        ("moe_select", ("bf16-all",)),
        ("silu_mul", ("bf16-3x127",)),
    ):
        monkeypatch.setitem(CASES, op, {name: CASES[op][name] for name in names})


def _rows(capsys):
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_backends_stand_side_by_side(capsys):
    assert main(["verify", "--compare", "--op", "moe_sort", "moe_select", "silu_mul"]) == 0
    header, integers, floats, lone = _rows(capsys)
    assert header[:3] == ["op", "cases", "reference"]
    assert header[4:6] == ["triton[sm_80]", "cuda[sm_80]"]
    assert integers[:3] == ["moe_sort", "1", "equal"]
    assert integers[4:] == ["equal", "equal", "equal"]
    assert all(0 <= float(share) <= 1 for share in (floats[2], *floats[4:6]))
    assert float(floats[6]) <= float(floats[4]) + float(floats[5]) + 0.01
    assert lone[5:] == ["no kernel yet", ""]


def test_a_wrong_kernel_is_named_and_the_exit_code_is_1(monkeypatch, capsys):
    module = get_op("moe_sort").load("reference")

    def launch(outputs, *args):
        module.launch(outputs, *args)
        outputs[0][:2] = outputs[0][:2].flip(0)

    wrong = as_backend(SimpleNamespace(launch=launch, unsupported=lambda *args: None))
    monkeypatch.setitem(get_op("moe_sort")._simulated, "cuda", wrong)
    assert main(["verify", "--compare", "--op", "moe_sort"]) == 1
    out = capsys.readouterr().out
    assert "| 1, 2 FAILED |" in out
    assert "- moe_sort, cuda[sm_80], one: moe_sort output 0[0] differs" in out
    assert "- moe_sort, one: output 0 differs" in out


@pytest.mark.parametrize("more", [["--way", "sm_80"], ["--full"], ["--device", "cuda"]])
def test_compare_takes_ops_alone(more, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["verify", "--compare", *more])
    assert caught.value.code == 2
    assert "--compare goes with --op alone" in capsys.readouterr().err


def test_unknown_op(capsys):
    assert main(["verify", "--compare", "--op", "no_such"]) == 2
    assert "unknown op 'no_such'" in capsys.readouterr().err
