"""The sections of the benchmark that need no GPU: modelled kernels, and steps of the model."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

pytest.importorskip("triton", reason="needs triton: pip install 'triton>=3.4'")

import kimi_ops
from kimi_ops.bench import case as bench_case
from kimi_ops.bench import modelled, sampled, step
from kimi_ops.bench.record import MEASURED, Row, Run
from kimi_ops.bench.step_calls import DENSE, MOE, STEPS, VISION, calls_of, traffic, work_of
from kimi_ops.testing.cost import RATES
from kimi_ops.testing.cost.report import LABEL
from kimi_ops.testing.ptx import UnsupportedPtx

DECODE_1, DECODE_64, PREFILL = STEPS


def printed(show, *args):
    text = io.StringIO()
    show(*args, console=Console(file=text, width=200))
    return text.getvalue()


@pytest.fixture(scope="module")
def norm():
    """A cheap op on one GPU, executed."""
    (row,) = modelled.modelled_rows(["rms_norm"], ["A100"], backends=["triton"])
    return row


@pytest.fixture(scope="module")
def steps():
    return list(step.step_rows(devices=["H100", "B200"]))


def of(rows, case, device="H100"):
    return [r for r in rows if (r["step"], r["device"]) == (case.title, device)]


def test_a_row_has_figures_of_each_kernel(norm):
    assert norm == json.loads(json.dumps(norm))
    assert (norm["op"], norm["backend"], norm["device"]) == ("rms_norm", "triton", "A100")
    assert norm["reason"] == ""
    (kernel,) = norm["kernels"]
    assert kernel["name"] == "rms_norm_kernel"
    assert (norm["low_us"], norm["up_us"]) == (kernel["low_us"], kernel["up_us"])
    assert 0 < norm["floor_us"] <= norm["low_us"] <= norm["up_us"]
    assert kernel["resources"][kernel["bound"]] == kernel["low_us"]
    assert {"dram", "l2", "shared", "tensor", "issue", "latency", "launch"} <= set(
        kernel["resources"]
    )
    assert norm["launches"] == kernel["launches"] == 1
    assert kernel["dram_bytes"] == norm["bytes"]


def test_a_sample_stands_for_the_whole_grid(monkeypatch):
    """64 rows, one a CTA: 8 of them executed, and all."""
    case = sampled.cases_of("rms_norm", full=True)[1]
    args = sampled.arguments_of(case)

    def row():
        launched = sampled.executed(case, args, "triton", RATES["A100"])
        return modelled._row(case, "triton", RATES["A100"], launched)

    part = row()
    monkeypatch.setattr(sampled, "_CTAS", 64)
    whole = row()
    assert (part["kernels"][0]["ctas"], part["kernels"][0]["sampled_ctas"]) == (64, 8)
    assert (whole["kernels"][0]["ctas"], whole["kernels"][0]["sampled_ctas"]) == (64, 64)
    for name in ("low_us", "up_us"):
        assert part[name] == pytest.approx(whole[name], rel=0.02)


@pytest.mark.parametrize("language", ["triton", "cuda"])
def test_blocks_with_tokens_are_counted_right(monkeypatch, language):
    """All CTAs of a small expert layer executed: as many had something to do as were foretold."""
    tokens, d, experts, width = 12, 512, 24, 256

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    weights = [
        meta(experts, *shape, dtype=dtype)
        for rows, k in ((2 * width, d), (d, width))
        for shape, dtype in (((rows, k // 8), torch.int32), ((rows, k // 32), torch.bfloat16))
    ]
    chosen = meta(tokens, 8, dtype=torch.float32), meta(tokens, 8, dtype=torch.int32)
    dense = meta(2 * width, d), meta(d, width)
    args = (meta(tokens, d), *weights, *chosen, *dense, None)
    small = sampled.Case("moe_experts_int4", "small", args, full=True)
    monkeypatch.setattr(sampled, "_SAMPLES", {"_gate_up_": 1 << 20, "_down_": 1 << 20})
    monkeypatch.setattr(sampled, "_IDLE", 1 / 4)  # blocks with tokens are short at these widths
    launched = sampled.executed(small, sampled.arguments_of(small), language, RATES["A100"])
    assert len(launched) == 4
    for product in launched[1:3]:
        (chosen, count), (shared, number) = product.parts
        assert (chosen.ctas, shared.ctas) == (count, number)


def test_every_op_has_cases_and_one_of_them_is_ordinary():
    for op in kimi_ops.op_names():
        cases = sampled.cases_of(op, full=True)
        assert cases, op
        assert [case.full for case in cases] == [False, *([True] * (len(cases) - 1))]
        assert [case.name for case in sampled.cases_of(op)] == [cases[0].name]
    assert len(sampled.cases_of("moe_experts_int4", full=True)) == 3


@pytest.mark.parametrize("op", kimi_ops.op_names())
def test_floors_are_those_of_the_measured_cases(op):
    case = sampled.cases_of(op)[0]
    theirs = bench_case.cases_of(op)[0].work(*sampled.arguments_of(case))
    mine = work_of(op, case.args)
    assert mine.bytes == pytest.approx(theirs.bytes, rel=0.03, abs=4096)
    assert mine.flops == pytest.approx(theirs.flops, rel=0.01)
    assert sum(traffic(op, case.args).values()) == pytest.approx(mine.bytes)


def test_a_reason_comes_without_figures(monkeypatch):
    def fails(*args):
        raise UnsupportedPtx("tcgen05.mma is not implemented", "line 7")

    monkeypatch.setattr(modelled, "executed", fails)
    rows = list(modelled.modelled_rows(["rms_norm"], full=True))
    assert {row["device"] for row in rows} == set(RATES)
    for row in rows:
        assert row["reason"] == "tcgen05.mma is not implemented"
        assert row["kernels"] == []
        assert row["low_us"] is row["up_us"] is row["launches"] is None
    text = printed(modelled.print_modelled, rows)
    assert "tcgen05.mma is not implemented" in text
    assert LABEL in text


def test_an_ordinary_run_says_which_gpus_it_leaves_out(monkeypatch):
    monkeypatch.setattr(modelled, "executed", lambda *args: [])
    rows = list(modelled.modelled_rows(["rms_norm"]))
    left_out = {row["device"] for row in rows if "--full" in row["reason"]}
    assert left_out == set(RATES) - set(modelled.ORDINARY)


def test_unknown_names_are_refused_at_once():
    for call in (modelled.modelled_rows, step.step_rows, modelled.sources_table):
        with pytest.raises(ValueError, match=r"no rates for 'V100'; there are A100, H100, H200"):
            call(devices=["V100"])
    with pytest.raises(ValueError, match="rms_nrom"):
        modelled.modelled_rows(["rms_nrom"])
    with pytest.raises(ValueError, match="no GPU backend 'cpu'; there are triton, cuda"):
        modelled.modelled_rows(backends=["cpu"])


def test_every_print_says_modelled(norm, steps):
    text = printed(modelled.print_modelled, [norm])
    assert text.count(LABEL) == 1
    text = printed(step.print_steps, steps)
    assert text.count(LABEL) == 2 * len(STEPS)  # rows and totals of each
    text = printed(lambda console: console.print(modelled.sources_table()))
    assert text.count(LABEL) == 1
    for rates in RATES.values():
        for figure in rates.figures().values():
            assert figure.kind in text
            assert figure.source[:12] in text  # brackets are no markup


def test_totals_are_sums_of_their_rows(steps):
    for case in STEPS:
        for device in ("H100", "B200"):
            *rows, total = of(steps, case, device)
            assert total["op"] == step.TOTAL
            for name in ("calls", "launches", "bytes", "flops", "floor_us", "low_us", "up_us"):
                assert total[name] == pytest.approx(sum(row[name] for row in rows))
            assert total["source"] == f"0 of {len(rows)} rows modelled"
            assert total["measured_us"] is None
    assert steps == json.loads(json.dumps(steps))


@pytest.mark.parametrize("decode", [DECODE_1, DECODE_64], ids=lambda decode: decode.name)
def test_a_moe_layer_has_at_most_14_launches(decode, steps):
    rows = [row for row in of(steps, decode) if row["part"] == MOE]
    assert sum(row["launches"] for row in rows) <= 14 * 60
    assert all(row["launches"] % 60 == 0 for row in rows)


def test_calls_follow_from_the_config():
    """Of 61 layers one is dense; each attends once, and normalises twice."""
    for case in STEPS:
        counts = {}
        for call in calls_of(case):
            key = call.op, call.part
            counts[key] = counts.get(key, 0) + call.count
        assert counts["mla_latent_write", MOE] == counts["moe_experts_int4", MOE] == 60
        assert counts["mla_latent_write", DENSE] == counts["silu_mul", DENSE] == 1
        assert sum(n for (op, _), n in counts.items() if op.endswith("rms_norm")) == 2 * 61 + 1
        assert counts.get(("vision_attention", VISION), 0) == 27 * (case is PREFILL)
    assert not [call for call in calls_of(DECODE_1) if call.part == VISION]


def test_modelled_and_measured_rows_are_found_by_size(norm):
    (call,) = (c for c in calls_of(DECODE_1) if c.op == "rms_norm")
    work = call.work
    fields = {"read_bytes": work.read, "written_bytes": work.written, "us": 3.0}
    right = Row("rms_norm", "1 token", "kimi-ops cpu", True, 2, MEASURED, **fields)
    larger = Row("rms_norm", "9 tokens", "kimi-ops cpu", True, 2, MEASURED,
                 **{**fields, "read_bytes": 9 * work.read, "us": 1.0})  # fmt: skip
    peer = Row("rms_norm", "1 token", "torch", False, 2, MEASURED, **{**fields, "us": 1.0})
    run = Run("", {}, rows=[larger, peer, right], modelled=[norm])
    *rows, total = step.step_rows(run, ["A100"], steps=[DECODE_1])
    (row,) = (r for r in rows if r["op"] == "rms_norm")
    assert (row["source"], row["low_us"], row["up_us"]) == (
        "modelled", norm["low_us"], norm["up_us"],
    )  # fmt: skip
    assert (row["measured_us"], row["measured_by"]) == (3.0, "kimi-ops cpu, 2 threads")
    assert total["measured_us"] == 3.0
    assert total["source"] == f"1 of {len(rows)} rows modelled"


def test_several_ops_in_processes_are_those_one_by_one():
    names, options = ["moe_sort", "silu_mul"], {"devices": ["A100"], "backends": ["triton"]}
    together = list(modelled.modelled_rows(names, **options))
    alone = [row for name in names for row in modelled.modelled_rows([name], **options)]
    assert [row["op"] for row in together] == names
    assert together == alone
