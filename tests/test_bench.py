"""The benchmark suite: its cases, its check before the clock, its rows, its command line."""

from __future__ import annotations

import dataclasses
import json
import types

import pytest
import torch
from cli_calls import error_of

import kimi_ops
from kimi_ops._dispatch import get_op
from kimi_ops.bench import BenchCase, Maker, Work, oracle
from kimi_ops.bench.case import cases_of
from kimi_ops.bench.ceilings import Ceilings
from kimi_ops.bench.clock import CpuClock, Timed
from kimi_ops.bench.measure import Bench, Effort, TooLarge, bytes_of, rotation
from kimi_ops.bench.peers import Declined
from kimi_ops.bench.record import MEASURED, SKIPPED, WRONG, Row, Run, read_json
from kimi_ops.cli import main
from kimi_ops.testing.check import as_tuple
from kimi_ops.testing.inputs import cases as hostile

OPS = kimi_ops.op_names()
CPU = torch.device("cpu")


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_cases_that_its_contract_takes(op):
    contract, cases = get_op(op), cases_of(op, full=True)
    assert any(not case.full for case in cases)
    for case in cases:
        args = next(case.calls(Maker("meta")))
        contract.checks.run(*args)
        assert not case.series or (case.size > 0 and case.unit)


@pytest.mark.parametrize("op", OPS)
def test_work_counts_what_a_call_must_move(op):
    """Never more than all arguments and results, and at least the results."""
    case = min(cases_of(op), key=lambda case: _size(next(case.calls(Maker("meta")))))
    args = next(case.calls(Maker()))
    outputs = as_tuple(get_op(op).outputs(*args))
    work = case.work(*args)
    written = sum(t.nbytes for t in outputs)
    mutated = sum(args[get_op(op).params.index(name)].nbytes for name in get_op(op).mutates)
    assert 0 < work.read <= 1.001 * _size(args)
    assert written <= work.written <= written + mutated


def _size(args):
    return sum(arg.nbytes for arg in args if isinstance(arg, torch.Tensor))


def test_calls_share_weights_and_nothing_else():
    endless = cases_of("rms_norm")[0].calls(Maker())
    (x, weight, _), (y, same, _) = next(endless), next(endless)
    assert weight is same
    assert not torch.equal(x, y)


def test_shared_memory_counts_once():
    x, weight = torch.ones(8, 64), torch.ones(64)
    calls = [(x + 0, weight, 1e-5) for _ in range(50)]
    assert bytes_of(calls) == 50 * x.nbytes + weight.nbytes
    assert bytes_of([(x[:4], x[4:])]) == x.nbytes
    assert bytes_of([(x.to("meta"), weight.to("meta"))]) == x.nbytes + weight.nbytes


def test_rotation_exceeds_the_cache_and_refuses_what_does_not_fit(monkeypatch):
    from kimi_ops.bench import measure

    case = _tiny()
    monkeypatch.setattr(measure, "cache_bytes", lambda device: 20_000)
    touched = case.work(*next(case.calls(Maker()))).bytes
    assert len(rotation(case, CPU)) * touched >= 2 * 20_000
    monkeypatch.setattr(measure, "cache_bytes", lambda device: 1)
    assert len(rotation(case, CPU)) == 3
    monkeypatch.setattr(measure, "available_bytes", lambda device: 1000)
    with pytest.raises(TooLarge, match=r"wants 0\.0 GiB, 0\.0 GiB are free"):
        rotation(case, CPU)


def _tiny(op="rms_norm", name="tiny"):
    def calls(new):
        weight = new.normal(64)
        while True:
            yield new.normal(8, 64), weight, 1e-5

    def work(x, weight, eps):
        return Work(x.nbytes + weight.nbytes, x.nbytes)

    return BenchCase(op, name, calls, work, series="series", size=8, unit="tokens")


class _Still:
    """A clock by which every call takes as long as its name says."""

    def sampler(self, call, rotation):
        call(0)
        return Timed(lambda: 1e-3, 1, "a clock that stands still")


def _bench(peers=(), backends=("reference",)):
    clock = _Still()
    ceilings = Ceilings(CPU, clock)
    ceilings._buffer = torch.ones(1024, dtype=torch.int64)
    return Bench(CPU, clock, ceilings, backends, peers, Effort(5, 1.0, 3))


def _peer(run, **more):
    return types.SimpleNamespace(
        NAME="peer", OPS={"rms_norm": lambda calls: run(calls)}, missing=lambda device: None, **more
    )


def _norm(calls):
    def run(i):
        x, weight, eps = calls[i]
        return torch.nn.functional.rms_norm(x, (64,), weight, eps)

    return run


def test_rows_have_ours_first_and_what_follows_from_times():
    ours, peer = _bench([_peer(_norm)]).run(_tiny())
    assert (ours.contestant, ours.ours, ours.status) == ("kimi-ops reference", True, MEASURED)
    assert (peer.contestant, peer.ours, peer.status) == ("peer", False, MEASURED)
    assert ours.us == peer.us == 1000
    assert ours.ratio == peer.ratio == 1
    assert (ours.samples, ours.calls, ours.ceiling) == (5, 1, "copy")
    assert ours.how == peer.how == "a clock that stands still"
    assert ours.gbps == pytest.approx((2 * 1024 + 128) / 1e3 / 1e3)
    # The probe takes a millisecond for its 8,192 bytes.
    assert ours.ceiling_us == pytest.approx(1000 * (2 * 1024 + 128) / 8192)
    assert ours.share == pytest.approx(ours.ceiling_us / 1000)
    assert 0 < ours.error <= 1


def test_a_wrong_result_of_ours_is_not_timed(monkeypatch):
    op = get_op("rms_norm")
    wrong = types.SimpleNamespace(
        unsupported=lambda *args: None, launch=lambda outputs, *args: outputs.fill_(1.5)
    )
    monkeypatch.setitem(op._loaded, "broken", wrong)
    rows = _bench([_peer(_norm)], ("broken",)).run(_tiny())
    assert [row.status for row in rows] == [WRONG]
    assert rows[0].us == 0
    assert "of its budget" in rows[0].reason
    # Beside one that is right, the right one is timed.
    rows = _bench([], ("broken", "reference")).run(_tiny())
    assert [row.status for row in rows] == [WRONG, MEASURED]


def test_a_peer_that_is_wrong_absent_or_declines_says_so():
    def declines(calls):
        raise Declined("weights of 9 GiB")

    absent = _peer(_norm)
    absent.missing = lambda device: "peer is not installed: pip install peer"
    other = _peer(_norm)
    other.OPS = {}
    far = _peer(lambda calls: lambda i: 2 * calls[i][0])
    rows = _bench([far, _peer(declines), absent, other]).run(_tiny())
    reasons = {row.reason: row.status for row in rows if not row.ours}
    assert reasons.pop("weights of 9 GiB") == SKIPPED
    assert reasons.pop("peer is not installed: pip install peer") == SKIPPED
    assert reasons.pop("has no such op") == SKIPPED
    ((reason, status),) = reasons.items()
    assert status == WRONG
    assert "from ours" in reason


def test_a_case_beyond_memory_is_skipped_with_its_size(monkeypatch):
    from kimi_ops.bench import measure

    monkeypatch.setattr(measure, "available_bytes", lambda device: 1000)
    (row,) = _bench().run(_tiny())
    assert row.status == SKIPPED
    assert "GiB" in row.reason


def test_the_cpu_clock_counts_calls_and_rotates():
    seen = []
    sample, calls, how = CpuClock().sampler(seen.append, 3)
    assert how == "wall clock"
    assert seen == [0, 1]
    assert 10 <= calls <= 1000
    assert 0 < sample() < 1e-3
    assert seen[2:6] == [0, 1, 2, 0]
    assert len(seen) == 2 + calls


@pytest.mark.parametrize("op", OPS)
def test_the_check_accepts_the_reference_and_sees_a_planted_error(op):
    """On every ordinary hostile case that is no nuisance to slice: its own results pass; a result
    with one wrong number in its last row does not."""
    contract, checked = get_op(op), 0
    for case in hostile(op):
        args = case.args()
        # Of a part in float32 torch may sum in another order; the cases measured are in bfloat16.
        if case.work > 1 << 19 or "fp32" in case.name or not _sliceable(contract, args):
            continue
        mine = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        outputs = contract.outputs(*mine)
        contract.load("reference").launch(outputs, *mine)
        written = [mine[contract.params.index(name)] for name in contract.mutates]
        results = (*as_tuple(outputs), *written)
        assert oracle.check(contract, args, results) <= 1
        checked += 1
        broken = [r.clone() for r in results]
        target = broken[0]
        if not target.dtype.is_floating_point or not bool(target.isfinite().all()):
            continue
        target.view(-1)[-target.shape[-1] :] += 10 * target.abs().max() + 1
        seen = oracle._PARTS.get(op, oracle._whole)(list(args), tuple(broken))[1][0]
        if torch.equal(seen, oracle._PARTS.get(op, oracle._whole)(list(args), results)[1][0]):
            continue  # the part leaves that element out: other heads
        with pytest.raises(AssertionError):
            oracle.check(contract, args, tuple(broken))
    assert checked


def _sliceable(contract, args):
    """Calls with something in every dimension, whose lengths are those of a benchmark."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    if any(t.numel() == 0 for t in tensors) or contract.why_not("reference", args):
        return False
    named = dict(zip(contract.params, args, strict=True))
    for name in ("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k"):
        if name in named and int(named[name].diff().min()) == 0:
            return False
    if "page_table" not in named:
        return True
    lengths, (pages, page) = named["seq_lens"], named["kv_cache"].shape[:2]
    table = named["page_table"]
    used = torch.arange(table.shape[1]) * page < lengths[:, None]
    fits = int(lengths.max()) <= table.shape[1] * page and int(lengths.min()) > 0
    return fits and bool(((table >= 0) & (table < pages))[used].all())


def test_files_hold_what_was_measured(tmp_path):
    row = Row("rms_norm", "tiny", "kimi-ops cpu", True, 2, MEASURED, us=10.0, read_bytes=1e3)
    run = Run("kimi-ops bench", {"name": "a machine"}, [row])
    run.write_json(tmp_path / "bench.json")
    run.write_csv(tmp_path / "bench.csv")
    assert read_json(tmp_path / "bench.json") == run
    header, line = (tmp_path / "bench.csv").read_text().splitlines()
    found = dict(zip(header.split(","), line.split(","), strict=True))
    assert found["us"] == "10.0"
    assert float(found["gbps"]) == pytest.approx(0.1)
    assert {f.name for f in dataclasses.fields(Row)} <= set(found)
    (tmp_path / "bad.json").write_text(json.dumps({"rows": [{"op": 1}]}))
    for name in ("bad.json", "absent.json"):
        with pytest.raises(ValueError, match=name):
            read_json(tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "softmax"], "unknown op 'softmax'; there are add_rms_norm, int4_linear"),
        (["--cases", "9 tokens"], "no case has '9 tokens' in its name; there are 1 token"),
        (["--device", "tpu"], "the device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["--peers", "nobody"], "unknown peer 'nobody'; there are "),
        (["--backend", "metal"], "unknown backend 'metal'; there are cpu, reference"),
        (
            ["--sections", "guessed"],
            "unknown section 'guessed'; there are measured, modelled, step",
        ),
        (["--threads", "0"], "--threads above 0"),
        (["--compare", "absent.json"], "absent.json"),
    ],
)
def test_a_request_that_cannot_be_carried_out_lists_what_could(capsys, arguments, message):
    assert message in error_of(capsys, "bench", "--op", "rms_norm", *arguments)


def test_the_command_measures_and_writes_its_files(tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    command = ["bench", "--op", "rms_norm", "--cases", "1 token", "--peers", "torch eager",
               "--rounds", "3", "--seconds", "0.1", "--sections", "measured", "step"]  # fmt: skip
    assert main([*command, "--out", str(folder)]) == 0
    assert "rms_norm" in capsys.readouterr().out
    found = read_json(folder / "bench.json")
    assert [row.status for row in found.rows] == [MEASURED, MEASURED]
    assert found.machine["commit"]
    assert "<svg" in (folder / "bench.html").read_text()
    assert (folder / "ratios.svg").read_text().startswith("<svg")
    assert (folder / "bench.md").read_text().count("\n| `rms_norm` |") == 1
    assert (folder / "bench.csv").read_text().count("\nrms_norm,1 token,") == 2
    # Times of microseconds need not agree, but the text says which do.
    assert main([*command, "--compare", str(folder / "bench.json")]) in (0, 1)
    assert "rms_norm" in capsys.readouterr().out


def test_without_a_compiler_nothing_is_modelled_and_that_is_said(capsys, monkeypatch):
    from kimi_ops.bench import command
    from kimi_ops.testing.static.toolchain import MissingToolError

    def modelled_rows(*args, **options):
        raise MissingToolError("Triton is not installed")

    monkeypatch.setattr(command, "modelled_rows", modelled_rows)
    request = ["bench", "--op", "rms_norm", "--cases", "1 token", "--peers", "none",
               "--rounds", "3", "--seconds", "0.1"]  # fmt: skip
    message = error_of(capsys, *request, "--sections", "modelled")
    assert "the modelled section: Triton is not installed" in message
    monkeypatch.setattr(command, "step_rows", lambda run: iter(()))
    assert main(request) == 0
    assert "no modelled section: Triton is not installed" in capsys.readouterr().err


def test_the_list_of_cases_is_the_files(capsys):
    assert main(["bench", "--op", "mla_decode", "moe_sort", "--full", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for op in ("mla_decode", "moe_sort"):
        names = [f"{op}: {case.name}" + " (full)" * case.full for case in cases_of(op, full=True)]
        assert [line for line in lines if line.startswith(f"{op}:")] == names
