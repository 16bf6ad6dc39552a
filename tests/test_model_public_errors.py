"""What callers of the model's functions get wrong is a `KimiError` that says what to do.

The calls are those that a fuzzer of every public function found raising something else.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kimi_ops.model import KimiK25
from kimi_ops.model.chat import load_template
from kimi_ops.model.checkpoint import open_checkpoint
from kimi_ops.model.config import KimiK25Config
from kimi_ops.model.conversation import PromptBuilder, answer
from kimi_ops.model.errors import KimiError, MediaError
from kimi_ops.model.make_checkpoint import make_checkpoint, tiny_config
from kimi_ops.model.media_config import MediaConfig
from kimi_ops.model.plan import parse_devices, plan
from kimi_ops.model.tokenizer import KimiTokenizer
from kimi_ops.model.weight_map import fused_parameters, parse_layers

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is there")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("errors") / "c"
    make_checkpoint(folder, tiny_config())
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [0, 1]}, r"layers must be a range such as range\(0, 3\), got \[0, 1\]"),
        ({"layers": "0-1"}, "layers must be a range"),
        ({"layers": range(5, 9)}, "layers must be a non-empty range"),
        ({"dtype": "bfloat"}, "dtype must be torch.bfloat16, .*'bf16', .* got 'bfloat'"),
        ({"dtype": torch.int8}, "dtype must be torch.bfloat16"),
        ({"dtype": torch.float64}, "dtype must be torch.bfloat16"),
        ({"dtype": None}, "dtype must be torch.bfloat16"),
        pytest.param({"device": "cuda"}, "device cuda: torch sees 0 CUDA", marks=NO_CUDA),
        ({"device": "cuda:999"}, "device cuda:999: torch sees"),
        ({"device": "meta"}, "device must be cpu, cuda or cuda:N, got 'meta'"),
        ({"device": "gpu"}, "device must be cpu, cuda or cuda:N, got 'gpu'"),
        ({"device": 2**100}, "device must be cpu"),
    ],
)
def test_from_pretrained(folder, options, message):
    with pytest.raises(KimiError, match=message):
        KimiK25.from_pretrained(folder, **options)


def test_short_names_of_dtypes_are_accepted(folder):
    assert KimiK25.from_pretrained(folder, dtype="fp32").dtype == torch.float32


@pytest.mark.parametrize("path", [None, 5, b"bytes", ["a"], "x" * 5000, "null\0"], ids=repr)
@pytest.mark.parametrize(
    "call",
    [
        KimiK25.from_pretrained,
        PromptBuilder,
        KimiTokenizer.from_pretrained,
        KimiK25Config.from_file,
        MediaConfig.from_file,
        load_template,
        open_checkpoint,
        lambda path: make_checkpoint(path, tiny_config()),
    ],
)
def test_what_is_no_path(call, path):
    with pytest.raises(KimiError, match=r"a path must be text|not a usable path"):
        call(path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate([[1]], stop_ids=5), "stop_ids must be a list of token ids, got 5"),
        (lambda m: m.generate([[1]], stop_ids="a"), "stop_ids must be a list of token ids"),
        (lambda m: m.generate([[1]], stop_ids=["a"]), "stop_ids must hold token ids, got 'a'"),
        (lambda m: m.generate([[1]], sampling=0.5), "sampling must be a Sampling, got 0.5"),
        (lambda m: m.generate([[1]], on_token=5), "on_token must be a function, got 5"),
        (lambda m: m.generate(torch.tensor(5)), "prompts must be a list of lists"),
        (lambda m: m.generate([[1]], page_size=10**30), r"page_size must be below 2\^40"),
        (lambda m: m.embed([1, 2]), "input_ids must be a tensor, got list"),
        (lambda m: m.embed(torch.ones(2)), r"input_ids must be \[T\] integers, got \[2\]"),
        (lambda m: m.embed(torch.ones(2).long(), 5), "media must be a tensor, got int"),
        (
            lambda m: m.encode_media(
                torch.zeros(4, 3, 14, 14, dtype=torch.uint8), torch.tensor([[1, 2, 2]])
            ),
            r"pixel_values must be \[L, 3, 14, 14\] floats, got .* torch.uint8",
        ),
        (lambda m: m.save_pretrained("new", max_shard_bytes="1"), "max_shard_bytes must be an"),
        (lambda m: answer(m, None, [1, 2]), "prompt must be of PromptBuilder.build, got list"),
        (lambda m: KimiK25({"a": 1}), "config must be a KimiK25Config .* got dict"),
        (lambda m: KimiK25(m.config, dtype=torch.int8), "dtype must be torch.bfloat16"),
        (lambda m: fused_parameters("x"), "config must be a KimiK25Config"),
        (lambda m: plan(None, devices="80GB", context=9), "config must be a KimiK25Config"),
        (lambda m: parse_devices(8), "devices must look like"),
        (lambda m: parse_layers(3.5, m.config), "layers must look like '3' or '0-3'"),
    ],
)
def test_other_calls(folder, call, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = KimiK25.from_pretrained(folder)
    with pytest.raises(KimiError, match=message):
        call(model)


def test_media_errors_stay_media_errors(folder):
    model = KimiK25.from_pretrained(folder)
    with pytest.raises(MediaError, match="grid_thws must be a tensor, got list"):
        model(torch.ones(1, 3).long(), torch.zeros(4, 3, 14, 14), [[1, 2, 2]])
