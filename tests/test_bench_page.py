"""How results of the benchmark suite are shown: the page, the plots, the tables, two runs."""

from __future__ import annotations

import dataclasses
import io
import itertools
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from rich.console import Console

from kimi_ops.bench import plots, svg
from kimi_ops.bench.cells import DASH, ceilings, contests, ops_of, time_text
from kimi_ops.bench.page import page, readme_plot
from kimi_ops.bench.record import MEASURED, SKIPPED, WRONG, Row, Run
from kimi_ops.bench.table import compared, markdown, terminal
from kimi_ops.testing.cost.report import LABEL

VOID = {"meta", "link", "br", "hr", "img", "input"}
MACHINE = {
    "name": "a machine",
    "commit": "0123abc",
    "cache_bytes": 32 << 20,
    "time": "2026-12-01T06:00:00+00:00",
    "clock": "2700 MHz now",
    "versions": {"torch": "2.13.0", "triton": "3.5.0"},
    "ceilings": {"2": {"read": 84e9, "copy": 5e10, "bfloat16 product": 1.1e12}},
}
HOSTILE = 'a < b & "c" > d | _e_ [f] `g` \\h'
KERNEL = {"name": "k_kernel", "low_us": 3.25, "up_us": 4.5, "bound": "dram", "notes": ["a note"]}


def measured(op, case, contestant, us, *, ours=False, threads=2, ratio=1.0, **more):
    """A row of a case that reads 1 MB, or as ``more`` has it."""
    found = {"read_bytes": 1e6, "ceiling": "read", "ceiling_us": us / 2, "error": 0.25} | more
    return Row(op, case, contestant, ours, threads, MEASURED, us=us, p10_us=0.9 * us,
               p90_us=1.2 * us, samples=9, calls=2, ratio=ratio, **found)  # fmt: skip


def series(op, sizes, *, threads=2, flops=0.0):
    """Cases of a series, two contestants each, in ratio 1 to 2.5."""
    for size in sizes:
        named = {"series": "a series", "size": size, "unit": "tokens", "threads": threads}
        named |= {"read_bytes": 1e4 * size + 1e6, "flops": flops * size}
        if flops:
            named |= {"ceiling": "bfloat16 product"}
        for name, us, ours in (("kimi-ops cpu", 12.0, True), ("torch eager", 30.0, False)):
            yield measured(op, f"{size:,} tokens", name, us * size, ours=ours,
                           ratio=us / 12, **named)  # fmt: skip


def full_run():
    """Of everything something."""
    rows = [
        *series("rms_norm", (1, 64, 4096)),
        *series("rms_norm", (1, 64), threads=1),
        *series("mla_prefill", (512, 2048), flops=1e7),
        measured("silu_mul", HOSTILE, "kimi-ops cpu", 7.5, ours=True),
        measured("silu_mul", HOSTILE, HOSTILE, 6.0, ratio=0.8),
        measured("silu_mul", HOSTILE, "another", 1234.5, ratio=164.6),
        Row("silu_mul", HOSTILE, "faulty", False, 2, WRONG, f"its result is {HOSTILE}"),
        Row("silu_mul", HOSTILE, "absent", False, 2, SKIPPED, "not installed"),
        Row("moe_sort", "too large", "kimi-ops cpu", True, 2, SKIPPED, "wants 31 GiB"),
    ]
    modelled = [
        {"op": "mla_decode", "case": HOSTILE, "backend": "triton", "device": "H100", "low_us": 3.25,
         "up_us": 4.5, "floor_us": 2.75, "reason": "", "kernels": [KERNEL]},
        {"op": "mla_decode", "case": "refused", "device": "A100", "reason": "fp8 needs sm_89"},
        {"op": "mla_decode"},
    ]  # fmt: skip
    step = {"step": "decode", "device": "H100", "part": "MoE layers", "source": "modelled"}
    steps = [
        step | {"op": f"op {i}", "calls": 60, "low_us": 2.0**i, "up_us": 300.0, "floor_us": 1.0,
                "measured_us": 9.0 if i == 3 else None}
        for i in range(9)
    ]  # fmt: skip
    steps.append(step | {"op": "total", "low_us": 511.0, "measured_us": 9.0})
    return Run("kimi-ops bench --out 'a <b>'", MACHINE, rows, modelled, steps)


RUNS = {
    "full": full_run(),
    "empty": Run("", {}),
    "wrong and skipped": Run(
        "c", MACHINE, [r for r in full_run().rows if r.status in (WRONG, SKIPPED)]
    ),
    "peers alone": Run("c", MACHINE, [measured("silu_mul", "case", "torch eager", 3.0)]),
    "ours alone": Run("c", {"name": 7}, [measured("o", "c", "kimi-ops cpu", 3.0, ours=True)]),
    "a GPU": Run("c", MACHINE, list(series("mla_prefill", (1, 8), threads=0, flops=1e9))),
    "modelled alone": dataclasses.replace(full_run(), rows=[]),
}


class Reader(HTMLParser):
    """Tags, attributes and text; every tag must be closed in turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.texts, self.ids, self.cells = [], [], [], [], []
        self.modelled = None  # the text of that section
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.cells.append("")
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        tags = [tag for tag, _ in self.open]
        if "style" not in tags:
            self.texts.append(data)
        if "td" in tags or "th" in tags:
            self.cells[-1] += data
        if any(attrs.get("class") == "modelled" for _, attrs in self.open):
            self.modelled = (self.modelled or "") + data

    @property
    def text(self):
        return "\n".join(self.texts)


def rendered(found, width=200):
    text = io.StringIO()
    Console(file=text, width=width, color_system=None).print(found)
    return text.getvalue()


@pytest.mark.parametrize("name", RUNS)
def test_page_is_balanced_and_complete(name):
    run = RUNS[name]
    text = page(run)
    found = Reader(text)
    assert text.startswith("<!doctype html>")
    assert len(found.ids) == len(set(found.ids))
    for row in run.rows:
        assert row.op in found.text
        assert row.case in found.text
        assert row.contestant in found.text
        assert row.reason in found.text
    assert (found.modelled is not None) == bool(run.modelled or run.steps)
    if found.modelled:
        assert LABEL in found.modelled
    for target in [v for tag, n, v in found.attributes if (tag, n) == ("a", "href")]:
        assert target.startswith("#")
        assert target[1:] in found.ids


@pytest.mark.parametrize("name", RUNS)
def test_page_needs_nothing_else(name):
    text = page(RUNS[name])
    found = Reader(text)
    assert not re.search(r"https?:|url\(|@import|@font-face|<script|<link|<iframe|<img", text)
    for tag, attribute, value in found.attributes:
        assert attribute not in ("src", "srcset", "data", "xlink:href"), (tag, value)


ROWS = [  # contestant, median, spread, GB/s, TFLOP/s, share, ratio, error
    "kimi-ops cpu|7.50 µs|6.75-9.00 µs|133|-|50 % of read|1.00x|25 % tol.",
    f"{HOSTILE}|6.00 µs|5.40-7.20 µs|167|-|50 % of read|0.800x|2.5e-01",
    "another|1.23 ms|1.11-1.48 ms|0.810|-|50 % of read|165x|2.5e-01",
    "kimi-ops cpu|6.14 ms|5.53-7.37 ms|0.996|0.833|50 % of bfloat16 product|1.00x|25 % tol.",
]


def test_numbers_of_the_page_are_those_of_the_rows():
    run = full_run()
    cells = Reader(page(run)).cells
    lines = ["|".join(cells[i : i + 8]).replace(DASH, "-") for i in range(len(cells))]
    for wanted in ROWS:
        assert lines.count(wanted) == 1, wanted
    for row in run.rows:
        if row.status == MEASURED:
            assert any(line.startswith(f"{row.contestant}|{time_text(row.us)}|") for line in lines)
    faulty = lines.index(next(line for line in lines if line.startswith("faulty|")))
    assert cells[faulty + 1] == f"wrong: its result is {HOSTILE}"


def test_ceilings_are_those_of_the_rows_or_what_the_run_found_at_first():
    cells = Reader(page(full_run())).cells
    at = cells.index("2 threads")
    # Medians: of 1.71, 4.27, 168, 267 GB/s; of what no case is bound by; of two equal ones.
    assert cells[at + 1 : at + 4] == ["86.3 GB/s", "50.0 GB/s", "1.67 TFLOP/s"]


def test_steps_have_shares_and_what_was_measured_stands_apart():
    found = Reader(page(full_run()))
    assert "op 8 50%" in found.modelled
    assert "511 µs" in found.modelled
    assert "op 8: 256 µs, 50.1% of decode, H100" in found.modelled
    assert "1 of 9 kinds of calls were" in found.text
    assert "were; shares are of these alone" not in found.modelled
    assert page(full_run()).count('class="bar rest"') == 2  # of op 0 to 2, and in the legend


def test_colours_tell_contestants_of_an_op_apart():
    rows = [measured("o", "c", "kimi-ops cpu", 1.0, ours=True)]
    rows += [measured(f"o{i // 4}", "c", f"peer {i}", 1.0) for i in range(12)]
    rows += [measured(f"o{i}", "c", "kimi-ops cpu", 1.0, ours=True) for i in range(3)]
    found = plots.colours(Run("", {}, rows))
    assert found["kimi-ops cpu"] == "c0"
    for op in range(3):
        names = [f"peer {i}" for i in range(4 * op, 4 * op + 4)]
        assert len({found[n] for n in names} - {"c0"}) == 4


def test_modelled_figures_stand_in_their_section_alone():
    found = Reader(page(full_run()))
    for text in ("3.25 to 4.50 µs, by dram", "fp8 needs sm_89", "H100: a note", "2.75"):
        assert text in found.modelled
        assert found.text.replace("\n", "").count(text) == found.modelled.count(text), text
    assert DASH in found.modelled  # what a row lacks


def test_plots_say_in_words_what_they_show():
    """Every picture has a title and a description, every mark of a measurement a tooltip."""
    root = ElementTree.fromstring(readme_plot(full_run()))
    space = {"s": "http://www.w3.org/2000/svg"}
    assert root.find("s:title", space).text
    assert root.find("s:desc", space).text
    tooltips = [c.find("s:title", space).text for c in root.findall("s:circle", space)]
    assert len(tooltips) == len({c for c in contests(full_run().rows) if c.best_peer}) - 2
    assert any("torch eager" in t and "30.0 µs" in t for t in tooltips)
    for run in RUNS.values():
        text = page(run)
        assert text.count("<svg") == text.count("<desc>") == text.count('role="img"')


def test_readme_plot_stands_alone():
    for run in RUNS.values():
        text = readme_plot(run)
        ElementTree.fromstring(text)
        assert "var(" not in text
        assert "prefers-color-scheme: dark" in text
        assert len(re.findall("http", text)) == 1  # the name space


def test_nothing_of_a_plot_leaves_its_frame():
    run = full_run()
    found = [plots.ratios_by_op(run), plots.roofline(run, 2), plots.streams(run, 2)]
    classes = plots.colours(run)
    for op in ops_of(run.rows):
        mine = [c for c in contests(run.rows) if c.op == op and c.threads == 2]
        found.append(plots.ratio_bars(mine, classes))
        rows = [r for c in mine for r in c.measured]
        if rows:
            limits = ceilings(run, 2)
            found += [plots.against_size(rows, limits, classes, which) for which in (True, False)]
    drawn = [f for f in found if f is not None]
    assert len(drawn) == 9
    for picture in drawn:
        width, height = (float(picture.get(name)) for name in ("width", "height"))
        for text in picture.iter("text"):
            wide = svg.text_width(text.text) if "transform" not in text.attrib else 0
            classes_of = text.get("class").split()
            left = float(text.get("x")) - wide * (
                1 if "end" in classes_of else 0.5 if "middle" in classes_of else 0
            )
            assert left >= -1, text.text
            assert left + wide <= width + 12, text.text
            assert 0 <= float(text.get("y")) <= height, text.text
        for mark in picture.iter("circle"):
            assert 0 <= float(mark.get("cx")) <= width
            assert 0 <= float(mark.get("cy")) <= height
        for mark in picture.iter("rect"):
            assert float(mark.get("x")) >= 0
            assert float(mark.get("x")) + float(mark.get("width")) <= width


def test_labels_keep_apart():
    heights = svg.apart([10.0, 11.0, 12.0, 90.0], 15, 0, 100)
    assert sorted(heights) == heights
    assert all(b - a >= 15 for a, b in itertools.pairwise(heights))
    low = svg.apart([98.0, 99.0], 15, 0, 100)
    assert max(low) <= 100
    assert abs(low[1] - low[0]) >= 15


def test_scales_have_round_ticks():
    assert svg.Scale(0, 97, 0, 1).ticks() == [0, 25, 50, 75]
    assert svg.Scale(0.5, 12, 0, 1, log=True).ticks() == [0.5, 1, 2, 5, 10]
    assert svg.Scale(1e-3, 1e4, 0, 1, log=True).ticks()[::3] == [1e-3, 1, 1e3]


@pytest.mark.parametrize("width", [80, 200])
def test_terminal_shows_ours_first_and_every_reason(width):
    text = rendered(terminal(full_run()), width)
    for wanted in ("12.0 µs", "30.0 µs", "2.50x", "25 % tol.", "164 GB/s", "wants 31 GiB"):
        assert (wanted in text) != (wanted == "164 GB/s")
    assert text.index("kimi-ops cpu") < text.index("torch eager")
    flat = " ".join(text.split())
    assert "skipped: absent: not installed" in flat
    assert f"wrong: faulty: its result is {HOSTILE}" in flat
    assert max(map(len, text.splitlines())) <= width


def test_terminal_says_that_there_is_nothing():
    assert rendered(terminal(RUNS["empty"])).strip() == "no rows"


def test_markdown_has_a_row_for_each_case():
    run = full_run()
    lines = markdown(run).splitlines()
    assert len(lines) == 2 + len(contests(run.rows))
    assert "| `rms_norm` | 1 tokens, 2 threads | 12.0 µs | 50 % of read | torch eager |" in lines[2]
    assert lines[2].endswith("| 30.0 µs | 2.50x |")
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 8 for line in lines)
    assert any("| skipped " + f"| {DASH} " * 4 + "|" in line for line in lines)
    assert markdown(run, ["moe_sort"]).count("\n") == 3


def changed(run, factor, **which):
    """The same run, the times of some rows multiplied."""
    rows = [
        dataclasses.replace(r, us=r.us * factor)
        if r.status == MEASURED and all(getattr(r, k) == v for k, v in which.items())
        else r
        for r in run.rows
    ]
    return dataclasses.replace(run, rows=rows)


def test_runs_that_are_alike_agree():
    old = full_run()
    text, agree = compared(old, changed(old, 1.09))
    assert agree
    assert "The runs agree." in text
    assert "the same machine, versions and commit" in text
    assert "compute-bound: 0 of 4 differ by more than 10%" in text
    assert "memory-bound: 0 of 13 differ by more than 10%" in text


@pytest.mark.parametrize("factor", [1.2, 0.8])
def test_medians_that_differ_are_listed_by_what_binds_them(factor):
    old = full_run()
    text, agree = compared(old, changed(old, factor, op="mla_prefill", size=512))
    assert not agree
    assert "compute-bound: 2 of 4 differ by more than 10%" in text
    assert "memory-bound: 0 of 13" in text
    assert "  mla_prefill, 512 tokens, 2 threads, torch eager: 15.4 ms then," in text
    assert "do NOT agree" in text


def test_machines_and_rows_that_differ_are_said():
    old = full_run()
    slow = {**MACHINE["ceilings"]["2"], "copy": 3e10}
    machine = {**MACHINE, "commit": "fffffff", "time": "later", "ceilings": {"2": slow}}
    new = dataclasses.replace(old, machine=machine, rows=old.rows[1:])
    text, agree = compared(old, new)
    assert agree
    assert "commit: 0123abc then, fffffff now" in text
    assert "later" not in text
    assert "the ceiling itself, copy at 2 threads: 50.0 GB/s then, 30.0 GB/s now" in text
    assert "measured then alone: rms_norm, 1 tokens, 2 threads, kimi-ops cpu" in text


def test_a_result_that_became_wrong_is_no_agreement():
    old = full_run()
    rows = [dataclasses.replace(old.rows[0], status=WRONG, reason="r"), *old.rows[1:]]
    text, agree = compared(old, dataclasses.replace(old, rows=rows))
    assert not agree
    assert "kimi-ops cpu: measured then, wrong now" in text


def test_runs_without_a_common_row_do_not_agree():
    text, agree = compared(full_run(), RUNS["empty"])
    assert not agree
    assert "nothing in common" in text
