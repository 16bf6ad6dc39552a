"""`kimi-ops eval`: counting is right, figures are complete, and refusals are one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_calls import error_of, usage_error_of

import kimi_ops
from kimi_ops._backends import has_kernel
from kimi_ops.cli import main
from kimi_ops.evaluate.answers import answered
from kimi_ops.evaluate.router import router_load, to_json
from kimi_ops.evaluate.scores import wilson_interval
from kimi_ops.model.conversation import PromptBuilder
from kimi_ops.model.errors import KimiError
from kimi_ops.model.generate import Generation
from kimi_ops.model.kimi import KimiK25
from kimi_ops.model.make_checkpoint import make_checkpoint, tiny_config
from kimi_ops.model.random_files import random_checkpoint_files, small_files
from kimi_ops.tasks import TASKS, make_sample
from kimi_ops.train.examples import Encoder

ROOT = Path(__file__).parents[1]
ROWS = [*TASKS]
ROWS.insert(ROWS.index("tool calls") + 1, "tool calls, well formed")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint that is marked as random, not to be changed."""
    directory = tmp_path_factory.mktemp("eval") / "tiny"
    config = tiny_config()
    make_checkpoint(directory, config, tokenizer_files=random_checkpoint_files(config))
    return directory


@pytest.fixture(scope="module")
def unmarked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with float experts and without the mark, as training writes it."""
    directory = tmp_path_factory.mktemp("eval") / "unmarked"
    config = tiny_config(quantized=False)
    make_checkpoint(directory, config, tokenizer_files=small_files(config))
    return directory


def evaluate(tiny: Path, *argv: object) -> int:
    return main(["eval", str(tiny), *map(str, argv)])


def limit_answers(monkeypatch: pytest.MonkeyPatch, tokens: int) -> list[int]:
    """Ends every answer early; returns the numbers of prompts of the calls, as they come."""
    original, calls = KimiK25.generate, []

    def generate(self: KimiK25, prompts: Any, **options: Any) -> Generation:
        calls.append(len(prompts))
        assert options["max_new_tokens"] == 96
        return original(self, prompts, **{**options, "max_new_tokens": tokens})

    monkeypatch.setattr(KimiK25, "generate", generate)
    return calls


def speak(
    monkeypatch: pytest.MonkeyPatch,
    tiny: Path,
    tasks: list[str],
    samples: int,
    wrong: dict[int, str],
    *,
    seed: int = 0,
) -> list[int]:
    """Makes the model write the right answers of the tasks' samples, asked in this order.

    Args:
        wrong: what it writes instead, by the number of the sample modulo 4.

    Returns:
        the numbers of prompts of the calls, as they come.
    """
    encoder, calls = Encoder(PromptBuilder(tiny)), []
    tokenizer = encoder.builder.tokenizer

    def outputs() -> Iterator[tuple[list[int], list[int]]]:
        for task in tasks:
            for number in range(samples):
                sample = make_sample(task, "held-out", number, seed=seed)
                prompt, example = encoder.prompt(sample), encoder(sample)
                tokens = [*example.ids.tolist(), int(example.targets[-1])][len(prompt.ids) :]
                assert tokens.pop() == tokenizer.im_end_id
                if number % 4 in wrong:
                    tokens = tokenizer.encode(wrong[number % 4])
                yield prompt.ids, tokens

    following = outputs()

    def generate(self: KimiK25, prompts: Any, **options: Any) -> Generation:
        calls.append(len(prompts))
        assert set(options["stop_ids"]) == set(tokenizer.stop_ids)
        assert options["sampling"].temperature == 0
        found = []
        for given in prompts:
            prompt, tokens = next(following)
            assert given == prompt
            found.append(tokens)
        return Generation(found, ["stop"] * len(found), 0)

    monkeypatch.setattr(KimiK25, "generate", generate)
    return calls


# Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, method 3.
@pytest.mark.parametrize(
    ("right", "samples", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 1 - 0.1611, 1.0),
    ],
)
def test_wilson_interval_has_the_published_values(right, samples, low, high):
    assert wilson_interval(right, samples) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_is_that_of_scipy_and_within_bounds():
    stats = pytest.importorskip("scipy.stats")
    for samples in (1, 2, 7, 200, 100_000):
        for right in {0, 1, samples // 3, samples - 1, samples}:
            low, high = wilson_interval(right, samples)
            assert 0 <= low <= right / samples <= high <= 1
            expected = stats.binomtest(right, samples).proportion_ci(0.95, method="wilson")
            assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    for right, samples in ((0, 0), (-1, 4), (5, 4)):
        with pytest.raises(KimiError, match="must be"):
            wilson_interval(right, samples)


def test_table_and_json_of_a_random_checkpoint(tiny, tmp_path, capsys, monkeypatch):
    limit_answers(monkeypatch, 6)
    out = tmp_path / "figures.json"
    assert evaluate(tiny, "--samples", 2, "--seed", 5, "--out", out, "--dtype", "fp32") == 0
    text, err = capsys.readouterr()
    assert err == f"kimi-ops: the weights in {tiny} are random, so the answers are noise\n"
    lines = [line for line in text.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    assert [row[:5] for row in cells[: len(ROWS)]] == [
        [name, "2", "0", "0.0 %", "0.0 .. 65.8 %"] for name in ROWS
    ]
    seconds = [row[5] for row in cells[: len(ROWS)]]
    assert all(float(x) >= 0 for x in seconds if x)
    assert seconds.count("") == 1
    found = json.loads(out.read_text())
    assert {name: found[name] for name in found if name not in ("rows", "router")} == {
        "checkpoint": str(tiny),
        "random_weights": True,
        "dtype": "fp32",
        "device": "cpu",
        "backend": "auto",
        "execute": None,
        "seed": 5,
        "samples": 2,
        "versions": {"torch": torch.__version__, "kimi-ops": kimi_ops.__version__},
    }
    assert [row["task"] for row in found["rows"]] == ROWS
    for row in found["rows"]:
        assert (row["samples"], row["right"], row["accuracy"]) == (2, 0, 0)
        assert row["interval"] == list(wilson_interval(0, 2))
    assert [layer["layer"] for layer in found["router"]] == [1, 2]  # layer 0 is dense
    for layer, row in zip(found["router"], cells[len(ROWS) :], strict=True):
        assert 0 <= layer["least"] < 1 < layer["largest"] <= 16 / 4
        assert row == [str(layer["layer"]), f"{layer['least']:.2f}", f"{layer['largest']:.2f}"]


def test_the_model_s_own_answers_are_all_right(unmarked, tmp_path, capsys, monkeypatch):
    samples, out = 36, tmp_path / "figures.json"
    calls = speak(monkeypatch, unmarked, [*TASKS], samples, {})
    assert evaluate(unmarked, "--samples", samples, "--out", out, "--show", 9) == 0
    text, err = capsys.readouterr()
    assert err == ""
    assert "wrong answers" not in text
    assert text.count("100.0 %") == len(ROWS) * 2  # accuracy, and the end of its interval
    found = json.loads(out.read_text())
    assert found["random_weights"] is False
    assert [(row["task"], row["right"]) for row in found["rows"]] == [(n, samples) for n in ROWS]
    assert calls == [32, 4] * len(TASKS)  # bounded, whatever the number of samples


def test_one_in_four_wrong_is_three_quarters_right(tiny, tmp_path, capsys, monkeypatch):
    """In each way an answer can be wrong: other words, and words where a call was asked for."""
    out = tmp_path / "figures.json"
    speak(monkeypatch, tiny, ["scenes", "tool calls"], 20, {2: "a \x1b[31mgreen herring"}, seed=9)
    argv = ["--task", "scenes", "tool calls", "scenes", "--samples", 20, "--seed", 9, "--show", 2]
    assert evaluate(tiny, *argv, "--out", out) == 0
    rows = {row["task"]: row for row in json.loads(out.read_text())["rows"]}
    assert [*rows] == ["scenes", "tool calls", "tool calls, well formed"]
    for row in rows.values():
        assert (row["right"], row["accuracy"]) == (15, 0.75)
        assert row["interval"] == list(wilson_interval(15, 20))
    text = capsys.readouterr().out
    assert "│ scenes                  │      20 │    15 │   75.0 % │ 53.1 .. 88.8 % │" in text
    assert "\nscenes: 2 of 5 wrong answers\n" in text
    assert text.count("    got      'a \\x1b[31mgreen herring'\n") == 4
    assert "\x1b" not in text  # a terminal is not steered
    for task in ("scenes", "tool calls"):
        for number in (2, 6):
            sample = make_sample(task, "held-out", number, seed=9)
            content = sample.messages[0]["content"]
            question = content if isinstance(content, str) else content[-1]["text"]
            assert f"  sample {number}: {question}\n    expected " in text
    assert '    expected calculator \'{"expression": ' in text


def test_a_wrong_call_in_the_right_form_counts_in_the_second_row(tiny, tmp_path, monkeypatch):
    call = (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.calculator:0"
        '<|tool_call_argument_begin|>{"expression": "1 + 1 + 1"}<|tool_call_end|>'
        "<|tool_calls_section_end|>"
    )
    speak(monkeypatch, tiny, ["tool calls"], 8, {1: call, 3: "3"})
    out = tmp_path / "figures.json"
    assert evaluate(tiny, "--task", "tool calls", "--samples", 8, "--out", out) == 0
    assert [row["right"] for row in json.loads(out.read_text())["rows"]] == [4, 6]


def test_thoughts_and_what_is_wrong_in_the_form_are_shown(tiny, capsys, monkeypatch):
    speak(monkeypatch, tiny, ["sums"], 4, {0: "hm</think>1", 1: "never ending"})
    assert evaluate(tiny, "--task", "sums", "--samples", 4, "--show", 4) == 0
    text = capsys.readouterr().out
    assert "sums: 2 of 2 wrong answers\n" in text
    assert "    expected thinking 'ones " in text
    assert "    got      thinking 'hm', '1'\n" in text
    assert "thinking 'never ending', '' (the output ended before </think>)\n" in text


@pytest.mark.parametrize("task", ["scenes", "clips", "sums"])
def test_answers_do_not_depend_on_the_size_of_batches(tiny, task):
    """In float32, in which no near tie of the two best tokens is close enough to matter."""
    model, encoder = (
        KimiK25.from_pretrained(tiny, dtype=torch.float32),
        Encoder(PromptBuilder(tiny)),
    )
    found = []
    for batch in (1, 3, 8):
        done: list[int] = []
        options = {"batch": batch, "max_new_tokens": 12, "on_done": done.append}
        found.append(list(answered(model, encoder, task, 7, **options)))
        assert sum(done) == 7
        assert max(done) == min(batch, 7)
    assert found[0] == found[1] == found[2]
    assert len({one.got for one in found[0]}) > 1


@pytest.mark.parametrize("folder", ["tiny", "unmarked"])
def test_load_of_the_router_counts_every_token(folder, request):
    """Of int4 experts and of float ones, which have another op for it."""
    directory = request.getfixturevalue(folder)
    model = KimiK25.from_pretrained(directory, dtype=torch.float32)
    prompts = [[5, 6, 7, 8, 9], [10, 11]]
    with router_load(model) as loads:
        generation = model.generate(prompts, max_new_tokens=4, stop_ids=())
    fed = 5 + 2 + 2 * 3  # the last new token is never fed back
    assert generation.new_tokens == 8
    expected = fed * model.config.text_config.num_experts_per_tok
    assert {n: int(load.counts.sum()) for n, load in loads.items()} == {1: expected, 2: expected}
    for row, load in zip(to_json(loads), loads.values(), strict=True):
        counts = load.counts.double()
        assert row["least"] == pytest.approx(float(counts.min() / counts.mean()))
        assert row["largest"] == pytest.approx(float(counts.max() / counts.mean()))
    before = {layer: load.counts.clone() for layer, load in loads.items()}
    model.generate(prompts, max_new_tokens=4, stop_ids=())
    assert all(torch.equal(before[layer], load.counts) for layer, load in loads.items())
    with kimi_ops.use_backend("reference"), router_load(model) as again:
        model.generate(prompts, max_new_tokens=4, stop_ids=())
    assert all(torch.equal(before[layer], load.counts) for layer, load in again.items())


CUDA = ",".join([*(f"{op}=cuda" for op in kimi_ops.op_names() if has_kernel(op, "cuda")), "*=cpu"])


@pytest.mark.parametrize(
    ("chosen", "execute"),
    [
        ("reference", None),
        ("triton", "emulate"),
        pytest.param(CUDA, "emulate", id="cuda"),
        ("triton", "interpret"),
    ],
)
def test_backends_by_name_and_without_a_gpu(tiny, tmp_path, capsys, monkeypatch, chosen, execute):
    limit_answers(monkeypatch, 2)
    out = tmp_path / "figures.json"
    argv = ["--task", "sums, instant", "--samples", 2, "--out", out, "--backend", chosen]
    assert evaluate(tiny, *argv, *(["--execute", execute] if execute else [])) == 0
    assert "sums, instant" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert (found["backend"], found["execute"]) == (chosen, execute)
    assert len(found["router"]) == 2


def test_errors(tiny, tmp_path, capsys, monkeypatch):
    def refused(*argv: object, checkpoint: Path = tiny) -> str:
        return error_of(capsys, "eval", checkpoint, *argv)

    def unexpected(*args: Any, **options: Any) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(KimiK25, "from_pretrained", unexpected)
    none = tmp_path / "none"
    assert f"{none}: not a directory with a checkpoint" in refused(checkpoint=none)
    assert "config.json is missing" in refused(checkpoint=tmp_path)
    assert "unknown task 'chess', expected one of digits" in refused("--task", "sums", "chess")
    for samples in (0, -3):
        said = f"samples must be an integer of at least 1, got {samples}"
        assert said in refused("--samples", samples)
    assert "seed must be an integer of at least 0, got -1" in refused("--seed", -1)
    assert "show must be an integer of at least 0" in refused("--show", -1)
    assert "--backend: unknown backend 'warp'" in refused("--backend", "warp")
    assert "unknown op 'frobnicate'" in refused("--backend", "frobnicate=cpu")
    assert "device must be cpu, cuda or cuda:N" in refused("--device", "tpu")
    assert "--execute runs what --backend names" in refused("--execute", "emulate")
    assert f"--out: {tmp_path} is no file" in refused("--out", tmp_path)
    assert "is no file that can be written" in refused("--out", none / "x.json")
    assert "invalid choice" in usage_error_of(capsys, "eval", tiny, "--dtype", "int4")
    assert "CHECKPOINT" in usage_error_of(capsys, "eval")


def test_a_backend_that_cannot_run_is_one_line(tiny, capsys):
    argv = ["eval", str(tiny), "--task", "sums", "--samples", "1", "--backend", "triton"]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("kimi-ops: error: ")
    assert "backend 'triton' was chosen explicitly but cannot run" in err


@pytest.mark.parametrize(("module", "task"), [("sklearn", "digits"), ("skimage", "photographs")])
def test_a_package_that_is_not_installed_is_named_before_work(tiny, module, task):
    # None in sys.modules makes the import fail as if the package were not installed.
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from kimi_ops.cli import main\n"
        f"sys.exit(main(['eval', {str(tiny)!r}, '--samples', '1', '--task', 'sums', {task!r}]))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    said = f"kimi-ops: error: {module} is not installed: pip install 'kimi-ops[train]'\n"
    assert result.stderr == said


def test_ctrl_c_is_no_wrong_answer(tiny, capsys, monkeypatch):
    def interrupted(self: KimiK25, prompts: Any, **options: Any) -> Generation:
        count = len(prompts)
        return Generation([[] for _ in range(count)], ["interrupted"] * count, 0)

    monkeypatch.setattr(KimiK25, "generate", interrupted)
    assert evaluate(tiny, "--task", "sums", "--samples", 2) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("kimi-ops: interrupted\n")


def test_an_output_that_cannot_be_written_is_said_after_the_table(tiny, capsys, monkeypatch):
    limit_answers(monkeypatch, 1)
    assert evaluate(tiny, "--task", "sums", "--samples", 1, "--out", "/dev/full") == 2
    out, err = capsys.readouterr()
    assert "│ sums │" in out
    assert err.endswith("kimi-ops: error: --out: /dev/full: No space left on device\n")
