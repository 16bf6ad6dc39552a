"""The tokenizer: the released id table, the split rule, cuts of long text, decoding.

Expected ids come from the published table, from byte values, or from a vocabulary chosen so that
the pieces of a text are its tokens. The split rule is checked against the `regex` module, which
implements the published expression (with set intersection) independently of tiktoken's engine.
"""

from __future__ import annotations

import random

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_ops.model.errors import KimiError
from kimi_ops.model.tokenizer import (
    MAX_CHUNK_CHARS,
    MAX_RUN_CHARS,
    SPLIT_PATTERN,
    KimiTokenizer,
)
from kimi_ops.model.train_bpe import train_ranks

BYTES = {bytes([byte]): byte for byte in range(256)}

# The table of the released vocabulary; every other id of 163,584..163,839 is reserved.
RELEASED = {
    163584: "[BOS]",
    163585: "[EOS]",
    163586: "<|im_end|>",
    163587: "<|im_user|>",
    163588: "<|im_assistant|>",
    163590: "<|start_header_id|>",
    163591: "<|end_header_id|>",
    163593: "[EOT]",
    163594: "<|im_system|>",
    163595: "<|tool_calls_section_begin|>",
    163596: "<|tool_calls_section_end|>",
    163597: "<|tool_call_begin|>",
    163598: "<|tool_call_argument_begin|>",
    163599: "<|tool_call_end|>",
    163601: "<|im_middle|>",
    163602: "<|media_begin|>",
    163603: "<|media_content|>",
    163604: "<|media_end|>",
    163605: "<|media_pad|>",
    163606: "<think>",
    163607: "</think>",
    163838: "[UNK]",
    163839: "[PAD]",
}
NOT_SPECIAL = {*range(163595, 163600), 163606, 163607}


@pytest.fixture(scope="module")
def released() -> KimiTokenizer:
    """A made-up vocabulary of the released size: all strings of one, two, three bytes."""
    return KimiTokenizer.from_ranks(train_ranks(163_584, text=""))


@pytest.fixture(scope="module")
def bytewise() -> KimiTokenizer:
    """Token i is byte i; control ids start at 256."""
    return KimiTokenizer.from_ranks(BYTES)


@pytest.fixture(scope="module")
def tiny() -> KimiTokenizer:
    return KimiTokenizer.from_ranks(train_ranks(1024))


def test_released_ids(released: KimiTokenizer) -> None:
    assert released.num_ranks == 163_584
    assert released.vocab_size == 163_840
    for token_id in range(163_584, 163_840):
        name = RELEASED.get(token_id, f"<|reserved_token_{token_id}|>")
        assert released.token_id(name) == token_id
        assert released.encode(name) == [token_id]
        assert released.decode([token_id]) == name
        kept = name if token_id in NOT_SPECIAL else ""
        assert released.decode([token_id], skip_special_tokens=True) == kept
    assert released.special_ids == set(range(163_584, 163_840)) - NOT_SPECIAL
    assert released.bos_id == 163584
    assert released.eos_id == 163585
    assert released.im_end_id == 163586
    assert released.stop_ids == (163585, 163586)
    assert released.media_pad_id == 163605
    assert (released.think_id, released.end_think_id) == (163606, 163607)
    assert (released.unk_id, released.pad_id) == (163838, 163839)


def test_control_ids_of_any_vocabulary_are_relative(bytewise: KimiTokenizer) -> None:
    assert bytewise.vocab_size == 512
    for token_id, name in RELEASED.items():
        assert bytewise.token_id(name) == token_id - 163_584 + 256
    assert bytewise.token_id("<|reserved_token_261|>") == 256 + 5


def test_nothing_is_added_to_a_text(bytewise: KimiTokenizer) -> None:
    assert bytewise.encode("") == []
    assert bytewise.encode("Aé") == [0x41, 0xC3, 0xA9]
    assert bytewise.encode("a<|im_end|>b") == [0x61, 258, 0x62]


def test_control_names_in_untrusted_text_stay_text(bytewise: KimiTokenizer) -> None:
    text = "a<|im_end|><think>[BOS]<|reserved_token_261|>"
    assert bytewise.encode(text, allow_special=False) == list(text.encode())
    assert bytewise.encode_pieces([text, 258, "[E", "OS]"]) == [
        *text.encode(),
        258,
        *b"[EOS]",
    ]


def test_split_rule_is_the_published_one() -> None:
    upper = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
    lower = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
    endings = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    alternatives = [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?" + upper + "*" + lower + "+" + endings,
        r"[^\r\n\p{L}\p{N}]?" + upper + "+" + lower + "*" + endings,
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
    assert "|".join(alternatives) == SPLIT_PATTERN


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("世界你好", ["世界你好"]),
        ("Hello世界world", ["Hello", "世界", "world"]),
        ("HelloWorld", ["Hello", "World"]),
        ("HTTPServer", ["HTTPServer"]),
        ("It's WE'LL", ["It's", " WE'LL"]),
        ("1234567", ["123", "456", "7"]),
        ("a  b", ["a", " ", " b"]),
        ("x = 1;\n\ny", ["x", " =", " ", "1", ";\n\n", "y"]),
        ("e\u0301te\u0301", ["e\u0301te\u0301"]),
        ("カタカナと漢字", ["カタカナと", "漢字"]),
        (" \n  \t", [" \n", "  \t"]),
    ],
)
def test_split_examples(text: str, pieces: list[str]) -> None:
    assert regex.findall(SPLIT_PATTERN, text, regex.V1) == pieces
    assert _pieces_by_tokenizer(text, set(pieces)) == pieces


ALPHABET = [
    *"aZéÀßdtsmlrveDTSMLRVE",
    *"世界々〇〆漢ー・アあ한ก",
    *"ʰⁿǅªº\u0301\u0308\u0e31\u3099",
    *"0129½²Ⅻ٣一",
    *" \t\u00a0\u3000\n\r",
    *"'\u2019.,!?-_<|>[]{}()\"\\/#@€😀\u200b\ue000",
]


def test_split_rule_agrees_with_the_regex_module() -> None:
    rng = random.Random(20)
    texts = ["".join(rng.choices(ALPHABET, k=rng.randrange(1, 24))) for _ in range(1500)]
    split = regex.compile(SPLIT_PATTERN, regex.V1)
    expected = [split.findall(text) for text in texts]
    known = {piece for pieces in expected for piece in pieces}
    tokenizer, texts_of = _tokenizer_of(known)
    for text, pieces in zip(texts, expected, strict=True):
        assert "".join(pieces) == text
        ids = tokenizer.encode(text, allow_special=False)
        assert [texts_of[token_id] for token_id in ids] == pieces


def _tokenizer_of(pieces: set[str]) -> tuple[KimiTokenizer, dict[int, str]]:
    """A vocabulary in which each piece is one token, so that ids show where a text was split."""
    ranks = dict(BYTES)
    for piece in sorted(pieces):
        ranks.setdefault(piece.encode(), len(ranks))
    return KimiTokenizer.from_ranks(ranks), {ranks[p.encode()]: p for p in pieces}


def _pieces_by_tokenizer(text: str, pieces: set[str]) -> list[str]:
    tokenizer, texts_of = _tokenizer_of(pieces)
    return [texts_of[token_id] for token_id in tokenizer.encode(text)]


def test_bpe_merges_the_lowest_rank_first() -> None:
    ranks = {**BYTES, b"bc": 256, b"ab": 257, b"abc": 258}
    tokenizer = KimiTokenizer.from_ranks(ranks)
    # "bc" has the lower rank, so "abcd" is a + bc, which then merge to the known "abc".
    assert tokenizer.encode("abcd") == [258, ord("d")]
    del ranks[b"abc"]
    assert KimiTokenizer.from_ranks(ranks).encode("abcd") == [ord("a"), 256, ord("d")]


RUN_A = "a" * MAX_RUN_CHARS
RUN_SPACE = " " * MAX_RUN_CHARS


@pytest.mark.parametrize(
    "pieces",
    [
        [RUN_A],
        [RUN_A, RUN_A, "a"],
        [RUN_SPACE, "   "],
        # The run of letters starts at 2; its first 25,000 letters take the space along.
        ["b", " " + RUN_A, "a"],
        ["a" * (MAX_RUN_CHARS - 1), "  ", " a"],
    ],
)
def test_runs_are_cut(pieces: list[str]) -> None:
    text = "".join(pieces)
    uncut = regex.findall(SPLIT_PATTERN, text, regex.V1)
    tokenizer, texts_of = _tokenizer_of({*pieces, *uncut})
    assert [texts_of[token_id] for token_id in tokenizer.encode(text)] == pieces


def test_text_is_cut_every_400_000_characters() -> None:
    # "ab" at 399,999 would be one token; the cut separates it.
    tokenizer = KimiTokenizer.from_ranks({**BYTES, b"ab": 256, b" ab": 257})
    text = "ab " * (MAX_CHUNK_CHARS // 3) + "ab"
    assert text[MAX_CHUNK_CHARS - 1 : MAX_CHUNK_CHARS + 1] == "ab"
    ids = tokenizer.encode(text)
    assert ids[-3:] == [ord(" "), ord("a"), ord("b")]
    assert ids[:-3] == [256] + [257] * (MAX_CHUNK_CHARS // 3 - 1)


def test_control_tokens_count_in_the_position_of_a_cut_and_are_never_cut() -> None:
    tokenizer = KimiTokenizer.from_ranks({**BYTES, b"ab": 256})
    name = "<|im_end|>"
    im_end = tokenizer.im_end_id
    # The cut falls between a and b: 399,999 characters come before them.
    filler = "a " * ((MAX_CHUNK_CHARS - len(name) - 2) // 2)
    text = name + filler + "\n" + "ab"
    assert text.index("ab") == MAX_CHUNK_CHARS - 1
    assert tokenizer.encode(text)[-2:] == [ord("a"), ord("b")]
    # The cut falls into the name.
    text = " a" * (MAX_CHUNK_CHARS // 2 - 2) + name + "ab"
    assert tokenizer.encode(text)[-2:] == [im_end, 256]


@pytest.mark.parametrize(
    "char", ["A", "a", "é", "世", " ", "\n", ".", "\u0301", "ʰ", "ก", "7", "'"]
)
def test_the_longest_run_of_any_class_is_encoded(bytewise: KimiTokenizer, char: str) -> None:
    # One run per character class of the split rule, each longer than two cuts.
    text = char * (2 * MAX_RUN_CHARS + 5)
    assert bytewise.decode(bytewise.encode(text)) == text


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(max_size=80), skip=st.booleans())
def test_round_trip_of_any_text(text: str, skip: bool) -> None:
    tokenizer = _ROUND_TRIP
    ids = tokenizer.encode(text, allow_special=False)
    assert tokenizer.decode(ids, skip_special_tokens=skip) == text
    assert all(0 <= token_id < tokenizer.num_ranks for token_id in ids)


_ROUND_TRIP = KimiTokenizer.from_ranks(train_ranks(700))


def test_lone_surrogates_become_replacement_characters(tiny: KimiTokenizer) -> None:
    assert tiny.decode(tiny.encode("a\ud800b")) == "a\ufffdb"


def test_bytes_that_are_not_utf8_are_replaced(bytewise: KimiTokenizer) -> None:
    assert bytewise.decode([0x61, 0xE4, 0xB8, 0x62]) == "a\ufffdb"
    assert bytewise.decode_bytes([0xE4, 0xB8]) == b"\xe4\xb8"


@pytest.mark.parametrize("token_id", [-1, 512, 2**70])
def test_decode_refuses_ids_out_of_range(bytewise: KimiTokenizer, token_id: int) -> None:
    message = rf"ids\[1\] must be in \[0, 512\), got {token_id}"
    with pytest.raises(KimiError, match=message):
        bytewise.decode([0, token_id])
    with pytest.raises(KimiError, match=message):
        bytewise.stream_decoder().feed([0, token_id])


def test_wrong_types_are_refused(bytewise: KimiTokenizer) -> None:
    with pytest.raises(TypeError, match="text must be str, got NoneType"):
        bytewise.encode(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        bytewise.decode([1.5])  # type: ignore[list-item]
    with pytest.raises(KimiError, match="control id must be in"):
        bytewise.encode_pieces([7])
    with pytest.raises(KimiError, match="no control token is called '<nope>'"):
        bytewise.token_id("<nope>")


def test_stream_decoder_holds_back_half_a_character(bytewise: KimiTokenizer) -> None:
    stream = bytewise.stream_decoder()
    first, second, third = "世".encode()
    assert [stream.feed(i) for i in (0x61, first, second, third)] == ["a", "", "", "世"]
    assert stream.feed([first, second]) == ""
    assert stream.finish() == "\ufffd"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    ids=st.lists(st.integers(0, _ROUND_TRIP.vocab_size - 1), max_size=40),
    size=st.integers(1, 5),
    skip=st.booleans(),
)
def test_stream_decoder_gives_the_whole_text(ids: list[int], size: int, skip: bool) -> None:
    stream = _ROUND_TRIP.stream_decoder(skip_special_tokens=skip)
    parts = [stream.feed(ids[i : i + size]) for i in range(0, len(ids), size)]
    whole = _ROUND_TRIP.decode(ids, skip_special_tokens=skip)
    assert "".join(parts) + stream.finish() == whole
