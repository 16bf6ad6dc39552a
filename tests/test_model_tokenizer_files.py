"""The tokenizer's files: reading, saving, broken ones, and the tiny tokenizers made here.

A broken file must give one CheckpointError that names the file and the line or key.
"""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path

import pytest

from kimi_ops.model.errors import CheckpointError, KimiError
from kimi_ops.model.tokenizer import KimiTokenizer, tiny_tokenizer_files
from kimi_ops.model.tokenizer_files import own_template
from kimi_ops.model.train_bpe import train_ranks

BYTES = {bytes([byte]): byte for byte in range(256)}


def write_files(directory: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


def model_bytes(ranks: dict[bytes, int]) -> bytes:
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    return "".join(lines).encode()


def test_files_are_read_and_saved(tmp_path: Path) -> None:
    ranks = {**BYTES, b"ab": 256}
    config = {"model_max_length": 262144, "note": "é", "added_tokens_decoder": {}}
    config["added_tokens_decoder"] = {
        "262": {"content": "<|mine|>", "special": False},
        "258": {"content": "[EOS]"},
        "513": {"content": "<|past_the_table|>", "special": True},
    }
    # Ids: 257 + position; 258 is [EOS] where the released table has it.
    files = {
        "tiktoken.model": model_bytes(ranks),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    tokenizer = KimiTokenizer.from_pretrained(write_files(tmp_path, files))
    assert tokenizer.encode("ab<|mine|>[EOS]") == [256, 262, 258]
    assert tokenizer.decode([262, 258], skip_special_tokens=True) == "<|mine|>"
    assert tokenizer.vocab_size == 513
    tokenizer.save(tmp_path / "copy")
    again = KimiTokenizer.from_pretrained(tmp_path / "copy")
    assert again.control_names == tokenizer.control_names
    assert again.special_ids == tokenizer.special_ids
    assert again.encode("ab<|mine|>[EOS]") == [256, 262, 258]
    saved = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())
    assert (saved["model_max_length"], saved["note"]) == (262144, "é")
    assert saved["added_tokens_decoder"]["513"] == config["added_tokens_decoder"]["513"]
    assert again.files() == tokenizer.files()


def test_order_of_lines_and_the_configuration_are_optional(tmp_path: Path) -> None:
    shuffled = list(BYTES.items())
    random.Random(3).shuffle(shuffled)
    write_files(tmp_path, {"tiktoken.model": model_bytes(dict(shuffled)) + b"\n\n"})
    assert KimiTokenizer.from_pretrained(tmp_path).encode("hi") == [0x68, 0x69]


GOOD_LINES = model_bytes(BYTES).decode().splitlines()


@pytest.mark.parametrize(
    ("line", "replacement", "message"),
    [
        (3, "Aw== 3 3", "line 4: expected 'base64 rank', got 'Aw== 3 3'"),
        (3, "Aw==", "line 4: expected 'base64 rank'"),
        (3, "A?== 3", "line 4: the token 'A\\?==' is not base64"),
        (3, "Aw= 3", "line 4: the token 'Aw=' is not base64"),
        (3, "é 3", "line 4: the token 'é' is not base64"),
        (3, "Aw== x", "line 4: the rank must be a number"),
        (3, "Aw== -3", "line 4: the rank must be a number"),
        (3, "Aw== " + "9" * 5000, "line 4: the rank must be a number of at most 9 digits"),
        (3, "Aw== 2", "line 4: rank 2 was already given in line 3"),
        (3, "AgA= 2", "line 4: rank 2 was already given in line 3"),
        (3, "Ag== 3", "line 4: token b'\\\\x02' was already given in line 3"),
        (3, "Aw== 300", "ranks must be 0..255 without gaps or repeats, rank 3 is missing"),
        (3, "", "ranks must be 0..254 without gaps or repeats, rank 3 is missing"),
        (3, "AwM= 3", "byte 0x03 has none"),
    ],
)
def test_broken_vocabulary_files(tmp_path: Path, line: int, replacement: str, message: str) -> None:
    lines = list(GOOD_LINES)
    lines[line] = replacement
    write_files(tmp_path, {"tiktoken.model": "\n".join(lines).encode()})
    with pytest.raises(CheckpointError, match=message) as error:
        KimiTokenizer.from_pretrained(tmp_path)
    assert "tiktoken.model" in str(error.value)
    assert len(str(error.value)) < 400


def test_missing_and_empty_vocabulary_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tiktoken\.model: a readable file was expected"):
        KimiTokenizer.from_pretrained(tmp_path)
    write_files(tmp_path, {"tiktoken.model": b""})
    with pytest.raises(CheckpointError, match="byte 0x00 has none"):
        KimiTokenizer.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="expected non-empty bytes -> int"):
        KimiTokenizer.from_ranks({**BYTES, "a": 256})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "expected a JSON object, got list"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        ({"added_tokens_decoder": []}, "must be an object, got list"),
        ({"added_tokens_decoder": {"x": {}}}, r"\['x'\]: the key must be a token id"),
        ({"added_tokens_decoder": {"300": None}}, "expected {'content'"),
        ({"added_tokens_decoder": {"300": {"content": ""}}}, "expected {'content'"),
        ({"added_tokens_decoder": {"300": {"content": "a"}}}, "two or more characters"),
        ({"added_tokens_decoder": {"300": {"content": "a\ud800"}}}, "has no UTF-8 form"),
        ({"added_tokens_decoder": {"300": {"content": "ab", "special": 1}}}, "true or false"),
        ({"added_tokens_decoder": {"255": {"content": "ab"}}}, "start after the 256 ranks"),
        ({"added_tokens_decoder": {"300": {"content": "[EOS]"}}}, r"names two ids '\[EOS\]'"),
        ({"added_tokens_decoder": {"257": {"content": "<eos>"}}}, r"no id is called '\[EOS\]'"),
    ],
)
def test_broken_configurations(tmp_path: Path, config: object, message: str) -> None:
    data = config if isinstance(config, bytes) else json.dumps(config).encode()
    write_files(tmp_path, {"tiktoken.model": model_bytes(BYTES), "tokenizer_config.json": data})
    with pytest.raises(CheckpointError, match=message) as error:
        KimiTokenizer.from_pretrained(tmp_path)
    assert "tokenizer_config.json" in str(error.value)


@pytest.mark.parametrize("vocab_size", [512, 513, 1000, 4096])
def test_tiny_tokenizer_files(tmp_path: Path, vocab_size: int) -> None:
    files = tiny_tokenizer_files(vocab_size)
    assert files == tiny_tokenizer_files(vocab_size)
    assert sorted(files) == ["chat_template.jinja", "tiktoken.model", "tokenizer_config.json"]
    tokenizer = KimiTokenizer.from_pretrained(write_files(tmp_path, files))
    assert tokenizer.vocab_size == vocab_size
    assert tokenizer.control_names[2] == "<|im_end|>"
    assert files["chat_template.jinja"].decode() == own_template()
    text = "A red circle is left of the blue square. 图中有3个圆形。\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    if vocab_size == 4096:
        # Learned, not just filled up: fewer than half as many tokens as bytes.
        assert len(ids) < len(text.encode()) / 2


def test_tiny_tokenizer_has_a_smallest_size() -> None:
    with pytest.raises(KimiError, match=r"vocab_size must be at least 512 .*got 511"):
        tiny_tokenizer_files(511)


def test_every_trained_token_is_two_earlier_ones_together() -> None:
    ranks = train_ranks(3000)
    assert list(ranks.values()) == list(range(3000))
    assert dict(list(ranks.items())[:256]) == BYTES
    for token, rank in list(ranks.items())[256:]:
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        assert any(max(ranks.get(a, rank), ranks.get(b, rank)) < rank for a, b in splits)


def test_the_first_merges_are_the_most_frequent_pairs() -> None:
    # "abc", " abc", " ab": a+b occurs 3 times. Then ab+c and " "+ab occur twice: the smaller pair
    # wins. After it no pair occurs twice, and the fillers begin.
    ranks = train_ranks(259, text="abc abc ab")
    assert list(ranks)[256:] == [b"ab", b" ab", b"\x00\x00"]
    with pytest.raises(ValueError, match=r"num_ranks must be in \[256, 16843008\], got 255"):
        train_ranks(255)


def test_random_corruption_of_the_vocabulary_file_never_crashes(tmp_path: Path) -> None:
    rng = random.Random(5)
    good = model_bytes(BYTES)
    failures = 0
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        del data[rng.choice((len(data), rng.randrange(len(data)))) :]
        write_files(tmp_path, {"tiktoken.model": bytes(data)})
        try:
            KimiTokenizer.from_pretrained(tmp_path)
        except CheckpointError:
            failures += 1
    assert failures > 150
