"""Tables of tiles: the file and its faults, what a choice may depend on, and the offline search."""

from __future__ import annotations

import argparse
import itertools
import json
import os
from typing import NamedTuple

import pytest
import torch
from cli_calls import error_of

import kimi_ops
from kimi_ops._dispatch import get_op, op_names
from kimi_ops._target import Target, targeting
from kimi_ops.testing.check import bitwise_equal, check_op
from kimi_ops.testing.inputs import CASES as HOSTILE
from kimi_ops.testing.inputs import mla
from kimi_ops.testing.runner import emulated, target_of
from kimi_ops.testing.ways import WAYS, with_way

triton = pytest.importorskip("triton", reason="needs triton: pip install 'triton>=3.4'")
# Decorating under the interpreter would make no compiled kernels.
_INTERPRET = os.environ.pop("TRITON_INTERPRET", None)
from kimi_ops.kernels import _tiles, mla_absorb_query, silu_mul  # noqa: E402
from kimi_ops.tune import clocks, command, search  # noqa: E402
from kimi_ops.tune.cases import CASES, TuneCase, _silu_mul  # noqa: E402
from kimi_ops.tune.clocks import Measured, Modelled, medians  # noqa: E402
from kimi_ops.tune.trials import laid_out, launch, noting, unusable  # noqa: E402

H100 = target_of(90)
CPU = torch.device("cpu")
TUNED = sorted({case.op for case in CASES})
SMALL = TuneCase("silu_mul", _silu_mul, (3, 128), (3, 128), ("bf16-1x1",))
TILE = silu_mul.Tile


def plain(**changes):
    """A sound file with one entry, some of it changed."""
    entry = {
        "choice": "silu_mul",
        "sizes": {"width": 2048, "element_bytes": 2},
        "tile": {"rows": 1, "columns": 512, "warps": 2},
    }
    content = {"format": _tiles.FORMAT, "gpu": vars(H100), "tiles": [entry]}
    for name, value in changes.items():
        (entry if name in entry else content)[name] = value
    return content


def written(tmp_path, content):
    path = tmp_path / "tiles.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# The table in force


def test_environment_names_a_table_that_launches_follow(tmp_path, monkeypatch):
    monkeypatch.setattr(_tiles, "_ENVIRONMENT", [])
    monkeypatch.setenv("KIMI_OPS_TILES", str(written(tmp_path, plain())))
    gate_up = torch.randn(2, 4096).bfloat16()
    y, own = torch.empty(2, 2048).bfloat16(), torch.empty(2, 2048).bfloat16()
    with emulated(arch=90), targeting(H100), noting(execute=True) as launches:
        silu_mul.launch(y, gate_up)
        silu_mul.launch(y[:, :1024].contiguous(), gate_up[:, :2048].contiguous())
        with _tiles.using(None):
            silu_mul.launch(own, gate_up)
    assert [launched.arguments["BLOCK_F"] for launched in launches] == [512, 1024, 1024]
    assert [launched.options["num_warps"] for launched in launches] == [2, 4, 4]
    assert bitwise_equal(y, own)


def test_table_of_another_gpu_is_refused_where_it_has_an_entry(tmp_path):
    table = _tiles.read_table(written(tmp_path, plain()), "FILE")
    choice, own = silu_mul.TILES, TILE(1, 1024, 4)
    with _tiles.using(table):
        with targeting(target_of(80)):
            assert choice.choose(CPU, own, 4096, 2) is own
            with pytest.raises(ValueError, match=r"^FILE is for Target\(.*90.* but this is .*80"):
                choice.choose(CPU, own, 2048, 2)
        with targeting(H100):
            assert choice.choose(CPU, own, 2048, 2) == TILE(1, 512, 2)
        assert choice.choose(torch.device("meta"), own, 2048, 2) is own


BAD = {
    "nothing": ("", "is no JSON"),
    "torn": (json.dumps(plain())[:-30], "is no JSON"),
    "binary": ("\ud800".encode("utf-16", "surrogatepass").decode("latin1") + "{", "is no JSON"),
    "deep": ("[" * 100_000, "is no JSON"),
    "list": ([], "its format is not 'kimi-ops tiles 1'"),
    "later-format": (plain(format="kimi-ops tiles 2"), "its format is not 'kimi-ops tiles 1'"),
    "no-gpu": (plain(gpu=None), "its gpu must have vendor, capability"),
    "gpu-of-text": (plain(gpu={**vars(H100), "capability": "90"}), "its gpu must have vendor"),
    "no-tiles": (plain(tiles={}), "its tiles must be a list"),
    "entry-of-text": (plain(tiles=["rms_norm"]), "entry 0 is damaged: it must have choice"),
    "entry-with-more": (plain(tiles=[{**plain()["tiles"][0], "us": 1}]), "nothing else"),
    "unknown-op": (plain(choice="silu_add"), "no op has a choice of tiles named 'silu_add'"),
    "no-name": (plain(choice=None), "no op has a choice of tiles named None"),
    "path": (plain(choice="../silu_mul"), "no op has a choice of tiles named"),
    "op-without": (plain(choice="moe_sort"), "no op has a choice of tiles named 'moe_sort'"),
    "stage": (plain(choice="silu_mul.wide"), "no op has a choice of tiles named 'silu_mul.wide'"),
    "sizes": (plain(sizes={"columns": 2048}), "the sizes of silu_mul must be width, element_bytes"),
    "zero": (plain(sizes={"width": 0, "element_bytes": 2}), "must be positive integers"),
    "true": (plain(sizes={"width": True, "element_bytes": 2}), "must be positive integers"),
    "no-candidate": (plain(tile={"rows": 1, "columns": 513, "warps": 2}), "is not among the cand"),
    "no-tile": (plain(tile=None), "None is not among the candidates of silu_mul"),
    "twice": (plain(tiles=plain()["tiles"] * 2), "entry 1 repeats silu_mul of the same sizes"),
    "no-power": (
        plain(
            choice="mla_absorb_query",
            sizes={"heads": 64, "columns": 512, "depth": 128, "tokens": 100},
        ),
        "tokens must be a power of two up to 4096",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_damaged_file_is_one_clear_error_at_every_launch(fault, tmp_path, monkeypatch):
    content, message = BAD[fault]
    path = written(tmp_path, content)
    monkeypatch.setattr(_tiles, "_ENVIRONMENT", [])
    monkeypatch.setenv("KIMI_OPS_TILES", str(path))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^KIMI_OPS_TILES: ") as caught:
            silu_mul.TILES.choose(CPU, TILE(1, 1024, 4), 2048, 2)
        assert message in str(caught.value)
        assert str(path) in str(caught.value)


def test_missing_file_is_an_error_too(tmp_path):
    with pytest.raises(ValueError, match="FILE cannot be read: No such file"):
        _tiles.read_table(tmp_path / "none.json", "FILE")


# What a choice depends on


def test_sizes_of_a_batch_are_rounded_up():
    key = mla_absorb_query.TILES.key
    for tokens, rounded in (
        (1, 1),
        (2, 2),
        (3, 4),
        (64, 64),
        (65, 128),
        (4096, 4096),
        (9999, 4096),
    ):
        assert key((64, 512, 128, tokens)) == ("mla_absorb_query", 64, 512, 128, rounded)


@pytest.mark.parametrize("op", TUNED)
def test_choices_without_a_batch_ask_for_the_same_at_every_batch_size(op):
    """Nor is anything of the batch hidden in a size of a row, in batch-invariant mode or not."""
    build, seen = next(case.build for case in CASES if case.op == op), {}
    first = next(case.full for case in CASES if case.op == op)
    for tokens in (1, 3, 64, 66, 4098):
        case = TuneCase(op, build, (tokens, *first[1:]), None, ())
        if op == "patch_merge":
            case = TuneCase(op, build, (1, 2, 2 * tokens), None, ())
        with kimi_ops.batch_invariant():
            _, trial = laid_out(case, H100, {})
        assert trial.asked or (op == "moe_route" and tokens < 5)
        for choice, sizes, tile in trial.asked:
            row = sizes[:-1] if choice.batch else sizes
            assert seen.setdefault(choice.name, (row, tile)) == (row, tile)


@pytest.mark.parametrize("choice", [c for op in TUNED for c in _tiles.choices_of(op)],
                         ids=lambda choice: choice.name)  # fmt: skip
def test_batch_invariant_mode_does_not_look_up_what_depends_on_the_batch(choice):
    sizes = (64,) * len(choice.sizes)
    own, other = object(), object()
    with targeting(H100), _tiles.using(_tiles.Table("", H100, {choice.key(sizes): other})):
        assert choice.choose(CPU, own, *sizes) is other
        with kimi_ops.batch_invariant():
            assert choice.choose(CPU, own, *sizes) is (own if choice.batch else other)


def test_no_table_can_break_batch_invariance():
    """A table of the worst kind: another tile for one token than for seventy."""
    way = next(way for way in WAYS if way.name == "triton[interpreted]")
    heads, widths = 2, (200, 8, 72)  # several steps of either BLOCK_K
    q, w_uk, positions, inv_freq = mla.mla_absorb_query(
        torch.Generator().manual_seed(5), 70, heads, widths=widths
    )
    q, w_uk = q.contiguous() * 30, w_uk.clone()
    q[..., 0], q[..., 150], w_uk[:, 0], w_uk[:, 150] = 2**15, -(2**15), 2**15, 2**15  # cancel
    gpu = target_of(way.arch)
    choice, tiles = mla_absorb_query.TILES, {}
    for power in range(13):
        sizes = heads, 72, 200, 1 << power
        depth = (64, 128)[power % 2]  # so that sums have another order
        tiles[choice.key(sizes)] = next(t for t in choice.candidates(*sizes) if t.depth == depth)
    with (
        with_way("mla_absorb_query", way) as backend,
        kimi_ops.use_backend(f"mla_absorb_query={backend}"),
        _tiles.using(_tiles.Table("", gpu, tiles)),
        kimi_ops.batch_invariant(),
    ):
        whole = kimi_ops.mla_absorb_query(q, w_uk, positions, inv_freq)
        for rows in (slice(0, 1), slice(3, 19)):  # one, and sixteen
            part = kimi_ops.mla_absorb_query(q[rows], w_uk, positions[rows], inv_freq)
            assert bitwise_equal(part, whole[rows])


# Candidates


@pytest.mark.parametrize("op", TUNED)
def test_candidates_are_named_integers_and_the_cases_reach_every_choice(op):
    asked = {}
    for case in (case for case in CASES if case.op == op):
        assert all(check in HOSTILE[op] for check in case.checks)
        launches, trial = laid_out(case, H100, {})
        assert launches
        for choice, sizes, own in trial.asked:
            asked[choice.name] = sizes
            tiles = choice.candidates(*sizes)
            assert len(set(tiles)) == len(tiles) > 1
            for tile in (own, *tiles):
                assert set(map(type, tile._asdict().values())) == {int}
                assert type(tile) is type(own)
    assert set(asked) == {choice.name for choice in _tiles.choices_of(op)}


def _candidates_of(case):
    for choice, sizes, _ in laid_out(case, H100, {})[1].asked:
        for tile in choice.candidates(*sizes):
            yield case.op, case.checks[0], choice.name, tile


def pytest_generate_tests(metafunc):
    if "candidate" in metafunc.fixturenames:
        found = dict.fromkeys(itertools.chain.from_iterable(map(_candidates_of, CASES)))
        if not metafunc.config.getoption("--full"):  # one of each op that is quick
            found = {f[0]: f for f in found if f[0] in ("rms_norm", "silu_mul")}.values()
        metafunc.parametrize("candidate", found, ids=lambda f: f"{f[2]}-{'-'.join(map(str, f[3]))}")


def test_every_candidate_is_right(candidate):
    """What a file may name without having been tried for this GPU; all of them with --full."""
    op, check, name, tile = candidate
    way = next(way for way in WAYS if way.name == "triton[interpreted]")
    with with_way(op, way) as backend, _tiles.trying({name: tile}):
        check_op(op, HOSTILE[op][check].args(), backend)


# The search


class Fake(NamedTuple):
    """A tile of nothing."""

    size: int


class FakeClock:
    """Times by a formula: the smaller, the faster, until 4."""

    name, product, gpu, arch, margin = "modelled", "H100", H100, "sm_90a", 0.1

    def wrong(self, op, check, forced):
        return "result 0 is off" if forced["silu_mul"].warps == 1 else None

    def time(self, case, tiles):
        sizes = [forced["silu_mul"].columns for forced in tiles]
        return ["no model" if size == 256 else float(size) for size in sizes]


def test_search_drops_what_fails_and_keeps_what_is_faster(monkeypatch):
    tiles = [TILE(1, 512, 2), TILE(1, 512, 1), TILE(1, 256, 2), TILE(1, 128, 2), TILE(1, 64, 2)]
    monkeypatch.setattr(silu_mul.TILES, "candidates", lambda *sizes: tuple(tiles))
    monkeypatch.setattr(
        search,
        "unusable",
        lambda launches, arch: "spills" if launches[0].arguments["BLOCK_F"] == 64 else None,
    )
    cases = [TuneCase("silu_mul", _silu_mul, (t, 2048), None, ("x",)) for t in (1, 2)]
    said, saved = [], []
    content = search.search(cases, FakeClock(), said.append, lambda c: saved.append(dict(c)))
    assert saved[-1] == content
    assert content["clock"] == "modelled"
    assert content["made_with"]["triton"] == triton.__version__
    sizes = {"width": 2048, "element_bytes": 2}
    assert content["tiles"] == [
        {"choice": "silu_mul", "sizes": sizes, "tile": {"rows": 1, "columns": 128, "warps": 2}}
    ]
    outcome = {
        (t["tile"]["columns"], t["tile"]["warps"]): t.get("us", t.get("dropped"))
        for t in content["trials"]
    }
    own = {"tokens=1,width=2048": 1024.0, "tokens=2,width=2048": 1024.0}
    assert outcome[1024, 4] == own
    assert outcome[512, 1] == "wrong result: result 0 is off"
    assert outcome[256, 2] == "no model"
    assert outcome[64, 2] == "spills"
    assert any("dropped: spills" in line for line in said)


def test_margin_keeps_the_kernels_own_tile():
    entry = search.Entry(silu_mul.TILES, (2048, 2), Fake(8))
    entry.times = {Fake(8): [10.0, 20.0], Fake(4): [9.3, 18.7]}
    assert entry.best(0.1) == Fake(8)
    assert entry.best(0.02) == Fake(4)
    entry.times = {Fake(4): [1.0], Fake(2): [2.0]}
    assert entry.best(0.1) == Fake(4)  # its own was dropped
    entry.times = {}
    assert entry.best(0.1) == Fake(8)


def test_compilers_drop_what_spills_and_what_they_refuse():
    def reason(tile):
        launches, _ = laid_out(
            TuneCase("silu_mul", _silu_mul, (64, 2048), None, ()), H100, {"silu_mul": tile}
        )
        return unusable(launches, "sm_90a")

    assert reason(TILE(1, 512, 2)) is None
    assert "spills" in reason(TILE(8, 1024, 1))
    assert reason(TILE(1, 1000, 4)).startswith("does not compile: ")


def test_tiles_end_where_the_block_ends():
    run = triton.runtime.jit.JITFunction.run
    with _tiles.trying({"silu_mul": TILE(1, 512, 2)}), noting(execute=False) as launches:
        launch("silu_mul", (torch.empty(2, 64, device="meta"),), torch.empty(2, 32, device="meta"))
    assert launches[0].arguments["BLOCK_F"] == 512
    assert triton.runtime.jit.JITFunction.run is run
    assert silu_mul.TILES.choose(CPU, TILE(1, 1024, 4), 2048, 2) == TILE(1, 1024, 4)


def test_rounds_are_interleaved_and_medians_taken():
    order, now = [], itertools.count()
    calls = [lambda i=i: order.append(i) for i in range(3)]

    def time_one(call):
        call()
        taken = next(now)
        return lambda: 100.0 if taken < 3 else float(order[taken])

    assert medians(calls, 3, time_one) == [0.0, 1.0, 2.0]
    assert order == [0, 1, 2, 2, 1, 0, 0, 1, 2]


def test_measuring_launches_each_tile_on_the_full_case(monkeypatch):
    """All but the events, which need a GPU: launches go to the emulator."""
    clock = object.__new__(Measured)
    clock.device = CPU
    counted = itertools.count(1)

    def one(call):
        call()
        return lambda: float(next(counted))

    monkeypatch.setattr(clock, "_one", one, raising=False)
    monkeypatch.setattr(clocks, "ROUNDS", 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    tiles = [{"silu_mul": TILE(8, 128, 4)}, {"silu_mul": TILE(4, 256, 4)}]
    with emulated(arch=90), noting(execute=True) as launches:
        assert all(us > 0 for us in clock.time(SMALL, tiles))
    assert {launched.arguments["BLOCK_F"] for launched in launches} == {128, 256}


# The command


def args(**changes):
    options = {"op": [], "case": None, "clock": "modelled", "gpu": None, "out": "tiles.json"}
    return argparse.Namespace(**{**options, **changes})


def test_command_tunes_one_small_op_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kimi_ops.tune.cases.CASES", (SMALL,))
    monkeypatch.setenv("KIMI_OPS_TUNE", "1")
    tiles = TILE(4, 128, 2), TILE(1, 128, 1)
    monkeypatch.setattr(silu_mul.TILES, "candidates", lambda *sizes: tiles)
    monkeypatch.setattr(silu_mul, "_WIDE", TILE(1, 8192, 16))  # an own tile that loses
    out = tmp_path / "tiles.json"
    assert command.run(args(op=["silu_mul"], out=str(out))) == 0
    said = capsys.readouterr().out
    assert said.startswith("H100, modelled\n")
    assert " us modelled\n" in said
    assert f"1 tiles differ from the kernels' own: {out}\n" in said

    content = json.loads(out.read_text())
    assert content["clock"] == "modelled"
    assert content["gpu"] == {"product": "H100", **vars(H100)}
    assert content["made_with"]["kimi_ops"] == kimi_ops.__version__
    assert len(content["trials"]) == 3
    (entry,) = content["tiles"]
    table = _tiles.read_table(out, "FILE")
    assert table.gpu == H100
    assert list(table.tiles.values()) == [TILE(**entry["tile"])]
    with targeting(H100), _tiles.using(table):
        assert silu_mul.TILES.choose(CPU, silu_mul._WIDE, 128, 2) in tiles


def test_command_refuses_without_leave(monkeypatch, capsys, tmp_path):
    line = "tune", "--op", "silu_mul", "--clock", "modelled", "--out", tmp_path / "t.json"
    monkeypatch.delenv("KIMI_OPS_TUNE", raising=False)
    assert "set KIMI_OPS_TUNE=1 to let it" in error_of(capsys, *line)
    monkeypatch.setenv("KIMI_OPS_TUNE", "0")
    assert "set KIMI_OPS_TUNE=1 to let it" in error_of(capsys, *line)
    monkeypatch.setenv("KIMI_OPS_TUNE", "yes")
    assert "KIMI_OPS_TUNE must be 0 or 1, got 'yes'" in error_of(capsys, *line)
    assert not (tmp_path / "t.json").exists()


REFUSED = {
    "unknown op 'warp'": {"op": ["warp"]},
    "moe_sort has no tiles to choose yet; those that have: add_rms_norm, ": {"op": ["moe_sort"]},
    "no call is left to tune for": {"case": "tokens=7,"},
    "is no file that can be written": {"out": "/nowhere/tiles.json"},
    "no rates for 'B300'": {"gpu": "B300"},
    "no test runs kernels for sm_120 in the emulator": {"gpu": "RTX 5090"},
    "--gpu is for --clock modelled": {"clock": "measured", "gpu": "H100"},
    "torch sees no GPU to measure on": {"clock": "measured"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_command_refuses_what_it_cannot_do(message, monkeypatch, capsys):
    monkeypatch.setenv("KIMI_OPS_TUNE", "1")
    if "sees no GPU" in message and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    options = {"clock": "modelled", "out": "t.json", **REFUSED[message]}
    words = [w for n, v in options.items() for w in (f"--{n}", *(v if n == "op" else [v]))]
    assert message in error_of(capsys, "tune", *words)


def test_ops_with_choices_are_those_with_cases():
    assert [op for op in op_names() if _tiles.choices_of(op)] == TUNED
    assert {get_op(op).name for op in TUNED} == set(TUNED)
    assert Modelled("a100").gpu == target_of(80)
    assert Target(**vars(H100)) == H100
